"""Compare methods that make a volume from two views, for the same patients and the same CPU time of training.

python benchmarks/quality/run.py                    every row that is not there yet, two at a time; then table and plot
python benchmarks/quality/run.py --only sarcoma     rows whose name holds a word
python benchmarks/quality/run.py --list             what there is and what is missing; trains nothing
python benchmarks/quality/run.py --minutes 0.2 --out /tmp/q   a rehearsal

Each row trains in a separate process on one thread, from one seed, for a budget of CPU time that becomes a number of
steps by timing a few of them
first, by turns with steps of ours, and is scored with its last weights, never with the best of several, on patients it
has not seen. A killed run goes on
where it was.
Rows are data: what differs from config.yml's defaults is written here and in the results."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import machine, training_step

STS = [f"STS_{i:03d}" for i in range(33, 41)]  # held out, never trained on

PHANTOMS = {"DATA.PHANTOMS": 272, "DATA.VALIDATION_CASES": [f"phantom{i:04d}" for i in range(256, 272)]}
AT_32 = {
    "TRAINING.COARSE_EPOCHS": [],
    "DATA.TARGET_VOLUME_SIZE": 32,
    "DATA.TARGET_DRR_SIZE": 32,
    "TRAINING.PATCH_SIZE": 32,
    "BATCH_SIZE": 4,
    "MODEL.UNET.NUM_CHANNELS": [48, 96, 128],
    "MODEL.UNET.PLANAR_LEVELS": 2,
    "MODEL.UNET.ATTENTION_LEVELS": [False, False, True],
    "MODEL.UNET.CROSS_ATTENTION_LEVELS": [False, False, True],
}

# data sets: budget in CPU minutes, settings, and how they are made
DATA = {
    "phantoms": dict(minutes=30, sets=PHANTOMS),
    "phantoms_cone": dict(minutes=30, sets=PHANTOMS | {"DATA.GEOMETRY": "x2ct"}),
    "sarcoma": dict(
        minutes=60, prepare=("sts_ct_64.npz", "parallel"), sets={"DATA.VALIDATION_CASES": STS}, profile="few"
    ),
    "sarcoma_cone": dict(
        minutes=60, prepare=("sts_ct_64.npz", "x2ct_scaled"), sets={"DATA.VALIDATION_CASES": STS}, profile="few"
    ),
    "sarcoma32": dict(
        minutes=5,
        prepare=("sts_ct_32.npz", "parallel"),
        sets={"DATA.VALIDATION_CASES": STS, "TRAINING.AUGMENT.PASSES": 0} | AT_32,
        profile="few",
    ),  # augmentation is one of the parts
    "phantoms32": dict(minutes=5, sets=PHANTOMS | AT_32),
}
# methods: settings that differ from ours
METHODS = {
    "ours": {},
    "regression": {"TRAINING.FULL_NOISE_RATIO": 1.0},  # the same backbone, never shown a noisy volume
    "original_style": {  # noise prediction from noise alone, conditioned by cross-attention only, at full resolution
        "MODEL.BASE": "none",
        "MODEL.CONDITIONING_ENCODER.LIFT": "none",
        "MODEL.UNET.HALF_RESOLUTION": False,
        "MODEL.UNET.NUM_CHANNELS": [32, 64, 128, 256],
        "MODEL.UNET.PLANAR_LEVELS": 0,
        "MODEL.UNET.NUM_RES_BLOCKS": 2,
        "MODEL.UNET.CROSS_ATTENTION_LEVELS": [False, True, True, True],
        "TRAINING.COARSE_EPOCHS": [],
        "TRAINING.PHANTOM_EPOCHS": 0,
        "DIFFUSION.PREDICTION": "eps",
        "DIFFUSION.SCHEDULE": "linear",
        "DIFFUSION.SAMPLER": "ddim",
        "DIFFUSION.STEPS": 50,
        "DIFFUSION.CONSISTENCY": "off",
        "TRAINING.FULL_NOISE_RATIO": 0.0,
        "TRAINING.OPTIMIZER": "adamw",
        "TRAINING.LEARNING_RATE": 2e-4,
        "BATCH_SIZE": 1,
    },
}
ABLATIONS = {
    "ours": {},
    "without the residual from the consistent mean": {"MODEL.BASE": "mean"},
    "without lifting (cross-attention only)": {"MODEL.CONDITIONING_ENCODER.LIFT": "none"},
    "without modulation (lifted features only added)": {"MODEL.CONDITIONING_ENCODER.LIFT": "add"},
    "without projecting the output in training": {"DIFFUSION.CONSISTENCY": "off"},
    "without bottleneck context": {
        "MODEL.UNET.ATTENTION_LEVELS": [False, False, False],
        "MODEL.UNET.CROSS_ATTENTION_LEVELS": [False, False, False],
    },
    "without planar convolutions": {"MODEL.UNET.PLANAR_LEVELS": 0},
    "without augmentation (mirror images only)": {"TRAINING.AUGMENT.SHARE": 0},
    "with augmentation (half of the cases)": {"TRAINING.AUGMENT.PASSES": 0},
    "without phantoms first": {"TRAINING.PHANTOM_EPOCHS": 0},
    "without diffusion (plain regression)": {"TRAINING.FULL_NOISE_RATIO": 1.0},
    "without Muon (AdamW)": {"TRAINING.OPTIMIZER": "adamw", "TRAINING.LEARNING_RATE": 1e-3},
}
WHERE = {
    "without augmentation (mirror images only)": "sarcoma32",
    "with augmentation (half of the cases)": "phantoms32",
    "without phantoms first": "sarcoma32",
}  # what is a part of ours on one of them only
SEEDS = 3
FEW = 4  # cases that the original style is scored on, since one volume of fifty steps at full resolution takes minutes


def rows() -> list[dict]:
    "All rows of both tables, in the order in which they are worth having."
    out = [
        dict(table="main", data=d, method=m, seed=0)
        for m in METHODS
        for d in ("sarcoma", "sarcoma_cone", "phantoms", "phantoms_cone")
    ]
    out += [
        dict(table="ablation", data=d, method=m, seed=s)
        for d in ("sarcoma32", "phantoms32")
        for s in range(SEEDS)
        for m in ABLATIONS
        if WHERE.get(m, d) == d
    ]
    for r in out:
        r["name"] = " · ".join([r["data"], r["method"], f"seed {r['seed']}"])
    return out


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def make(*what: str | Path) -> None:
    "Call `diffx2ct_prepare`; what it refuses ends the benchmark with its own sentence."
    done = subprocess.run(
        [Path(sys.executable).with_name("diffx2ct_prepare"), *what],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr.strip().splitlines()[-1])


def prepare(ct: Path, work: Path, names: set[str]) -> dict[str, dict]:
    "Make what the rows need; real CT is left out, saying so, where its file is not there."
    ready = {}
    for name in sorted(names):
        d = DATA[name]
        if "prepare" not in d:
            ready[name] = {}
            continue
        file, geometry = d["prepare"]
        if not (ct / file).exists():
            print(f"{name}: {ct / file} is not there; its rows are left out (name the folder with --ct)")
            continue
        folder = work / "data" / name
        make(ct / file, "--out", folder, "--geometry", geometry)
        ready[name] = {"DATA.PT_DATA_DIR": str(folder / "volumes"), "DATA.DRR_DIR": str(folder / "drrs")}
    return ready


ROUNDS = 12  # of which the last ten count


def pacer(c, data, still: bool):
    "Return a function that runs a training step of a throwaway network and returns its CPU seconds."
    import diffx2ct.batches as B
    from diffx2ct.diffusion import build_denoiser

    step, micro = (
        training_step(build_denoiser(c, data.geometry, data.mm, data.line_integrals), c),
        c.TRAINING.GRADIENT_ACCUMULATION_STEPS,
    )
    crops = B.Crops(
        data.train,
        [x for s in range(ROUNDS) for x in B.batch_plan(c, len(data.train), s)],
        c,
        data.line_integrals,
        data.mm,
        still,
    )

    def pace(s: int) -> float:
        start = time.process_time()
        step([crops[s * micro + i] for i in range(micro)])
        return time.process_time() - start

    return pace


def costs(plans: list) -> list[list[float]]:
    """CPU seconds that each stage of each plan would take with its settings' own epochs. Steps are timed by turns, so
    that what else the machine does falls on all alike; a little is added for the averaging of weights."""
    import diffx2ct.batches as B

    pacers = [[pacer(c, d, B.no_augmentation(plan[-1][1])) for _, c, d in plan] for plan in plans]
    times = [[[f(s) for f in row] for row in pacers] for s in range(ROUNDS)]
    return [
        [
            c.EPOCHS * B.steps_per_epoch(c, len(d.train)) * 1.03 * statistics.median(t[p][i] for t in times[2:])
            for i, (_, c, d) in enumerate(plan)
        ]
        for p, plan in enumerate(plans)
    ]


def shorten(c, ours, data, seconds: float, pace: Path) -> dict:
    """Epochs of every stage for a budget of CPU seconds: early stages are as long as those of ours, whose stages all
    get the same share of their settings' own, and the last one fills what is left."""
    import diffx2ct.batches as B
    from diffx2ct.basics import write_atomic

    plan = B.training_stages(c, data)
    whole, *rest = costs([plan, B.training_stages(ours, data)] if c != ours else [plan])
    now = sum(rest[0] if rest else whole)
    if not pace.exists():
        write_atomic(
            pace, lambda p: p.write_text(json.dumps(now))
        )  # the first row's word for all rows: a core may be twice as fast while its neighbour rests
    share = seconds / json.loads(pace.read_text())
    early = [max(name == "coarse", round(s.EPOCHS * share)) for name, s, _ in plan[:-1]]
    of = lambda kind: [n for n, (name, _, _) in zip(early, plan) if name == kind]
    left = share * now - sum(n / s.EPOCHS * full for n, (_, s, _), full in zip(early, plan, whole))
    per = B.steps_per_epoch(c, len(data.train))
    steps = left / whole[-1] * c.EPOCHS * per
    return dict(
        epochs=max(1, round(steps / per)),
        coarse=of("coarse"),
        phantoms=sum(of("phantoms")),
        steps=max(1, round(steps)) if steps < per else None,
    )


