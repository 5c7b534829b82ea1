"""Less work for the same volume: CPU time of one network evaluation and of one training step, against the original's
kind of network.

python benchmarks/speed/run.py                    both tables; about fifteen minutes
python benchmarks/speed/run.py --only optimizers  what Muon adds to a step of the demo network, at three sizes
python benchmarks/speed/run.py --edge 16 --repeats 1 --out /tmp/speed   a rehearsal

ours            the denoiser at width 32 with the channels 32, 64, 128, 256: the default U-Net (profile demo), the same
                with the two blocks a level of lidc128,
                and the demo as shipped (channels 32, 64, 96, 128). A step is everything a training step does, batch 1:
                the coarse network's answer and the
                consistent mean, encoder, lifting, forward, projection onto the views, loss, backward, AdamW. Parameters
                count the coarse network too
original style  the same blocks, wired as the original was: full resolution, two blocks per level, cross-attention on
                three levels and no other condition on the views, no planar level, no base, no projection
MONAI           DiffusionModelUNet, two blocks per level, self- and cross-attention at the lowest level, squared error.
                It needs einops; where that is missing the row is left out, saying so

Evaluation: the network once, its conditions known, as at each step of a sampler. All rows in turn, in bf16 autocast and
in single precision, CPU seconds of one thread, medians of --repeats rounds. The bars: an evaluation of ours at most
1/6 and a step at most 1/4 of the original's kind."""

import argparse
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import ORIGINAL, WIDTH32, config, cpu_seconds, network, one_thread, random_cases, save, table, training_step

ROWS = {
    "original style": ORIGINAL | {"TRAINING.COARSE_EPOCHS": [], "TRAINING.AUGMENT.SHARE": 0.0},
    "ours, width 32": WIDTH32,
    "ours, width 32, two blocks a level": WIDTH32 | {"MODEL.UNET.NUM_RES_BLOCKS": 2},
    "ours, demo as shipped": {},
}


def prepared(sets: dict, edge: int, amp: str) -> tuple:
    "Settings, network and a micro-batch of one whole case."
    import diffx2ct.batches as B

    c = config(
        "demo",
        {
            "DATA.TARGET_VOLUME_SIZE": edge,
            "DATA.TARGET_DRR_SIZE": edge,
            "TRAINING.PATCH_SIZE": edge,
            "BATCH_SIZE": 1,
            "TRAINING.AMP": amp,
            "DEVICES": "cpu",
        }
        | sets,
    )
    net = network(c)
    return c, net, B.Crops(Whole(random_cases(1, net)), [B.BatchPlan((0,), (0, 0, 0), 0)], c, True, net.A.mm)[0]


def denoiser(sets: dict, edge: int, amp: str) -> tuple:
    "Evaluation, step and parameters of a row made of settings."
    import torch

    from diffx2ct.diffusion import AMP

    c, net, item = prepared(sets, edge, amp)
    with torch.no_grad(), torch.autocast("cpu", AMP[amp], enabled=AMP[amp] is not None):
        base = net.prior(item[3], amp=AMP[amp])
        known = net.condition(base, net.encode(item[3]))
    x, t = torch.randn(base.shape), torch.ones(1)

    def evaluate():
        net.eval()
        with torch.no_grad(), torch.autocast("cpu", AMP[amp], enabled=AMP[amp] is not None):
            net(x, t, known)

    return evaluate, partial(training_step(net, c), [item]), sum(p.numel() for p in net.parameters())


class Whole(list):
    "Cases in memory, read as `Crops` reads a folder."

    def part(self, i, origin, patch):
        return self[i]


