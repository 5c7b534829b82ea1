"""Measure the memory of a training step: by option, and by volume from 32^3 to a whole 256^3 at batch 1.

python benchmarks/memory/run.py                     every case that is not there yet, one at a time; then the tables
python benchmarks/memory/run.py --only volume       cases whose name holds a word
python benchmarks/memory/run.py --list              what there is and what is missing; runs nothing

options   the U-Net of width 32 at 64^3: checkpointed blocks, half-resolution input and bf16, each off and on
volume    the network of the profile lidc256 as shipped, its crop the whole volume, from 32^3 to 256^3; and a U-Net in
          the original's style

Each case is one training step (read, augment, render, forward, loss, backward, AdamW) in a process of its own. `peak`
is the largest resident memory of that
process less what it held before the network was built, so it contains weights, gradients and optimizer: 16 bytes a
parameter, which the next column leaves out. `saved` is what autograd keeps for the backward
pass, by `SavedBytes` of chapter 02. A case is one file in results/; the 256^3 step takes minutes and 10 GB."""

import argparse
import json
import resource
import subprocess
import sys
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import ORIGINAL, WIDTH32, config, network, one_thread, random_cases, save, table

ONE = {
    "BATCH_SIZE": 1,
    "TRAINING.GRADIENT_ACCUMULATION_STEPS": 1,
    "TRAINING.COARSE_EPOCHS": [],
    "TRAINING.AUGMENT.SHARE": 1.0,
    "DEVICES": "cpu",
}


def cases() -> dict[str, tuple[str, int, dict]]:
    "Name -> profile, edge in voxels, settings that differ."
    out = {}
    for checkpointing, half, bf16 in product((False, True), (False, True), (False, True)):
        out[
            f"options checkpointing {'on' if checkpointing else 'off'}, half resolution "
            f"{'on' if half else 'off'}, bf16 {'on' if bf16 else 'off'}"
        ] = (
            "demo",
            64,
            WIDTH32
            | {
                "MODEL.UNET.CHECKPOINTING": checkpointing,
                "MODEL.UNET.HALF_RESOLUTION": half,
                "TRAINING.AMP": "bf16" if bf16 else "off",
            },
        )
    for edge in (32, 64):
        out[f"volume original style {edge}"] = ("demo", edge, ORIGINAL | {"TRAINING.AMP": "off"})
    for edge in (32, 64, 96, 128, 192, 256):
        out[f"volume lidc256 {edge}"] = ("lidc256", edge, {})
    return out


def file(out: Path, name: str) -> Path:
    return out / f"{name.replace(',', '').replace(' ', '_')}.json"


def measure(name: str, profile: str, edge: int, sets: dict, out: Path) -> None:
    "In a process of its own: one training step; writes its result."
    import time

    import torch

    import diffx2ct.batches as B
    import diffx2ct.train as T
    from diffx2ct.diffusion import AMP, phase_weights
    from diffx2ct.unet import SavedBytes

    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    c = config(
        profile,
        ONE | {"DATA.TARGET_VOLUME_SIZE": edge, "DATA.TARGET_DRR_SIZE": edge, "TRAINING.PATCH_SIZE": edge} | sets,
    )
    before, net = peak(), network(c)
    net.train()
    crops = B.Crops(random_cases(1, net), [B.BatchPlan((0,), (0, 0, 0), 0)], c, True, net.A.mm)
    optimizer, scaler = torch.optim.AdamW(net.parameters(), 1e-4), torch.amp.GradScaler("cpu", enabled=False)
    start = time.process_time()
    log = T.train_step(
        T.Loss(net, c), c, [crops[0]], c.EPOCHS - 1, optimizer, scaler, []
    )  # of the last phase, whose losses keep most
    seconds, top = time.process_time() - start, peak()
    weights = phase_weights(c.EPOCHS - 1, c.TRAINING.LOSS_PHASE_EPOCHS, c.TRAINING.LOSS_WEIGHTS.model_dump())
    with SavedBytes(net) as saved:
        T.Loss(net, c)(crops[0], weights)  # after the peak was read: it holds on to all it counts
    n = sum(p.numel() for p in net.parameters())
    save(
        file(out, name),
        dict(
            name=name,
            profile=profile,
            edge=edge,
            sets=sets,
            parameters=n,
            peak_bytes=top - before,
            before_bytes=before,
            work_bytes_per_voxel=(top - before - 16 * n) / edge**3,
            saved_bytes=saved.bytes,
            saved_bytes_per_voxel=saved.bytes / edge**3,
            cpu_seconds=round(seconds, 2),
            loss=log["loss"],
            bf16=AMP[c.TRAINING.AMP] is not None,
        ),
    )


def summary(out: Path) -> str:
    "Tables of what is there."
    got = {n: json.loads(p.read_text()) for n in cases() if (p := file(out, n)).exists()}
    said = []
    for kind in ("options", "volume"):
        mine = [r for n, r in got.items() if n.startswith(kind)]
        if not mine:
            continue
        said += [
            table(
                [
                    {
                        kind: r["name"].removeprefix(f"{kind} ") + ("^3" if kind == "volume" else ""),
                        "parameters": r["parameters"],
                        "saved, bytes a voxel": r["saved_bytes_per_voxel"],
                        "peak, MB": r["peak_bytes"] / 1e6,
                        "peak without weights, bytes a voxel": r["work_bytes_per_voxel"],
                        "of the first": r["work_bytes_per_voxel"] / mine[0]["work_bytes_per_voxel"],
                        "CPU s a step": r["cpu_seconds"],
                    }
                    for r in mine
                ]
            ),
            "",
        ]
    return "\n".join(said)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose name holds all of these words")
    p.add_argument(
        "--out", type=Path, default=HERE / "results", help="results, one file per case (default: %(default)s)"
    )
    p.add_argument("--list", action="store_true", help="list the results that exist and those that are missing")
    p.add_argument("--case", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.case:
        return one_thread(lambda _: measure(a.case, *cases()[a.case], a.out))
    there = lambda n: file(a.out, n).exists()
    wanted = [n for n in cases() if all(w in n for w in a.only)]
    if not wanted:
        p.error(f"no case holds {' and '.join(a.only)}; --list names them")
    if a.list:
        return print(*(f"{'there  ' if there(n) else 'missing'} {n}" for n in wanted), sep="\n")
    good = True
    for name in wanted:
        if there(name):
            continue
        done = (
            subprocess.run(
                [sys.executable, __file__, "--case", name, "--out", a.out], stdin=subprocess.DEVNULL
            ).returncode
            == 0
        )
        good &= done
        print(f"{'done  ' if done else 'FAILED'} {name}", file=sys.stderr, flush=True)
    print(summary(a.out))
    sys.exit(not good)


if __name__ == "__main__":
    main()
