"""Write MODEL_CARD.md of the models of the package, or of another one, from header, doubt.json and result files.
A value that was not measured has no row."""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

FIGURES = {
    "psnr": ("PSNR, dB", 1),
    "ssim": ("SSIM", 3),
    "mae_hu": ("mean error, HU", 0),
    "mae_hu_body": ("mean error in the body, HU", 0),
    "residual": ("views missed by, %", 2),
}  # key of diffx2ct_evaluate -> words, decimals
WORDS = {"mean_of_k": "mean of {k}", "consistent_mean": "consistent mean", "mean": "mean patient"}
EMPTY = ("", "?", "-", "tbd", "todo", "n/a", "xxx", "none")  # placeholders


def filled(value) -> bool:
    "Check if a value is given; refuse a placeholder."
    if value is None or value == [] or value == {}:
        return False
    if isinstance(value, str):
        from diffx2ct.basics import UserError

        if value.strip().lower() in EMPTY or value.strip().startswith("<"):
            raise UserError(f"{value!r} is a placeholder; write the value, or leave the entry out")
    return True


def rows(facts: dict) -> list[str]:
    "Write a table of the given facts."
    known = [f"| {k} | {v} |" for k, v in facts.items() if filled(v)]
    return ["| | |", "|---|---|", *known] if known else []


def model_facts(meta: dict, path: Path) -> dict:
    "Collect the facts in the header of a model."
    c, g, cases = meta["config"], meta["geometry"], meta.get("cases") or {}
    sides = [f"{k} {g[k]}" for k in ("frontal", "lateral") if g.get(k)]
    cone = f", source to axis {g['sad_mm']:g} mm, source to detector {g['sdd_mm']:g} mm" if g["kind"] == "cone" else ""
    n = c["DATA"]["TARGET_VOLUME_SIZE"]
    return {
        "volume": f"{n} x {n} x {n} voxels of {meta['mm']:.4g} mm",
        "views": f"two, {c['DATA']['TARGET_DRR_SIZE']} x {c['DATA']['TARGET_DRR_SIZE']} pixels on a detector of "
        f"{g['panel_mm']:g} mm",
        "geometry": f"{g['kind']} beams{cone}{''.join(f', {s}' for s in sides)}",
        "values": f"HU {c['DATA']['HU_MIN']:g} to {c['DATA']['HU_MAX']:g}",
        "training cases": len(cases["train"]) if cases.get("train") else None,
        "validation cases": len(cases["valid"]) if cases.get("valid") else None,
        "training steps": meta.get("step"),
        "optimizer": c["TRAINING"].get("OPTIMIZER"),
        "sampler": f"{c['DIFFUSION']['SAMPLER']}, {c['DIFFUSION']['STEPS']} steps",
        "program": f"diffx2ct {meta['version']}",
        "file": f"{path.name}, {path.stat().st_size / 1e6:.1f} MB",
    }


def figure(found: list | None, decimals: int, scale: float = 1) -> str | None:
    "Format a mean with its interval."
    if not found or found[0] is None:
        return None
    mean, *ends = (None if v is None else f"{scale * v:.{decimals}f}" for v in found)
    return f"{mean} [{ends[0]}, {ends[1]}]" if len(ends) == 2 and None not in ends else mean


def scores(result: dict) -> list[str]:
    "Write a file of diffx2ct_evaluate as a table, one column per method."
    from diffx2ct.basics import UserError

    s, means = result["settings"], result["means"]
    if s.get("trained_on"):
        raise UserError(f"{s['data']}: {len(s['trained_on'])} cases are of patients the model was trained on")
    methods = [m for m in s["methods"] if m in means]
    lines = []
    for key, (words, decimals) in FIGURES.items():
        cells = [figure(means[m].get(key), decimals, 100 if key == "residual" else 1) for m in methods]
        if any(cells):
            lines.append(f"| {words} | " + " | ".join(c or "" for c in cells) + " |")
    if not lines:
        return []
    names = [WORDS.get(m, m).format(k=s["k"]) for m in methods]
    return [
        f"### {s['data']}, {len(result['cases'])} cases",
        "",
        f"Protocol {s['protocol']}, consistency {s['consistency']}, seed {s['seed']}, {s['steps']} steps; "
        "mean with its 95 % interval over cases.",
        "",
        f"| | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
        *lines,
        "",
    ]


