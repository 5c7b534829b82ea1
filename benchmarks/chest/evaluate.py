"""Figures of the shipped chest model: every method, exact views and calibrated films, phantoms and real chests apart.

python benchmarks/chest/evaluate.py --checkpoint_dir chest64 --phantoms 16
python benchmarks/chest/evaluate.py --checkpoint_dir chest64 --phantoms 80 --methods expected --table intervals
python benchmarks/chest/evaluate.py --checkpoint_dir checkpoints/held_out/single --data data/chest64 --phantoms 0 \
    --out benchmarks/chest/results/chest64

Phantoms are of seeds that no training uses. Real chests are those of `--data` that the header names as held out. Films
are simulated from the volume that is judged, with random settings (chapter 00g), and calibrated by the checkpoint's
calibration network; benchmarks/film has films of another simulator.
PSNR and SSIM by protocol `unit`; errors of lung volume, cardiothoracic ratio and bend of the spine are absolute.
`within` is the share of cases whose measure lies inside the interval that `doubt.json` states (aim: 0.9)."""

import argparse
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import command_line, one_thread, save, table


def case_rows(model, name: str, population: str, x, seed: int, methods, bounds: dict, pairs: int) -> list[dict]:
    "All figures of one patient."
    import numpy as np

    from diffx2ct.calibrate import film_views
    from diffx2ct.data import density, to_hu
    from diffx2ct.measures import measure_chest
    from diffx2ct.metrics import psnr, ssim
    from diffx2ct.reconstruct import reconstruct

    net, c = model.denoiser, model.config.DIFFUSION
    views = [("exact", net.A(density(x[None], net.window))[0])]
    for pair in range(pairs if model.calibrator else 0):
        rng = np.random.default_rng([seed, 7, pair])
        views.append(("films", film_views(model.calibrator, model.calibrator_header, x, net.A, net.window, rng)))
    truth, rows = measure_chest(to_hu(x[0], net.window), net.A.mm), []
    for kind, y in views:
        settings = c if kind == "exact" else c.model_copy(update=dict(CONSISTENCY="soft"))
        for method in methods:
            got = reconstruct(net, y, method, settings, seed=seed).float().cpu()
            found = measure_chest(to_hu(got[0], net.window), net.A.mm)
            row = {"case": name, "population": population, "views": kind, "method": method}
            row |= {"psnr": psnr(got, x), "ssim": ssim(got[0], x[0])}
            for key, value in truth.items():
                row[key] = value
                row[f"{key} error"] = abs(found[key] - value)
                if method == "expected" and key in bounds[kind]:
                    row[f"{key} within"] = bool(abs(found[key] - value) <= bounds[kind][key])
            rows.append(row)
            print(*(f"{v:.3f}" if isinstance(v, float) else v for v in list(row.values())[:6]), flush=True)
    return rows


def summary(rows: list[dict]) -> list[dict]:
    "Means over cases, a row for each population, kind of views and method."
    out = []
    for key in dict.fromkeys((r["population"], r["views"], r["method"]) for r in rows):
        some = [r for r in rows if (r["population"], r["views"], r["method"]) == key]
        row = {"population": key[0], "cases": len({r["case"] for r in some}), "views": key[1], "method": key[2]}
        for name in ("psnr", "ssim", *(k for k in rows[0] if k.endswith(" error"))):
            values = [float(r[name]) for r in some if math.isfinite(r[name])]
            row[name] = sum(values) / len(values) if values else None
        for name in sorted({k for r in some for k in r if k.endswith(" within")}):
            row[name] = sum(r[name] for r in some) / len(some)
        out.append(row)
    return out


def for_card(population: str, rows: list[dict], size: int, pairs: int) -> dict:
    "A table as card.py reads it."
    columns = {
        "PSNR, dB": ("psnr", 2),
        "SSIM": ("ssim", 3),
        "lung volume, mean error, litres": ("lung volume error", 2),
        "cardiothoracic ratio, mean error": ("cardiothoracic ratio error", 3),
        "bend of the spine, mean error, mm": ("bend of the spine error", 1),
        "lung volume inside its 90 % interval": ("lung volume within", 2),
        "ratio inside": ("cardiothoracic ratio within", 2),
        "bend inside": ("bend of the spine within", 2),
    }
    names = {"consistent_mean": "consistent mean", "mean_of_k": "mean of 4"}
    table_rows = {
        f"{r['views']}: {names.get(r['method'], r['method'])}": {
            title: f"{r[key]:.{digits}f}" for title, (key, digits) in columns.items() if r.get(key) is not None
        }
        for r in rows
    }
    return dict(
        title=f"{population[0].upper()}{population[1:]}, {rows[0]['cases']} cases",
        columns=list(columns),
        rows=table_rows,
        note=f"Protocol unit, {size}^3; exact views, and simulated films read by the calibration network of the model"
        + (f" (mean of {pairs} pairs with different settings)." if pairs > 1 else "."),
        command=command_line("chest/evaluate.py"),
    )


def main(argv: list[str]) -> None:
    from diffx2ct.commands import METHODS

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint_dir", required=True, metavar="DIR", help="a model")
    p.add_argument("--data", metavar="DIR", help="folder that data.py has made, for the held-out real chests")
    p.add_argument("--phantoms", type=int, default=8, help="phantoms of seeds from 5000; default: 8")
    p.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS, help="default: all")
    p.add_argument("--pairs", type=int, default=1, help="pairs of films of each patient; default: 1")
    p.add_argument("--table", metavar="NAME", help="name of the file; default: the word of the population")
    p.add_argument("--out", metavar="DIR", help="default: results/ and the name of the model, next to this script")
    a = p.parse_args(argv)
    import json

    from diffx2ct.basics import read_pt
    from diffx2ct.checkpoint import load_model
    from diffx2ct.data import to_unit
    from diffx2ct.phantom import phantom

    model = load_model(a.checkpoint_dir)
    net, size = model.denoiser, model.denoiser.A.size
    file = model.path.parent / "doubt.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    bounds = {"exact": kept.get("measures", {}), "films": (kept.get("films") or {}).get("measures", {})}
    cases = [
        (f"phantom {s}", "phantoms", to_unit(phantom(s, size, net.A.mm)[0], net.window)[None])
        for s in range(5000, 5000 + a.phantoms)
    ]
    held = model.meta.get("cases", {}).get("valid", []) if a.data else []
    for name in held:
        if not name.startswith("valid"):
            x = read_pt(Path(a.data, "volumes", f"{name}.pt")).float().reshape(1, size, size, size)
            cases.append((name, "real chests, held out", x))
    rows = []
    for seed, (name, population, x) in enumerate(cases):
        rows += case_rows(model, name, population, x, seed, a.methods, bounds, a.pairs)
    found = summary(rows)
    out = Path(a.out or HERE / "results" / model.path.parent.name)
    for population in dict.fromkeys(r["population"] for r in found):
        some = [r for r in found if r["population"] == population]
        name = a.table or population.split()[0]
        of = [r for r in rows if r["population"] == population]
        save(out / "cases" / f"{name}.json", dict(step=model.meta.get("step"), summary=some, cases=of))
        save(out / f"{name}.json", for_card(population, some, size, a.pairs))
    print(table(found))


if __name__ == "__main__":
    one_thread(main)
