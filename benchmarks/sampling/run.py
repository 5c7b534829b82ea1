"""Is sampling cheap? Eight evaluations of the network against fifty, and half precision against full, on a trained
model's own validation cases.

python benchmarks/sampling/run.py --checkpoint_dir checkpoints/trial_0
python benchmarks/sampling/run.py --checkpoint_dir checkpoints/trial_0 --cases 2 --out /tmp/sampling   a rehearsal

Every case is sampled from the same noise each way, with the checkpoint's sampler and settings, and scored by the
protocol `unit`. What is given away is the mean
over cases of the difference to the costlier way, case by case, with its 95 % bootstrap interval; negative: the cheap
way scores better. Whether more steps make
better texture neither figure can say. The bars: eight steps lose at most 0.1 dB and 0.005 SSIM, half precision at most
0.05 dB. A killed run goes on after its
last whole case."""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import one_thread, save, table

WAYS = {  # name: method, steps, precision
    "sample, 8 steps, bf16": ("sample", 8, "bf16"),
    "sample, 50 steps, bf16": ("sample", 50, "bf16"),
    "sample, 8 steps, single": ("sample", 8, "off"),
    "expected, bf16": ("expected", 1, "bf16"),
    "expected, single": ("expected", 1, "off"),
}
CHEAP = [
    ("8 steps against 50", "sample, 8 steps, bf16", "sample, 50 steps, bf16"),
    ("bf16 against single, sample", "sample, 8 steps, bf16", "sample, 8 steps, single"),
    ("bf16 against single, expected", "expected, bf16", "expected, single"),
]


def one_case(model, case) -> dict[str, dict]:
    "Way -> scores and CPU seconds."
    from diffx2ct.diffusion import AMP
    from diffx2ct.evaluate import score_volume
    from diffx2ct.reconstruct import reconstruct

    c, got = model.config, {}
    for name, (method, steps, amp) in WAYS.items():
        start = time.process_time()
        x = reconstruct(
            model.denoiser,
            case.views,
            method,
            c.DIFFUSION.model_copy(update=dict(STEPS=steps)),
            patch=c.TRAINING.PATCH_SIZE,
            amp=AMP[amp],
        ).float()
        got[name] = dict(cpu_seconds=time.process_time() - start) | {
            k: v for k, v in score_volume(x, case, model.denoiser).items() if k in ("psnr", "ssim", "mae_hu")
        }
    return got


def summary(cases: dict[str, dict]) -> tuple[list[dict], list[dict]]:
    "Means of each way, and what the cheap ones give away."
    from diffx2ct.metrics import bootstrap

    column = lambda way, k: [c[way][k] for c in cases.values()]
    mean = lambda v: sum(v) / len(v)
    ways = [
        {
            "way": w,
            "PSNR, dB": round(mean(column(w, "psnr")), 3),
            "SSIM": round(mean(column(w, "ssim")), 4),
            "MAE, HU": mean(column(w, "mae_hu")),
            "CPU s a volume": mean(column(w, "cpu_seconds")),
        }
        for w in WAYS
    ]
    losses = []
    for what, cheap, costly in CHEAP:
        away = {k: [b - a for a, b in zip(column(cheap, k), column(costly, k))] for k in ("psnr", "ssim")}
        show = lambda k, form: "{:{f}} [{:{f}}, {:{f}}]".format(*bootstrap(away[k]), f=form)
        losses.append(
            {
                "cheap against costly": what,
                "PSNR given away, dB": show("psnr", "+.3f"),
                "SSIM given away": show("ssim", "+.4f"),
                "times cheaper": mean(column(costly, "cpu_seconds")) / mean(column(cheap, "cpu_seconds")),
            }
        )
    return ways, losses


def main(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--checkpoint_dir", required=True, metavar="C", help="folder that diffx2ct_train wrote, or one model file"
    )
    p.add_argument(
        "--data", metavar="DIR", help="folder with volumes/ and drrs/ (default: the checkpoint's own validation cases)"
    )
    p.add_argument("--cases", type=int, metavar="N", help="only the first N cases")
    p.add_argument("--out", type=Path, default=HERE / "results", help="sampling.json goes there (default: %(default)s)")
    a = p.parse_args(argv)
    from tqdm import tqdm

    from diffx2ct.basics import UserError
    from diffx2ct.checkpoint import load_model
    from diffx2ct.evaluate import open_cases

    model = load_model(a.checkpoint_dir)
    pairs, file, digest = (
        open_cases(model, a.data),
        a.out / "sampling.json",
        hashlib.sha256(model.path.read_bytes()).hexdigest(),
    )
    if a.cases is not None and not 1 <= a.cases <= len(pairs):
        raise UserError(f"--cases {a.cases}: there are {len(pairs)}; take 1 to {len(pairs)}")
    old = json.loads(file.read_text()) if file.exists() else {}
    done = old["cases"] if old.get("model") == digest else {}
    d = model.config.DIFFUSION
    for i in tqdm(range(a.cases or len(pairs)), desc="sampling", unit="case", disable=None):
        if pairs.cases[i] in done:
            continue
        done[pairs.cases[i]] = one_case(model, pairs[i])
        ways, losses = summary(done)
        save(
            file,
            dict(
                model=digest,
                step=model.meta["step"],
                size=model.denoiser.A.size,
                geometry=model.denoiser.A.geometry.kind,
                sampler=d.SAMPLER,
                schedule=d.SCHEDULE,
                consistency=d.CONSISTENCY,
                protocol="unit",
                rows=ways,
                losses=losses,
                cases=done,
            ),
        )
    got = json.loads(file.read_text())
    print(
        f"{len(done)} cases, {d.SAMPLER} on the schedule {d.SCHEDULE}, consistency {d.CONSISTENCY}\n",
        table([r | {"PSNR, dB": f"{r['PSNR, dB']:.2f}"} for r in got["rows"]]),
        "",
        table(got["losses"]),
        sep="\n",
    )


if __name__ == "__main__":
    one_thread(main)