def train_row(row: dict, minutes: float, paths: dict, over: list[str], out: Path, work: Path) -> None:
    "In a process of its own: train one row and write its result."
    import torch
    import yaml

    import diffx2ct.batches as B
    import diffx2ct.train as T
    from diffx2ct.basics import write_atomic
    from diffx2ct.cases import open_data
    from diffx2ct.checkpoint import load_model, newest_model
    from diffx2ct.config import load_config
    from diffx2ct.diffusion import has_native_bf16
    from diffx2ct.evaluate import evaluate, open_cases

    torch.set_num_threads(1)
    os.environ["WANDB_MODE"] = "disabled"
    d, folder = DATA[row["data"]], work / slug(row["name"])
    differs = (METHODS if row["table"] == "main" else ABLATIONS).get(row["method"], {})
    plain = d["sets"] | paths | {"SEED": row["seed"], "DEVICES": "cpu"}
    sets = plain | differs
    flow = lambda v: yaml.safe_dump(v, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("...")
    config = lambda sets: load_config(
        HERE.parents[1] / "config.yml", d.get("profile"), [f"{k}={flow(v).strip()}" for k, v in sets.items()] + over
    )
    c = config(sets)
    data = open_data(c)
    plan = folder / "plan.json"
    if not plan.exists():
        folder.mkdir(parents=True, exist_ok=True)
        plan.write_text(json.dumps(shorten(c, config(plain), data, minutes * 60, work / f"pace_{row['data']}.json")))
    plan = json.loads(plan.read_text())
    epochs = plan["epochs"]
    if plan.get("steps"):
        # not even one pass over the cases: its beginning
        B.steps_per_epoch = T.steps_per_epoch = lambda c, n: plan["steps"]
    c = config(
        sets
        | {
            "EPOCHS": epochs,
            "TRAINING.COARSE_EPOCHS": plan["coarse"],
            "TRAINING.PHANTOM_EPOCHS": plan["phantoms"],
            "TRAINING.LOSS_PHASE_EPOCHS": [epochs, 0],
            "TRAINING.VALIDATION_FREQ": max(1, epochs // 8),
            "TRAINING.CHECKPOINT_FREQ": max(1, epochs // 40),
        }
    )
    apart, validate = [0.0], T.validate

    def timed(*a):
        start = time.process_time()
        try:
            return validate(*a)
        finally:
            apart[0] += time.process_time() - start

    T.validate = timed if row["method"] != "original_style" else lambda *a: 0.0  # it has no expected volume
    train_stage, spent = T.train_stage, []  # s of each stage, of which the run itself is the last

    def clocked(*a, **k):
        start, before = time.process_time(), apart[0]
        try:
            return train_stage(*a, **k)
        finally:
            spent.append(time.process_time() - start - (apart[0] - before))

    T.train_stage, start = clocked, time.process_time()
    T.train_run(c, data, folder, dict(study="quality", trial=row["name"]), title=row["name"])
    seconds = time.process_time() - start - apart[0]
    model = load_model(newest_model(folder))
    history = torch.load(sorted(folder.glob("training_*.pt"))[-1], weights_only=True)["history"]
    held, scores, cases, start = open_cases(model), {}, {}, time.time()
    if row["method"] == "original_style":
        held, passes = held.only(held.cases[:FEW]), {"off": ["mean", "consistent_mean", "sample"]}
    else:
        passes = {
            "on": [
                *("mean", "consistent_mean", "expected", "sharp", "sample"),
                *(["mean_of_k"] if row["table"] == "main" else []),
            ],
            "off": ["expected", "sample"],
        }
    for consistency, methods in passes.items():
        got = evaluate(model, held, methods, seed=0, consistency=consistency)
        scores |= {
            m + (" (off)" if consistency == "off" and "mean" not in m else ""): {
                k: v for k, v in f.items() if v[0] is not None
            }
            for m, f in got["means"].items()
        }
        for n, v in got["cases"].items():
            cases.setdefault(n, {m: round(s["psnr"], 3) for m, s in v["scores"].items()})  # of the first pass
    result = row | dict(
        minutes=minutes,
        cpu_seconds=round(seconds),
        steps=model.meta["step"],
        epochs=epochs,
        coarse_epochs=plan["coarse"],
        phantom_epochs=plan["phantoms"],
        coarse_seconds=round(sum(spent[:-1])),
        parameters=sum(p.numel() for p in model.denoiser.parameters()),
        differs=differs | dict(s.split("=", 1) for s in over),
        optimizer=c.TRAINING.OPTIMIZER,
        curve=[[e, round(v, 3)] for e, v in history["values"]],
        scores=scores,
        cases=cases,
        machine=machine() | dict(bf16=has_native_bf16()),
        evaluation_seconds=round(time.time() - start),
    )
    write_atomic(out / f"{slug(row['name'])}.json", lambda p: p.write_text(json.dumps(result, indent=1)))


def summary(out: Path) -> str:
    "The tables in Markdown, from the results that are there."
    got = [json.loads(p.read_text()) for p in sorted(out.glob("[!.]*.json"))]
    said, main = [], [r for r in got if r["table"] == "main"]
    show = lambda v, form: f"{v[0]:{form}} [{v[1]:{form}}, {v[2]:{form}}]" if v else "-"
    for name in DATA:
        block = sorted((r for r in main if r["data"] == name), key=lambda r: list(METHODS).index(r["method"]))
        if not block:
            continue
        floor = block[0]["scores"]["consistent_mean"]["psnr"][0]
        said += [
            f"### {name}",
            "",
            "| method | cases | CPU min | steps | volume | PSNR, dB | over the floor of the same cases | "
            "SSIM | MAE, HU |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for m in ("mean", "consistent_mean"):
            said.append(
                f"| {m.replace('_', ' ')} | {len(block[0]['cases'])} | 0 | 0 | | "
                f"{show(block[0]['scores'][m]['psnr'], '.2f')} | "
                f"{block[0]['scores'][m]['psnr'][0] - floor:+.2f} | {block[0]['scores'][m]['ssim'][0]:.3f} "
                f"| {block[0]['scores'][m]['mae_hu'][0]:.0f} |"
            )
        for r in block:
            for m in ("expected", "expected (off)", "sharp", "sample", "sample (off)", "mean_of_k"):
                if s := r["scores"].get(m):
                    said.append(
                        f"| {r['method'].replace('_', ' ')} | {len(r['cases'])} | "
                        f"{r['cpu_seconds'] / 60:.1f} | {r['steps']} | "
                        f"{m.replace('_', ' ').replace('(off)', 'before consistency')} | "
                        f"{show(s['psnr'], '.2f')} | "
                        f"{s['psnr'][0] - r['scores']['consistent_mean']['psnr'][0]:+.2f} | "
                        f"{s['ssim'][0]:.3f} | {s['mae_hu'][0]:.0f} |"
                    )
        said.append("")
    for name in DATA:
        part = [r for r in got if r["table"] == "ablation" and r["data"] == name]
        if not part:
            continue
        of = lambda m: {r["seed"]: r["scores"]["expected"]["psnr"][0] for r in part if r["method"] == m}
        ours = of("ours")
        said += [
            f"### ablation on {name}, {part[0]['minutes']:g} CPU minutes a row",
            "",
            "| row | seeds | steps | expected + consistency, dB | ours above it, mean over the seeds both "
            "have | seed by seed |",
            "|---|---|---|---|---|---|",
        ]
        for m in ABLATIONS:
            if not (v := of(m)):
                continue
            steps = sorted({r["steps"] for r in part if r["method"] == m})
            earned = [ours[s] - v[s] for s in sorted(v) if s in ours and m != "ours"]
            cells = [
                m,
                len(v),
                " to ".join(map(str, dict.fromkeys((steps[0], steps[-1])))),
                f"{statistics.mean(v.values()):.2f}"
                + (f" (sd {statistics.stdev(v.values()):.2f})" if len(v) > 1 else ""),
            ]
            cells += [f"{statistics.mean(earned):+.2f}", ", ".join(f"{e:+.2f}" for e in earned)] if earned else ["", ""]
            said.append("| " + " | ".join(map(str, cells)) + " |")
        said.append("")
    return "\n".join(said)


def plot(out: Path) -> None:
    "PSNR of the validation patients during training, one panel a data set."
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    got = [r for p in sorted(out.glob("[!.]*.json")) if (r := json.loads(p.read_text()))["table"] == "main"]
    names = [n for n in DATA if any(r["data"] == n for r in got)]
    if not names:
        return
    fig, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.8), squeeze=False, dpi=90)
    for ax, name in zip(axes[0], names):
        for r in (r for r in got if r["data"] == name):
            color = f"C{list(METHODS).index(r['method'])}"
            if r["method"] == "original_style":
                ax.axhline(r["scores"]["sample (off)"]["psnr"][0], color=color, label="original style, sample")
            else:
                ax.plot(
                    [
                        (r["coarse_seconds"] + e / r["epochs"] * (r["cpu_seconds"] - r["coarse_seconds"])) / 60
                        for e, _ in r["curve"]
                    ],
                    [v for _, v in r["curve"]],
                    "o-",
                    ms=3,
                    color=color,
                    label=r["method"],
                )
        ax.axhline(
            max((r for r in got if r["data"] == name), key=lambda r: len(r["cases"]))["scores"]["consistent_mean"][
                "psnr"
            ][0],
            color="grey",
            ls="--",
            label="consistent mean",
        )
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("CPU minutes of training", fontsize=8)
        ax.grid(alpha=0.3)
        ax.tick_params(labelsize=7)
    axes[0, 0].set_ylabel("PSNR (unit), dB", fontsize=8)
    axes[0, 0].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(out / "curves.png")
    plt.close(fig)


def pictures(out: Path, work: Path, ct: Path) -> None:
    """Truth, consistent mean, expected volume, one sample and the difference: a phantom, a sarcoma patient, and a
    chest reconstructed by the model trained on phantoms only."""
    from diffx2ct.checkpoint import load_model, newest_model
    from diffx2ct.data import show_mpr, to_hu
    from diffx2ct.diffusion import AMP
    from diffx2ct.evaluate import open_cases
    from diffx2ct.reconstruct import reconstruct

    for name, data, scan in (
        ("phantom", "phantoms", None),
        ("sarcoma", "sarcoma", None),
        ("chest", "phantoms", ct / "lidc_idri_0001.nii.gz"),
    ):
        file = newest_model(work / slug(f"{data} · ours · seed 0"))
        if not file or (scan and not scan.exists()) or (out / f"{name}.png").exists():
            continue
        folder = work / "data" / "chest" if scan else None
        if scan:
            make(scan, "--out", folder)
        model = load_model(file)
        case, net, t = open_cases(model, folder)[0], model.denoiser, model.config.TRAINING
        volumes = {
            m.replace("_", " "): reconstruct(net, case.views, m, model.config.DIFFUSION, amp=AMP[t.AMP]).float()[0]
            for m in ("consistent_mean", "expected", "sample")
        }
        volumes = {"truth": case.volume[0]} | volumes
        hu = {k: to_hu(v, net.window) for k, v in volumes.items()}
        show_mpr(
            hu | {"difference, expected": hu["expected"] - hu["truth"]}, views=case.views, path=out / f"{name}.png"
        )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose name holds all of these words")
    p.add_argument(
        "--ct",
        type=Path,
        default=os.environ.get("DIFFX2CT_CT_DIR") or HERE.parents[2] / "shared" / "ct",
        help="folder with sts_ct_64.npz and sts_ct_32.npz (default: $DIFFX2CT_CT_DIR)",
    )
    p.add_argument(
        "--out", type=Path, default=HERE / "results", help="results, one file per row (default: %(default)s)"
    )
    p.add_argument(
        "--work", type=Path, default=Path("data/quality"), help="data and checkpoints (default: %(default)s)"
    )
    p.add_argument("--minutes", type=float, help="CPU minutes of training of each row, instead of the protocol's")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="sets",
        help="change a setting of every row, for a rehearsal",
    )
    p.add_argument("--workers", type=int, default=2, help="rows at a time, one thread each (default: %(default)s)")
    p.add_argument("--list", action="store_true", help="list the results that exist and those that are missing")
    p.add_argument("--row", help=argparse.SUPPRESS)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    wanted = [r for r in rows() if all(w in r["name"] or w == r["table"] for w in a.only)]
    if a.row:
        row, paths = json.loads(a.row)
        return train_row(row, a.minutes or DATA[row["data"]]["minutes"], paths, a.sets, a.out, a.work)
    there = lambda r: (a.out / f"{slug(r['name'])}.json").exists()
    if a.list:
        for r in wanted:
            print("there  " if there(r) else "missing", r["table"].ljust(9), r["name"])
        return
    from tqdm import tqdm

    todo = [r for r in wanted if not there(r)]
    a.work.mkdir(parents=True, exist_ok=True)
    ready = prepare(a.ct, a.work, {r["data"] for r in todo})
    todo = [r for r in todo if r["data"] in ready]
    bar = tqdm(
        total=round(sum(a.minutes or DATA[r["data"]]["minutes"] for r in todo), 1), desc="quality", unit="CPU min"
    )

    def one(r):
        command = [
            sys.executable,
            __file__,
            "--row",
            json.dumps([r, ready[r["data"]]]),
            "--out",
            a.out,
            "--work",
            a.work,
            *(["--minutes", a.minutes] if a.minutes else []),
            *(x for s in a.sets for x in ("--set", s)),
        ]
        log = a.work / f"{slug(r['name'])}.log"
        with open(log, "a") as f:
            done = (
                subprocess.run(
                    [str(x) for x in command],
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=f,
                    stderr=f,
                ).returncode
                == 0
            )
        bar.update(a.minutes or DATA[r["data"]]["minutes"])
        bar.write(f"{'done  ' if done else f'FAILED (see {log})'} {r['name']}")
        return done

    with ThreadPoolExecutor(a.workers) as pool:
        good = list(pool.map(one, todo))
    bar.close()
    text = summary(a.out)
    (a.out / "table.md").write_text(text + "\n")
    plot(a.out)
    pictures(a.out, a.work, a.ct)
    print(text)
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