def tables(result: dict) -> list[str]:
    "Write a file {title, columns, rows: {name: {column: value}}, note, command} as a table."
    names = [c for c in result["columns"] if any(filled(row.get(c)) for row in result["rows"].values())]
    lines = [
        f"| {name} | " + " | ".join(str(row[c]) if filled(row.get(c)) else "" for c in names) + " |"
        for name, row in result["rows"].items()
        if any(filled(row.get(c)) for c in names)
    ]
    if not lines:
        return []
    extra = [result[k] for k in ("note",) if filled(result.get(k))]
    extra += [f"Measured by `{result['command']}`."] if filled(result.get("command")) else []
    head = [f"### {result['title']}", "", f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    return [*head, *lines, "", *extra, ""]


def read_json(path: Path) -> dict:
    "Read a result file."
    from diffx2ct.basics import UserError

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError
        return found
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as a result file ({type(e).__name__}); make it again") from None


def calibration(path: Path) -> list[str]:
    "Describe the calibration in doubt.json."
    from diffx2ct.checkpoint import file_digest

    kept = path.parent / "doubt.json"
    if not kept.is_file():
        return []
    d = read_json(kept)
    if d.get("model") != file_digest(path) or not d.get("cases"):
        return []
    most = max(map(int, d["factors"]))
    return [
        "## Uncertainty",
        "",
        f"The standard deviation of 2 to {most} samples is calibrated on {len(d['cases'])} cases with a known volume, "
        "per tissue and separately for voxels in no beam; the thresholds of the report come from the same cases, the "
        f"bounds of lung volume, cardiothoracic ratio and bend of the spine from {d.get('measured', len(d['cases']))}.",
        "",
    ]


def card(path: Path, results: list[Path], text: dict) -> str:
    "Write the card."
    from diffx2ct.basics import UserError
    from diffx2ct.checkpoint import file_digest, read_header
    from diffx2ct.data import CAUTION, GENERATED

    meta = read_header(path)
    out = [f"# Model card: {path.parent.name}", ""]
    out += [f"Two X-ray views in, a CT volume out. {CAUTION.capitalize()}. The volume is {GENERATED}.", ""]
    out += ["## What it is", "", *rows(model_facts(meta, path)), ""]
    for key, title in (
        ("use", "Use"),
        ("data", "Training data"),
        ("preparation", "Preparation"),
        ("licence", "Licence"),
        ("cost", "What training took"),
    ):
        said = text.get(key)
        if filled(said):
            out += [
                f"## {title}",
                "",
                *([f"- {s}" for s in said if filled(s)] if isinstance(said, list) else [said]),
                "",
            ]
    measured = []
    for file in results:
        result = read_json(file)
        if "settings" in result and "means" in result:
            name = result["settings"].get("checkpoint")
            if name != path.parent.name:
                raise UserError(
                    f"{file} scores the checkpoint {name}, this card is of {path.parent.name}; leave it out"
                )
            measured += scores(result)
        elif "columns" in result and "rows" in result:
            measured += tables(result)
        else:
            raise UserError(
                f"{file} is neither a file of diffx2ct_evaluate --json nor one with title, columns and rows"
            )
    out += ["## Measured", "", *measured] if measured else []
    out += calibration(path)
    if filled(text.get("limits")):
        out += ["## Limits", "", *(f"- {s}" for s in text["limits"] if filled(s)), ""]
    out += [
        "## Files",
        "",
        *(f"- `{p.name}`, sha256 `{file_digest(p)}`" for p in sorted(path.parent.glob("*.safetensors"))),
        "",
    ]
    return "\n".join(out).rstrip() + "\n"


def main(argv: list[str]) -> None:
    from diffx2ct.basics import UserError, command, write_atomic
    from diffx2ct.checkpoint import model_file
    from diffx2ct.commands import SHIPPED_MODELS

    @command
    def body(argv):
        p = argparse.ArgumentParser(prog="card.py", description=__doc__)
        p.add_argument(
            "--checkpoint_dir",
            help="a model of the package or a checkpoint folder (default: the models of the package, and MODEL_CARD.md "
            "of the project)",
        )
        p.add_argument(
            "results",
            nargs="*",
            help="files of diffx2ct_evaluate --json, or of title, columns and rows (default: all in "
            "benchmarks/chest/results/<model>)",
        )
        p.add_argument(
            "--text",
            help="JSON of what no file states: use, data, preparation, licence, cost, limits; or such a block for each "
            "model by its name (default: benchmarks/chest/card.json, where there is one)",
        )
        p.add_argument("--out", help="default: MODEL_CARD.md next to the model")
        a = p.parse_args(argv)
        own = Path(__file__).parent
        text = Path(a.text or own / "card.json")
        if a.text and not text.is_file():
            raise UserError(f"--text {text} does not exist; name a JSON file")
        said, made = read_json(text) if text.is_file() else {}, []
        for name in [a.checkpoint_dir] if a.checkpoint_dir else SHIPPED_MODELS:
            path = model_file(name)
            files = [Path(f) for f in a.results] or sorted((own / "results" / path.parent.name).glob("*.json"))
            made.append(card(path, files, said | said.get(path.parent.name, {})))
            write(Path(a.out or path.parent / "MODEL_CARD.md"), made[-1])
        if not a.checkpoint_dir:
            write(ROOT / "MODEL_CARD.md", "\n".join(made))

    def write(out: Path, words: str) -> None:
        print(write_atomic(out, lambda p: p.write_text(words, encoding="utf-8")))

    body(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