def monai(edge: int, amp: str) -> tuple:
    "The same of MONAI's network."
    import torch
    import torch.nn.functional as F
    from monai.networks.nets import DiffusionModelUNet

    from diffx2ct.diffusion import AMP

    net = DiffusionModelUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        num_res_blocks=2,
        channels=(32, 64, 128, 256),
        attention_levels=(False, False, False, True),
        norm_num_groups=8,
        num_head_channels=32,
        with_conditioning=True,
        cross_attention_dim=64,
    )
    optimizer, x, t, tokens = (
        torch.optim.AdamW(net.parameters(), 1e-4),
        torch.randn(1, 1, edge, edge, edge),
        torch.ones(1),
        torch.randn(1, 2 * max(1, edge // 16) ** 2, 64),
    )

    def forward():
        with torch.autocast("cpu", AMP[amp], enabled=AMP[amp] is not None):
            return net(x, t, tokens)

    def evaluate():
        net.eval()
        with torch.no_grad():
            forward()

    def step():
        net.train()
        F.mse_loss(forward().float(), x).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return evaluate, step, sum(p.numel() for p in net.parameters())


def measure(edge: int, amp: str, repeats: int) -> list[dict]:
    "All rows in one precision."
    made = {name: denoiser(sets, edge, amp) for name, sets in ROWS.items()}
    try:
        made["MONAI DiffusionModelUNet"] = monai(edge, amp)
    except ImportError as e:
        print(f"MONAI's network is left out: {e}", file=sys.stderr)
    spent = cpu_seconds(
        {(name, what): call for name, (*calls, _) in made.items() for what, call in zip(("evaluation", "step"), calls)},
        repeats,
    )
    first = next(iter(made))
    return [
        {
            "network": name,
            "precision": "bf16" if amp == "bf16" else "single",
            "parameters": n,
            "evaluation, CPU s": spent[name, "evaluation"],
            "of the original's": spent[name, "evaluation"] / spent[first, "evaluation"],
            "step, CPU s": spent[name, "step"],
            "of the original's step": spent[name, "step"] / spent[first, "step"],
        }
        for name, (_, _, n) in made.items()
    ]


def optimizers(edge: int, repeats: int) -> list[dict]:
    "CPU seconds of a whole training step, batch 1, and of the optimizer alone, at half, once and twice the edge."
    import torch

    from diffx2ct.optimizer import make_optimizer

    rows = []
    for size in (e for e in (edge // 2, edge, 2 * edge) if e >= 16):  # four levels need 16 voxels
        work = {}
        for name in ("adamw", "muon"):
            c, net, item = prepared({"TRAINING.OPTIMIZER": name}, size, "bf16")
            work[name, "step"] = partial(training_step(net, c), [item])
            alone = network(c)
            for p in alone.parameters():
                p.grad = torch.randn_like(p)
            work[name, "optimizer"] = make_optimizer(alone, c).step
        spent = cpu_seconds(work, repeats)
        rows += [
            {
                "edge": size,
                "optimizer": name,
                "step, CPU s": spent[name, "step"],
                "optimizer alone, CPU s": spent[name, "optimizer"],
                "share of its step": spent[name, "optimizer"] / spent[name, "step"],
            }
            for name in ("adamw", "muon")
        ]
    return rows


def main(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--edge", type=int, default=64, help="voxels along an edge (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    p.add_argument("--only", choices=("networks", "optimizers"), help="one of the two tables")
    p.add_argument(
        "--out",
        type=Path,
        default=HERE / "results",
        help="speed.json and optimizers.json go there (default: %(default)s)",
    )
    a = p.parse_args(argv)
    from diffx2ct.diffusion import has_native_bf16

    if not has_native_bf16():
        print("this machine has no bf16 units: both precisions are single", file=sys.stderr)
    if a.only != "optimizers":
        rows = [r for amp in ("bf16", "off") for r in measure(a.edge, amp, a.repeats)]
        save(a.out / "speed.json", dict(edge=a.edge, repeats=a.repeats, differs=ROWS, rows=rows))
        print(table(rows))
    if a.only != "networks":
        rows = optimizers(a.edge, a.repeats)
        save(a.out / "optimizers.json", dict(edge=a.edge, repeats=a.repeats, rows=rows))
        print(table(rows))


if __name__ == "__main__":
    one_thread(main)
