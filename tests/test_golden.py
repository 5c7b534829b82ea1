"""Outputs, losses and gradients of networks whose weights are all other than zero stay what they were.

A new network ends in layers of zeros, so a run of a few steps sees little of what lies before them. Here every weight
is drawn, and each setting that changes how the parts are joined has a case of its own. `python tests/test_golden.py`
writes golden_outputs.json again; do that only where a change of the numbers is meant, and state why.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from diffx2ct.batches import BatchPlan
from diffx2ct.config import load_config
from diffx2ct.data import Case
from diffx2ct.diffusion import build_denoiser
from diffx2ct.drr import geometry
from diffx2ct.phantom import phantom
from diffx2ct.reconstruct import reconstruct
from diffx2ct.train import Loss

NUMBERS = Path(__file__).with_name("golden_outputs.json")
TINY = [
    "DATA.TARGET_VOLUME_SIZE=16",
    "DATA.TARGET_DRR_SIZE=16",
    "MODEL.UNET.NUM_CHANNELS=[8, 16]",
    "MODEL.UNET.ATTENTION_LEVELS=[false, true]",
    "MODEL.UNET.CROSS_ATTENTION_LEVELS=[false, true]",
    "MODEL.UNET.PLANAR_LEVELS=1",
    "MODEL.CONDITIONING_ENCODER={NUM_CHANNELS: 8, OUTPUT_DIM: 16}",
    "TRAINING.PATCH_SIZE=16",
    "TRAINING.AMP=off",
    "TRAINING.FULL_NOISE_RATIO=0.5",
    "TRAINING.LOSS_WEIGHTS={L1: 1, SSIM: 0.5, FOURIER: 0.5, PROJECTION: 0.5}",
    "DIFFUSION.STEPS=3",
    "DEVICES=cpu",
]
SMALL = ["TRAINING.PATCH_SIZE=8", "TRAINING.LOSS_WEIGHTS={L1: 1, SSIM: 0.5, FOURIER: 0.5}"]  # windows
CASES: dict[str, list[str]] = (
    {"as it is": []}
    | {f"encoder {e}": [f"TRAINING.ENCODER={e}"] for e in ("convnext", "efficientnet")}
    | {f"lift {lift}": [f"MODEL.CONDITIONING_ENCODER.LIFT={lift}"] for lift in ("add", "none")}
    | {f"schedule {s}": [f"DIFFUSION.SCHEDULE={s}"] for s in ("cosine", "linear")}
    | {f"prediction {p}": [f"DIFFUSION.PREDICTION={p}"] for p in ("v", "eps")}
    | {f"sampler {s}": [f"DIFFUSION.SAMPLER={s}"] for s in ("ddpm", "euler", "heun", "dpm++")}
    | {f"blend {b}": [*SMALL, f"DIFFUSION.BLEND={b}"] for b in ("constant", "gaussian", "cosine")}
    | {f"consistency {m}": [f"DIFFUSION.CONSISTENCY={m}"] for m in ("soft", "off")}
    | {f"base {b}": [f"MODEL.BASE={b}"] for b in ("mean", "none")}
    | {
        "full resolution": ["MODEL.UNET.HALF_RESOLUTION=false"],
        "no planar levels": ["MODEL.UNET.PLANAR_LEVELS=0"],
        "two blocks": ["MODEL.UNET.NUM_RES_BLOCKS=2"],
        "no attention": ["MODEL.UNET.ATTENTION_LEVELS=[false, false]"],
        "cross-attention everywhere": ["MODEL.UNET.CROSS_ATTENTION_LEVELS=[true, true]"],
        "cone": ["DATA.GEOMETRY=x2ct"],
        "a coarse stage": ["TRAINING.COARSE_EPOCHS=[1]"],
        "twice the channels": ["MODEL.SCALE=2"],
    }
)


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def summary(x: torch.Tensor, seed: int) -> list[float]:
    "Norm, and the products with three drawn directions, each as a share of what chance gives."
    x = x.detach().double().flatten()
    return [x.norm().item(), *(drawn((3, len(x)), seed).double() @ x).tolist()]


def numbers(name: str) -> dict[str, list[float]]:
    "Compute the numbers of a case: an expected volume, a sample, loss terms, gradients."
    torch.set_num_threads(1)
    c = load_config(sets=[*TINY, *CASES[name]])
    net = build_denoiser(c, geometry(c.DATA.GEOMETRY, 320), 20.0, True).eval()
    for k, (parameter, p) in enumerate(sorted(net.named_parameters())):
        fan = max(1, p[0].numel())
        p.data = drawn(tuple(p.shape), k) * (0.3 if p.ndim == 1 else 1 / math.sqrt(fan)) + (p.ndim == 1) * 0.1
        assert p.data.count_nonzero() == p.numel(), parameter
    cases = []
    for i in range(2):
        unit = ((phantom(i, 16, 20.0)[0] + 1024) / 2524).clamp(0, 1)[None, None]
        cases.append(Case(f"p{i}", unit[0], net.A(1 + (unit * 2524 - 1024) / 1000)[0]))
    for part in (net, net.coarse):
        if part is not None:
            size = part.A.size
            volume = torch.nn.functional.interpolate(cases[0].volume[None], size=(size,) * 3)
            part.mean.copy_(0.9 * volume + 0.05)
            part.usual.copy_(torch.nn.functional.interpolate(cases[0].views[None], size=(part.A.pixels,) * 2)[0])
            part.scales.copy_(torch.linspace(0.02, 0.1, len(part.scales)))
    views, patch = cases[1].views, c.TRAINING.PATCH_SIZE
    out = {}
    with torch.no_grad():
        for k, method in enumerate(("expected", "sample")):
            torch.manual_seed(0)
            out[method] = summary(reconstruct(net, views, method, c.DIFFUSION, patch=patch), 100 + k)
    net.train()
    loss, truth = Loss(net, c), torch.stack([case.volume for case in cases])[..., :patch, :patch, :patch]
    item = (BatchPlan((0, 1), (0, 0, 0), 5), None, truth, torch.stack([case.views for case in cases]), None)
    weights = {k: v for k, v in c.TRAINING.LOSS_WEIGHTS.model_dump().items() if v}
    terms = loss(item, weights)
    out["losses"] = [terms[k].item() for k in sorted(terms)]
    sum(weights[k] * v for k, v in terms.items()).backward()
    for part in ("unet", "encoder"):
        grads = [p.grad for _, p in sorted(getattr(net, part).named_parameters()) if p.grad is not None]
        out[f"gradient of {part}"] = summary(torch.cat([g.flatten() for g in grads]), 200) if grads else []
    return out


QUICK = {"as it is", "encoder convnext", "lift add", "blend gaussian", "cone", "a coarse stage"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_the_numbers_of_a_network_of_drawn_weights(name):
    "To 1e-4 of the norm, since other processors take sums in another order."
    want, got = json.loads(NUMBERS.read_text())[name], numbers(name)
    assert got.keys() == want.keys()
    for what, values in want.items():
        assert got[what] == pytest.approx(values, rel=1e-4, abs=1e-4 * max(map(abs, values), default=1)), what


def test_every_case_has_numbers_of_its_own():
    "A setting without effect on what is computed would be one that nobody reads."
    kept = json.loads(NUMBERS.read_text())
    assert kept.keys() == CASES.keys()
    assert len({json.dumps(v) for v in kept.values()}) == len(kept)
    assert all(v["gradient of unet"] and v["gradient of unet"][0] > 1e-6 for v in kept.values())


if __name__ == "__main__":
    found = {name: {k: [float(f"{x:.8g}") for x in v] for k, v in numbers(name).items()} for name in CASES}
    NUMBERS.write_text(json.dumps(found, indent=1) + "\n")
