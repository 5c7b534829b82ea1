"""The wiring of the networks and the numbers of the physics, with weights that are all non-zero.

Untrained networks begin with last layers of zeros, which hide everything before them. Here every weight is drawn from
its name, so that each connection shows in the output. Outputs are compared with stored numbers (`wiring.json`; after an
intended change `python tests/test_wiring.py` writes them again), and with an independent formulation wherever there is
one."""

import itertools
import json
import math
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffx2ct import (
    augment,
    checkpoint,
    consistency,
    diffusion,
    drr,
    encoder,
    lesions,
    metrics,
    parallel,
    pipeline,
    unet,
)
from diffx2ct import ranks as groups
from diffx2ct.basics import UserError
from diffx2ct.config import AugmentConfig, load_config
from diffx2ct.data import density, to_hu
from diffx2ct.phantom import LABELS

STORED = Path(__file__).with_name("wiring.json")
WINDOW = (-1024.0, 1500.0)
TINY = [
    "DATA.TARGET_VOLUME_SIZE=16",
    "DATA.TARGET_DRR_SIZE=16",
    "TRAINING.PATCH_SIZE=16",
    "MODEL.UNET.NUM_CHANNELS=[8, 16]",
    "MODEL.UNET.ATTENTION_LEVELS=[false, true]",
    "MODEL.UNET.CROSS_ATTENTION_LEVELS=[true, true]",
    "MODEL.UNET.PLANAR_LEVELS=1",
    "MODEL.UNET.NUM_RES_BLOCKS=2",
    "MODEL.CONDITIONING_ENCODER.NUM_CHANNELS=8",
    "MODEL.CONDITIONING_ENCODER.OUTPUT_DIM=8",
]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    "Gaussian numbers that are the same in every release of torch and on every CPU."
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape)).float()


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([seed, *shape]).uniform(size=shape)).float()


def weigh(module: nn.Module) -> nn.Module:
    "Fill every weight with numbers that depend on its name alone, none of them zero."
    for name, p in module.named_parameters():
        r = np.random.default_rng(list(name.encode())).standard_normal(tuple(p.shape))
        if p.ndim > 1:
            r *= 0.5 if name.endswith("place") else np.prod(p.shape[1:]) ** -0.5
        else:
            r = r * 0.1 + (name.endswith("weight"))
        p.data = torch.from_numpy(r).float()
    return module.eval()


def geometry_of(kind: str, side: float = 320.0) -> drr.Geometry:
    return drr.Geometry("cone", 400.0, 620.0, 460.0) if kind == "near" else drr.geometry(kind, side)


@cache
def denoiser(*sets: str, kind: str = "parallel", line_integrals: bool = True) -> diffusion.Denoiser:
    "A small denoiser with non-zero weights, mean, mean views and scales."
    net = diffusion.build_denoiser(load_config(sets=[*TINY, *sets]), geometry_of(kind), 20.0, line_integrals)
    for part in (net, net.coarse) if net.coarse else (net,):
        n = part.A.size
        part.mean.copy_((0.35 + 0.1 * noise(1, 1, n, n, n, seed=1)).clamp(0, 1))
        part.usual.copy_(part.A(density(part.mean, WINDOW))[0] if line_integrals else uniform(2, n, n, seed=2))
        part.scales.copy_(torch.tensor([0.07, 0.19]))
    return weigh(net)


@cache
def case(kind: str = "parallel", n: int = 2, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    "Volumes and their views: two soft balls in air, another pair for each."
    c = drr.cell_centres(size, 320 / size)
    z, y, x = torch.meshgrid(c, c, c, indexing="ij")
    ball = lambda d, h, w, r: torch.sigmoid((r - ((z - d) ** 2 + (y - h) ** 2 + (x - w) ** 2).sqrt()) / 8)
    volumes = torch.stack(
        [0.4 * ball(20 + 9 * k, -10, 30, 90) + 0.3 * ball(-30, 25 - 30 * k, -40, 35) for k in range(n)]
    )
    A = drr.Projector(geometry_of(kind), size, 320 / size, size)
    return volumes[:, None], A(density(volumes[:, None], WINDOW))


# ---------------------------------------------------------------------------------------------------- stored numbers
def fingerprint(x: torch.Tensor) -> list[float]:
    "Root mean square, and four weighted means whose weights are fixed noise."
    v = x.detach().double().flatten().numpy()
    probes = np.random.default_rng(7).standard_normal((4, v.size))
    return [float(np.sqrt((v * v).mean())), *(probes @ v / math.sqrt(v.size)).tolist()]


def encoded(kind: str) -> torch.Tensor:
    net = weigh(encoder.Encoder(kind, [8, 16], 16, 8, 8))
    maps, tokens = net(noise(2, 2, 16, 16))
    return torch.cat([v.flatten() for v in (*maps, tokens)])


def network(
    lift: str = "modulate", half: bool = True, planar: int = 1, attention=(False, True), cross=(True, True), **kw
):
    return weigh(unet.UNet(2, 4, [8, 16], attention, cross, planar, 2, lift, 8, half, emb=16, **kw))


def inputs(net: unet.UNet, size: int = 8) -> tuple:
    first = 2 if net.at_half else 1
    lifted = [noise(2, c, *(size // first // 2**i,) * 3, seed=i) for i, c in enumerate((8, 16))]
    return noise(2, 6, size, size, size), torch.tensor([0.2, 0.9]), lifted, noise(2, 5, 8)


def through(**how) -> torch.Tensor:
    net = network(**how)
    return net(*inputs(net))


def denoised(t: float, *sets: str, base: str = "on", **how) -> torch.Tensor:
    "One evaluation of the whole denoiser, conditioned on two cases."
    net = denoiser(*sets, **how)
    views = case(how.get("kind", "parallel"))[1]
    if not net.line_integrals:
        views = drr.to_display(views)[0]
    start = net.prior(views, base)
    return net(noise(2, 1, 16, 16, 16), torch.tensor([t, t]), net.condition(start, net.encode(views)))


def based(*sets: str, how: str = "on", **kw) -> torch.Tensor:
    return denoiser(*sets, **kw).prior(case(kw.get("kind", "parallel"))[1], how)


def sampled(*sets: str, method: str = "sample", patch: int = 16, **kw) -> torch.Tensor:
    from diffx2ct.reconstruct import reconstruct

    c = load_config(sets=[*TINY, "DIFFUSION.STEPS=3", *sets])
    net = denoiser(*[s for s in sets if s.startswith(("MODEL", "TRAINING", "DIFFUSION.SCH", "DIFFUSION.PRE"))], **kw)
    return reconstruct(net, case(kw.get("kind", "parallel"))[1][0], method, c.DIFFUSION, 2, 3, patch)


def lost(term: str) -> torch.Tensor:
    A = denoiser().A
    return diffusion.loss_terms(
        uniform(2, 1, 16, 16, 16), uniform(2, 1, 16, 16, 16, seed=1), torch.tensor([0.1, 0.3]), {term: 1.0}, A
    )[term]


def cone(kind: str, pixels: int = 12) -> torch.Tensor:
    A = drr.Projector(geometry_of(kind), 8, 40.0, pixels)
    return torch.cat([A(uniform(1, 1, 8, 8, 8)).flatten(), A.adjoint(uniform(1, 2, pixels, pixels)).flatten()])


def solved(kind: str, **how) -> torch.Tensor:
    A = drr.Projector(geometry_of(kind), 16, 20.0, 16)
    return consistency.alternating_projections(torch.full((2, 1, 16, 16, 16), 0.2), case(kind)[1], A, WINDOW, 4, **how)


ANSWERS = (
    {f"encoder {k}": partial(encoded, k) for k in encoder.ENCODER_BLOCKS}
    | {f"drr {k}": partial(cone, k) for k in ("parallel", "x2ct", "near")}
    | {f"drr wide pixels {k}": partial(cone, k, 5) for k in ("parallel", "near")}
    | {
        f"consistency {k} {name}": partial(solved, k, **how)
        for k in ("parallel", "near")
        for name, how in dict(
            on={}, soft=dict(damping=0.3), momentum=dict(momentum=True), noise=dict(noise=0.2)
        ).items()
    }
    | {
        f"unet {lift} {'half' if h else 'full'}": partial(through, lift=lift, half=h)
        for lift in ("modulate", "add", "none")
        for h in (True, False)
    }
    | {f"unet planar {n}": partial(through, planar=n) for n in (0, 2)}
    | {
        f"unet attention {a} {c}": partial(through, attention=(a,) * 2, cross=(c,) * 2)
        for a in (False, True)
        for c in (False, True)
    }
    | {
        f"diffusion {s} {p} t={t}": partial(denoised, t, f"DIFFUSION.SCHEDULE={s}", f"DIFFUSION.PREDICTION={p}")
        for s in ("flow", "cosine", "linear")
        for p in ("x0", "v", "eps")
        for t in (0.35, 1.0)
    }
    | {f"diffusion cone {k}": partial(denoised, 0.6, kind=k) for k in ("x2ct", "near")}
    | {f"diffusion lift {k}": partial(denoised, 0.6, f"MODEL.CONDITIONING_ENCODER.LIFT={k}") for k in ("add", "none")}
    | {f"diffusion encoder {k}": partial(denoised, 0.6, f"TRAINING.ENCODER={k}") for k in ("convnext", "efficientnet")}
    | {"diffusion display": partial(denoised, 0.6, line_integrals=False)}
    | {f"diffusion base {b}": partial(based, f"MODEL.BASE={b}") for b in ("consistent_mean", "mean", "none")}
    | {f"diffusion base {how}": partial(based, how=how) for how in ("soft", "off")}
    | {"diffusion coarse": partial(based, "TRAINING.COARSE_EPOCHS=[2]", "TRAINING.FLIP_AXES=[D, W]")}
    | {f"diffusion loss {k}": partial(lost, k) for k in ("L1", "L2", "SSIM", "FOURIER", "PROJECTION")}
    | {
        f"diffusion sampler {s} {schedule}": partial(
            sampled, f"DIFFUSION.SAMPLER={s}", f"DIFFUSION.SCHEDULE={schedule}", "DIFFUSION.CONSISTENCY=off"
        )
        for s in diffusion.SAMPLERS
        for schedule in ("flow", "cosine", "linear")
    }
    | {
        f"reconstruct {m} {how}": partial(sampled, f"DIFFUSION.CONSISTENCY={how}", method=m, kind="near")
        for m in ("expected", "sharp", "sample", "mean_of_k")
        for how in ("on", "soft", "off")
    }
    | {
        f"reconstruct {b}": partial(sampled, f"DIFFUSION.BLEND={b}", "DIFFUSION.OVERLAP=0.5", patch=8)
        for b in ("constant", "gaussian", "cosine")
    }
)


def close(got: list[float], want: list[float]) -> None:
    "Within 1e-4 of the size of the numbers."
    assert np.isfinite(got).all() and np.abs(np.subtract(got, want)).max() < 1e-4 * max(abs(v) for v in want), (
        got,
        want,
    )


@pytest.mark.parametrize("name", ANSWERS)
def test_stored(name):
    with torch.no_grad():
        close(fingerprint(ANSWERS[name]()), json.loads(STORED.read_text())[name])


def test_the_stored_answers_differ_from_each_other():
    "A setting without effect would give the same numbers twice; three mathematical identities do."
    stored = json.loads(STORED.read_text())
    assert stored.keys() == ANSWERS.keys()

    def kind(name: str) -> str:
        if name.endswith("t=1.0"):
            return name.split()[2]  # at full noise the schedules are one
        return {
            "diffusion sampler euler flow": "diffusion sampler ddim flow",
            "diffusion base off": "diffusion base consistent_mean",
        }.get(name, name)

    for a, b in itertools.combinations(stored, 2):
        apart = np.abs(np.subtract(stored[a], stored[b])).max() / stored[a][0]
        assert apart < 1e-4 if kind(a) == kind(b) else apart > 1e-3, (a, b)


# ------------------------------------------------------------------------------------------------------ the projector
def dense(A: drr.Projector) -> torch.Tensor:
    "A as a matrix (rays, voxels), column by column."
    n = A.size
    return A(torch.eye(n**3).view(-1, 1, n, n, n)).flatten(1).T


def test_drr_fourier_slice():
    "Parallel beams: the transform of a view is the central slice of the volume's transform."
    A, rho = drr.Projector(geometry_of("parallel"), 16, 20.0, 16), uniform(1, 1, 16, 16, 16)
    views, spectrum = torch.fft.fft2(A(rho)[0]), torch.fft.fftn(rho[0, 0]) * 20
    torch.testing.assert_close(views[0], spectrum[:, 0, :], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(views[1], spectrum[:, :, 0], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", ["x2ct", "near"])
def test_drr_cone_beam_through_a_gaussian(kind):
    "The line integral of a Gaussian blob off the axis is known in closed form, at every pixel."
    g, n, pixels, sigma = geometry_of(kind), 48, 64, 26.0
    c, mm = drr.cell_centres(n, 320 / n), 320 / n
    at = torch.tensor([48.0, 30.0, -36.0])  # D, H, W, mm
    square = [(c - a) ** 2 for a in at]
    rho = torch.exp(-(square[0][:, None, None] + square[1][:, None] + square[2]) / (2 * sigma**2))
    got = drr.Projector(g, n, mm, pixels)(rho[None, None])[0]
    u = (torch.arange(pixels) - (pixels - 1) / 2) * g.panel_mm / pixels
    rows, columns = torch.meshgrid(u, u, indexing="ij")
    for view, (depth, across) in enumerate(((1, 2), (2, 1))):
        source = torch.zeros(pixels, pixels, 3)
        source[..., depth] = -g.sad_mm  # the detector stands at + (SDD - SAD)
        pixel = torch.zeros(pixels, pixels, 3)
        pixel[..., 0], pixel[..., across], pixel[..., depth] = rows, columns, g.sdd_mm - g.sad_mm
        ray = F.normalize(pixel - source, dim=-1)
        off = at - source
        distance = (off - (off * ray).sum(-1, keepdim=True) * ray).norm(dim=-1)
        want = math.sqrt(2 * math.pi) * sigma * torch.exp(-(distance**2) / (2 * sigma**2))
        assert (got[view] - want).abs().max() < 0.015 * want.max(), view
        assert abs(got[view].sum() / want.sum() - 1) < 0.002, view


def test_drr_readers_interpolate_or_average():
    "A reader between two cells reads both; one wider than a cell reads all it covers, as a triangle of area one."
    at = torch.tensor([0.0, 2.5])  # cells at -15, -5, 5, 15
    assert drr.hat_matrix(at, 4, 10.0).tolist() == [[0, 0.5, 0.5, 0], [0, 0.25, 0.75, 0]]
    wide = drr.hat_matrix(at, 4, 10.0, 20.0)
    assert wide.tolist() == [[0.125, 0.375, 0.375, 0.125], [0.0625, 0.3125, 0.4375, 0.1875]]
    A, slab = drr.Projector(geometry_of("parallel"), 16, 20.0, 4), torch.zeros(1, 1, 16, 16, 16)
    slab[..., 3] = 1  # four voxels to a pixel, and each gives a share to two
    torch.testing.assert_close(A(slab)[0, 0, 1:3].sum(1), torch.full((2,), 16 * 20.0 / 4))
    torch.testing.assert_close(A(slab)[0, 1, 1:3, 1:3], torch.full((2, 2), 20.0))


@pytest.mark.parametrize("kind", ["parallel", "x2ct", "near"])
def test_drr_adjoint_is_the_transpose(kind):
    A = drr.Projector(geometry_of(kind), 8, 40.0, 10)
    y = uniform(1, 2, 10, 10)
    torch.testing.assert_close(A.adjoint(y).flatten(), dense(A).T @ y.flatten(), rtol=1e-4, atol=1e-3)
    rays = (dense(A).abs().sum(0) / 40).view(8, 8, 8)
    torch.testing.assert_close(drr.ray_density(A)[0, 0], rays, rtol=1e-4, atol=1e-4)


def test_drr_presets_in_millimetres():
    assert drr.geometry("x2ct", 300.0) == drr.Geometry("cone", 541.0, 949.0, 500.0)
    assert drr.geometry("x2ct_scaled", 160.0) == drr.Geometry("cone", 270.5, 474.5, 250.0)
    assert drr.geometry("parallel", 300.0) == drr.Geometry("parallel", 0.0, 0.0, 300.0)
    near = drr.Geometry("cone", 500.0, 1000.0, 400.0)
    assert near.zoom(torch.tensor([-100.0, 0.0, 100.0])).tolist() == pytest.approx([0.4, 0.5, 0.6])


@pytest.mark.parametrize("sad, sdd", [(150, 600), (160, 600), (300, 450), (300, 459)])
def test_drr_source_or_detector_inside_the_cube(sad, sdd):
    with pytest.raises(UserError, match="inside the 320 mm cube"):
        drr.geometry(dict(kind="cone", sad_mm=float(sad), sdd_mm=float(sdd), panel_mm=400.0), 320.0)
    drr.geometry(dict(kind="cone", sad_mm=300.0, sdd_mm=460.0, panel_mm=400.0), 320.0)


def test_drr_coverage_counts_the_beams():
    "A narrow panel: the shadow of each voxel, one by one."
    g, n, mm = drr.Geometry("cone", 300.0, 600.0, 380.0), 8, 40.0
    c = ((np.arange(n) - 3.5) * mm).tolist()
    want = torch.zeros(n, n, n, dtype=torch.int32)
    for d, h, w in itertools.product(range(n), repeat=3):
        for depth, across in ((c[h], c[w]), (c[w], c[h])):
            zoom = (300 + depth) / 600
            want[d, h, w] += abs(c[d] / zoom) <= 190 and abs(across / zoom) <= 190
    assert sorted(want.unique().tolist()) == [0, 1, 2]
    assert torch.equal(drr.coverage(g, n, mm)[0, 0], want)
    assert torch.equal(drr.coverage(g, n, mm, (2, 0, 4), 4)[0, 0], want[2:6, :4, 4:])


def test_drr_display_images():
    y = uniform(2, 2, 4, 4) * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    image, scale = drr.to_display(y)
    assert torch.equal(scale, y.amax((-2, -1))) and torch.equal(image.amax((-2, -1)), torch.ones(2, 2))
    torch.testing.assert_close(drr.from_display(image, scale), y)


# ------------------------------------------------------------------------------------------------ data consistency
def damped(A: drr.Projector, x: torch.Tensor, y: torch.Tensor, damping: float) -> torch.Tensor:
    "The damped projection by a dense matrix; the mean eigenvalue is trace(A A^T) / rays of parallel beams."
    M = dense(A).double()
    G = M @ M.T
    eigenvalue = G.trace() / len(G) if A.geometry.kind == "parallel" else A.size * A.mm**2
    r = y.flatten().double() - M @ density(x, WINDOW).flatten().double()
    z = torch.linalg.pinv(G + damping * eigenvalue * torch.eye(len(G)), rtol=1e-9) @ r
    return x + (M.T @ z).float().view_as(x) * (1000 / (WINDOW[1] - WINDOW[0]))


@pytest.mark.parametrize("kind", ["parallel", "near"])
@pytest.mark.parametrize("damping", [0.0, 0.3, 1.0])
def test_consistency_is_the_dense_solution(kind, damping):
    A = drr.Projector(geometry_of(kind), 8, 40.0, 8)
    x, y = uniform(1, 1, 8, 8, 8), A(density(uniform(1, 1, 8, 8, 8, seed=1), WINDOW))
    got = consistency.project_onto_views(x, y, A, WINDOW, steps=60, damping=damping)
    torch.testing.assert_close(got, damped(A, x, y, damping), rtol=1e-3, atol=2e-3)
    left = lambda v: consistency.projection_residual(v, y, A, WINDOW).item()
    assert left(got) < left(x) and (left(got) < 1e-3) == (damping == 0)


def test_consistency_damping_weakens_by_its_amount():
    "Parallel beams, one view alone: every eigenvalue is the mean one, and a step goes 1 / (1 + damping) of the way."
    A = drr.Projector(geometry_of("parallel"), 8, 40.0, 8)
    r = torch.zeros(1, 2, 8, 8)
    r[0, 0] = uniform(8, 8) - 0.5
    r[0, 0] -= r[0, 0].mean(1, keepdim=True)  # no part that the other view sees
    for damping in (0.0, 0.3, 2.0):
        z = consistency.solve_views(A, r, 20, damping=damping)
        torch.testing.assert_close(z * 8 * 40.0**2 * (1 + damping), r, rtol=1e-4, atol=1e-5)


def test_consistency_default_steps_and_the_stop():
    A, cases = drr.Projector(geometry_of("near"), 8, 40.0, 8), uniform(2, 1, 8, 8, 8)
    y, start = A(density(cases, WINDOW)), torch.full((2, 1, 8, 8, 8), 0.2)
    assert torch.equal(
        consistency.project_onto_views(start, y, A, WINDOW), consistency.project_onto_views(start, y, A, WINDOW, 2)
    )
    one, all_of = (
        consistency.projection_residual(
            consistency.project_onto_views(start, y, A, WINDOW, k, noise=0.05), y, A, WINDOW
        )
        for k in (1, 50)
    )
    assert (
        (all_of <= 0.05).all() and (all_of < one).any() and (all_of > 1e-3).all()
    )  # it stops at the noise, not at zero
    P = drr.Projector(geometry_of("parallel"), 8, 40.0, 8)
    y = P(density(cases, WINDOW))
    assert torch.equal(
        consistency.project_onto_views(start, y, P, WINDOW), consistency.project_onto_views(start, y, P, WINDOW, 2)
    )


@pytest.mark.parametrize("momentum", [False, True])
def test_consistent_is_alternating_projections(momentum):
    "Onto the views by a dense matrix, onto the HU range by clipping; and Nesterov's momentum."
    A = drr.Projector(geometry_of("parallel"), 8, 40.0, 8)
    y = 1.6 * A(density(uniform(1, 1, 8, 8, 8, seed=1), WINDOW))  # as if of metal: brighter than the HU range allows
    last = x = torch.full((1, 1, 8, 8, 8), 0.9)
    k = 1.0
    for _ in range(4):
        new = (1 + math.sqrt(1 + 4 * k**2)) / 2
        ahead = x + (k - 1) / new * (x - last) if momentum else x
        last, x, k = x, damped(A, ahead, y, 0.0).clamp(0, 1), new
    assert (x == 1).any() and (x == 0).sum() == 0
    got = consistency.alternating_projections(torch.full((1, 1, 8, 8, 8), 0.9), y, A, WINDOW, 4, 60, momentum=momentum)
    torch.testing.assert_close(got, x, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["parallel", "x2ct"])
def test_consistency_litres(kind):
    "A ball of water of 2.14 litres weighs as much in both views."
    n = 32
    A = drr.Projector(geometry_of(kind), n, 10.0, 64)
    c = drr.cell_centres(n, 10.0)
    r = (c[:, None, None] ** 2 + c[:, None] ** 2 + c**2).sqrt()
    got = consistency.mass_litres(A(((80 - r) / 10 + 0.5).clamp(0, 1)[None, None]), A)
    assert got.shape == (1, 2) and got[0].tolist() == pytest.approx([4 / 3 * math.pi * 0.8**3] * 2, rel=0.04)


def test_consistency_warnings():
    "Views that cannot be of one patient, by weight and by shape; metal and nothing are not mm of water."
    find = next(getattr(consistency, name) for name in ("check_views", "doubt") if hasattr(consistency, name))
    A, y = drr.Projector(geometry_of("parallel"), 16, 20.0, 16), case()[1][:1]
    assert find(y, A, WINDOW) is None
    cube = 320.0 * torch.ones_like(y)  # every ray through water alone
    assert find(2.4 * cube, A, WINDOW) is None and "mm of water" in find(2.6 * cube, A, WINDOW)
    assert "mm of water" in find(0.0009 * cube, A, WINDOW) and find(0.0011 * cube, A, WINDOW) is None
    heavier = y * torch.tensor([1.0, 1.03]).view(1, 2, 1, 1)
    assert "difference of 2.9%" in find(heavier, A, WINDOW) and "difference of 2.9%" in find(heavier.flip(1), A, WINDOW)
    assert find(y * torch.tensor([1.0, 1.015]).view(1, 2, 1, 1), A, WINDOW) is None
    upside_down = torch.stack([y[0, 0], y[0, 1].flip(0)])[None]
    assert "no volume explains" in find(upside_down, A, WINDOW)
    assert (
        consistency.irreducible_residual(y, A, WINDOW)
        < 1e-3
        < 0.02
        < consistency.irreducible_residual(upside_down, A, WINDOW)
    )


# ------------------------------------------------------------------------------------------------------------ metrics
def similarity(a: np.ndarray, b: np.ndarray, size: int, c1: float = 1e-4, c2: float = 9e-4) -> float:
    "SSIM with a uniform window, after Wang et al. 2004, each window written out."
    windows = lambda v: np.lib.stride_tricks.sliding_window_view(v, (size,) * v.ndim).reshape(-1, size**v.ndim)
    p, q = windows(a), windows(b)
    mp, mq = p.mean(1), q.mean(1)
    vp, vq, pq = p.var(1), q.var(1), ((p - mp[:, None]) * (q - mq[:, None])).mean(1)
    return float((((2 * mp * mq + c1) * (2 * pq + c2)) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))).mean())


def pair(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    a = (0.5 + 0.25 * noise(n, n, n)).clamp(0, 1)
    return a, (a + 0.1 * noise(n, n, n, seed=1)).clamp(0, 1)


def test_metrics_ssim_has_a_uniform_window():
    a, b = pair()
    x, y = a.double().numpy(), b.double().numpy()
    assert metrics.ssim(a, b) == pytest.approx(similarity(x, y, 7), abs=2e-4)
    for axis in range(3):
        slices = [similarity(x.take(i, axis), y.take(i, axis), 7) for i in range(12)]
        assert metrics.ssim(a, b, axis) == pytest.approx(np.mean(slices), abs=2e-4)
    assert metrics.ssim(a, b, size=5) == pytest.approx(similarity(x, y, 5), abs=2e-4)
    assert diffusion.ssim_loss(a[None, None], b[None, None]).item() == pytest.approx(1 - similarity(x, y, 5), abs=2e-4)


def test_metrics_psnr_of_known_errors():
    a = torch.zeros(2, 3, 4)
    b = a + torch.tensor([0.1, 0.001]).view(2, 1, 1)
    assert metrics.psnr(a, b) == pytest.approx(-10 * math.log10((0.01 + 1e-6) / 2))
    assert metrics.psnr(a, b, axis=-3) == pytest.approx(40)  # the mean of 20 and 60
    assert metrics.psnr(a, b, axis=-1) == metrics.psnr(a, b, axis=-2) == pytest.approx(metrics.psnr(a, b))
    assert metrics.psnr(a, b, 4095 / 2500) == pytest.approx(metrics.psnr(a, b) + 20 * math.log10(4095 / 2500))
    assert metrics.psnr(a, a) == pytest.approx(120)


def test_metrics_protocols():
    "Air and metal outside a protocol's range are clipped to it, in prediction and truth."
    wide = (-1024.0, 3000.0)
    unit = lambda hu: (torch.tensor([[[float(hu)]]]) - wide[0]) / (wide[1] - wide[0])
    p = metrics.PROTOCOLS
    assert metrics.rescale(unit(2500), wide, p["x2ct"]) == 1 == metrics.rescale(unit(1476), wide, p["psct"])
    assert metrics.rescale(unit(226), wide, p["x2ct"]).item() == pytest.approx(0.5)
    assert metrics.rescale(unit(988), wide, p["unit"]).item() == pytest.approx(0.5)
    assert metrics.rescale(unit(-1020) - 0.01, wide, p["x2ct"]) == 0
    assert (p["x2ct"].peak, p["psct"].peak, p["unit"].peak) == (4095 / 2500, 1.0, 1.0)


def test_metrics_of_one_volume():
    "The body is that of the truth: a prediction of nothing but air has an error in it."
    truth, air = torch.full((12, 12, 12), -1000.0), torch.full((12, 12, 12), -1000.0)
    truth[3:9, 3:9, 3:9] = 100.0
    unit = lambda hu: (hu - WINDOW[0]) / (WINDOW[1] - WINDOW[0])
    m = metrics.metrics(unit(air), unit(truth), WINDOW, "x2ct")
    assert m["protocol"] == "x2ct" and m["mae_hu"] == pytest.approx(1100 / 8, rel=1e-4)
    assert m["mae_hu_body"] == pytest.approx(1100, rel=1e-4)
    assert math.isnan(metrics.metrics(unit(truth), unit(air), WINDOW)["mae_hu_body"])
    a, b = (metrics.rescale(unit(v), WINDOW, metrics.PROTOCOLS["x2ct"]) for v in (air, truth))
    assert m["psnr"] == pytest.approx(10 * math.log10((4095 / 2500) ** 2 / (0.44**2 / 8)), rel=1e-4)
    x, y = a.double().numpy(), b.double().numpy()
    for axis, name in enumerate(("axial", "coronal", "sagittal")):
        want = np.mean([similarity(x.take(i, axis), y.take(i, axis), 7) for i in range(12)])
        assert m[f"ssim_{name}"] == pytest.approx(want, abs=1e-3)
    assert m["ssim_slices"] == pytest.approx((m["ssim_axial"] + m["ssim_coronal"] + m["ssim_sagittal"]) / 3)
    assert m["psnr_slices"] == pytest.approx(sum(metrics.psnr(a, b, 4095 / 2500, k) for k in (-3, -2, -1)) / 3)
    shifted = truth + torch.arange(12.0).view(-1, 1, 1) * 40  # slices along D that differ in their error
    u = metrics.metrics(unit(shifted), unit(truth), WINDOW)
    assert u["ssim_axial"] != pytest.approx(u["ssim_sagittal"], abs=1e-3) and u["psnr_slices"] > u["psnr"] + 0.1


def test_metrics_power_per_band_in_numpy():
    "One band after the other, by loops over the frequencies of a cube that is not a cube."
    shape = (12, 10, 8)
    x, y = uniform(*shape), uniform(*shape, seed=1) ** 2
    taper = np.einsum("i,j,k->ijk", *(np.hanning(n) for n in shape))
    power = [np.abs(np.fft.fftn((v.double().numpy() - v.double().numpy().mean()) * taper)) ** 2 for v in (x, y)]
    sums = np.zeros((2, 3))
    for at in itertools.product(*map(range, shape)):
        f = math.hypot(*(min(k, n - k) / n for k, n in zip(at, shape)))
        sums[:, 0 if f > 1 / 4 else 1 if f > 1 / 8 else 2] += [p[at] for p in power]
    assert metrics.band_power(x, y, 3) == pytest.approx(10 * np.log10(sums[0] / sums[1]), abs=1e-6)
    assert len(metrics.band_power(x, y)) == 4 and metrics.band_power(x * 0, x * 0) == [0] * 4


def test_metrics_bootstrap_is_a_95_percent_interval():
    v = np.random.default_rng(0).normal(5, 2, 200)
    mean, lo, hi = metrics.bootstrap(v.tolist())
    half = 1.96 * v.std() / math.sqrt(200)
    assert mean == pytest.approx(v.mean()) and (mean - lo, hi - mean) == pytest.approx((half, half), rel=0.06)
    _, lo90, hi90 = metrics.bootstrap(v.tolist(), 0.9)
    assert (hi90 - lo90) / (hi - lo) == pytest.approx(1.645 / 1.96, rel=0.06)
    assert metrics.bootstrap(v.tolist()) == (mean, lo, hi) != metrics.bootstrap(v.tolist(), seed=1)


# ------------------------------------------------------------------------------------------------------------ encoder
@pytest.mark.parametrize("kind", encoder.ENCODER_BLOCKS)
def test_encoder_keeps_the_views_apart(kind):
    "Change only the lateral image: the frontal maps and tokens stay equal, the lateral ones change; and the reverse."
    net = weigh(encoder.Encoder(kind, [8, 16], 16, 8, 8))
    views = uniform(2, 2, 16, 16)
    maps, tokens = net(views)
    for i, other in ((0, 1), (1, 0)):
        changed = views.clone()
        changed[:, i] += 0.3 * uniform(2, 16, 16, seed=1)
        maps2, tokens2 = net(changed)
        for a, b in (*zip(maps, maps2), [v.view(2, 2, -1, 8) for v in (tokens, tokens2)]):
            assert torch.equal(a[:, other], b[:, other]) and (a[:, i] - b[:, i]).abs().mean() > 1e-3
    maps2, _ = net(views.flip(1))
    assert (maps[0].flip(1) - maps2[0]).abs().max() > 0.1  # a head for each view
    assert [tuple(m.shape) for m in maps] == [(2, 2, 8, 8, 8), (2, 2, 16, 4, 4)] and tokens.shape == (2, 2 * 4 * 4, 8)


@pytest.mark.parametrize("kind", encoder.ENCODER_BLOCKS)
def test_encoder_every_weight_learns(kind):
    net = weigh(encoder.Encoder(kind, [8, 16], 16, 8, 8))
    maps, tokens = net(uniform(2, 2, 16, 16))
    sum(v.pow(3).sum() for v in (*maps, tokens)).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_encoder_tokens_have_a_place_that_learns():
    net = weigh(encoder.Encoder("resnet", [8, 16], 16, 8, 8))
    views = uniform(1, 2, 16, 16)
    net(views)[1].square().sum().backward()
    assert net.place.grad.abs().min() > 0
    before = net(views)[1]
    net.place.data[1, :, 2, 3] += 1  # of the lateral view: row 2, column 3 of 4 x 4
    moved = (net(views)[1] - before).abs().sum(-1)[0]
    assert moved.nonzero().flatten().tolist() == [16 + 2 * 4 + 3]


def test_encoder_position_code():
    code = encoder.position_encoding(4, 2)
    u = np.array([-0.75, -0.25, 0.25, 0.75])
    rows = [np.sin(np.pi / 2 * u), np.sin(np.pi * u), np.cos(np.pi / 2 * u), np.cos(np.pi * u)]
    want = np.stack([np.tile(r[:, None], (1, 4)) for r in rows] + [np.tile(r, (4, 1)) for r in rows])
    np.testing.assert_allclose(code, want, atol=1e-6)


@pytest.mark.parametrize("kind", ["parallel", "near"])
def test_encoder_features_are_lifted_along_their_own_rays(kind):
    "One bright pixel of one view: in a block it lies where that pixel's ray passes, and nowhere in the other view."
    g, n, mm, pixels, origin = geometry_of(kind), 8, 40.0, 8, (1, 0, 4)
    (lift,) = encoder.back_projections(g, n, mm, origin, 4, pixels, 1, 1)
    pixel, c = g.panel_mm / pixels, drr.cell_centres(n, mm).tolist()
    row, columns = 2, (5, 2)  # AP, LAT
    for view, column in enumerate(columns):
        r, q = ((i - 3.5) * pixel for i in (row, column))
        features = torch.zeros(1, 2, 1, pixels, pixels)
        features[0, view, 0, row, column] = 1
        got = lift(features)[0, :, 0]
        assert not got[1 - view].any() and got[view].any()
        for at in itertools.product(range(4), repeat=3):
            z, y, x = (c[o + i] for o, i in zip(origin, at))
            depth, across = (y, x) if view == 0 else (x, y)
            zoom = 1.0 if kind == "parallel" else (g.sad_mm + depth) / g.sdd_mm
            weight = max(0, 1 - abs(z / zoom - r) / pixel) * max(0, 1 - abs(across / zoom - q) / pixel)
            assert got[(view, *at)].item() == pytest.approx(weight, abs=1e-4), (view, at)


def test_encoder_block_axes():
    z, y, x = encoder.block_axes(16, 20.0, (0, 4, 8), 8, 2)
    assert z.tolist() == [-140, -100, -60, -20] and y[0] == -60 and x[0] == 20
    lifts = encoder.back_projections(geometry_of("parallel"), 16, 20.0, (0, 0, 0), 16, 16, 3)
    assert [lift.shape[0] for lift in lifts] == [8, 4, 2] and [lift.ap_rows.shape[-1] for lift in lifts] == [8, 4, 2]


# --------------------------------------------------------------------------------------------------------- the U-Net
def test_unet_haar_block_by_block():
    x = noise(1, 2, 4, 4, 4)
    y = unet.haar(x)
    for c, d, h, w in itertools.product(range(2), range(2), range(2), range(2)):
        block = x[0, c, 2 * d : 2 * d + 2, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
        for k, (i, j, l) in enumerate(itertools.product((0, 1), repeat=3)):
            sign = torch.tensor([(-1.0) ** (i * a + j * b + l * e) for a, b, e in itertools.product((0, 1), repeat=3)])
            want = (sign.view(2, 2, 2) * block).sum() / math.sqrt(8)
            assert y[0, 8 * c + k, d, h, w].item() == pytest.approx(want.item(), abs=1e-5)
    torch.testing.assert_close(unet.unhaar(y), x)
    kept = unet.prepare_input(noise(1, 3, 4, 4, 4), True, 2)
    assert kept.shape == (1, 17, 2, 2, 2)
    torch.testing.assert_close(kept[:, 16:], F.avg_pool3d(noise(1, 3, 4, 4, 4)[:, 2:], 2))


def test_unet_time_embedding():
    net = weigh(unet.TimeEmbedding(8))
    t = torch.tensor([0.0, 0.3, 1.0])
    a = t[:, None] * torch.exp(torch.linspace(0, 1, 32) * math.log(1000))
    h = torch.cat([a.sin(), a.cos()], 1)
    m = net.mlp
    want = F.silu(F.linear(F.silu(F.linear(h, m[0].weight, m[0].bias)), m[2].weight, m[2].bias))
    torch.testing.assert_close(net(t), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("planar", [0, 1, 2])
def test_unet_planar_levels_change_the_kernels(planar):
    net = network(planar=planar)
    for name, stage in net.stages.items():
        for block in stage.blocks:
            want = (1, 3, 3) if stage.level < planar else (3, 3, 3)
            assert block.conv1.kernel_size == block.conv2.kernel_size == want, name
    assert [s.level for s in net.stages.values()] == [0, 1, 1, 1, 0]


def test_unet_skips_are_popped_in_reverse_order():
    "Each block of the way up also gets the output of its twin on the way down, level by level."
    net, pushed, popped = network(), [], []
    for name, stage in net.stages.items():
        if name.startswith("down"):
            for attention in stage.attentions:  # the last thing before a skip is kept
                attention.register_forward_hook(lambda m, args, out: pushed.append(out))
        if name.startswith("up"):
            for block in stage.blocks:
                block.register_forward_pre_hook(lambda m, args: popped.append(args[0]))
    net(*inputs(net))
    assert len(pushed) == len(popped) == 4
    for skip, both in zip(reversed(pushed), popped):
        assert torch.equal(both[:, -skip.shape[1] :], skip)


@pytest.mark.parametrize("modulate, lift", [(True, 4), (False, 4), (True, 0)])
def test_unet_block_written_out(modulate, lift):
    "Group norms, time and lifted features by hand."
    b = weigh(unet.ResBlock(8, 16, 6, lift, modulate))
    h, emb, lifted = noise(2, 8, 4, 4, 4), noise(2, 6), noise(2, 4, 4, 4, 4)

    def normed(x, layer):
        g = x.view(2, 8, -1)
        g = (g - g.mean(2, keepdim=True)) / (g.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return g.view_as(x) * layer.weight.view(-1, 1, 1, 1) + layer.bias.view(-1, 1, 1, 1)

    conv = lambda x, layer: F.conv3d(x, layer.weight, layer.bias, padding=1)
    gamma, beta = (emb @ b.time.weight.T + b.time.bias).view(2, 2, 16, 1, 1, 1).unbind(1)
    if lift:
        more = torch.einsum("oi,bidhw->bodhw", b.lift.weight[:, :, 0, 0, 0], lifted) + b.lift.bias.view(-1, 1, 1, 1)
        beta = beta + more[:, :16]
        gamma = gamma + more[:, 16:] if modulate else gamma
    y = normed(conv(F.silu(normed(h, b.norm1)), b.conv1), b.norm2) * (1 + gamma) + beta
    want = F.conv3d(h, b.skip.weight, b.skip.bias) + conv(F.silu(y), b.conv2)
    torch.testing.assert_close(b(h, emb, lifted if lift else None), want, rtol=1e-4, atol=1e-4)


def test_unet_attention_written_out():
    "Heads, self-attention, then cross-attention to tokens, one query at a time."
    a = weigh(unet.Attention(64, 8))
    assert a.heads == 2
    h, tokens = noise(1, 64, 2, 2, 2), noise(1, 3, 8)
    s = F.group_norm(h, 8, a.norm.weight, a.norm.bias).flatten(2)[0].T  # voxels, channels

    def attended(q, k, v):
        parts = []
        for cut in (slice(0, 32), slice(32, 64)):
            p = ((q[:, cut] @ k[:, cut].T) / math.sqrt(32)).softmax(1)
            parts.append(p @ v[:, cut])
        return torch.cat(parts, 1)

    q, k, v = (F.linear(s, w, c) for w, c in zip(a.qkv.weight.chunk(3), a.qkv.bias.chunk(3)))
    add = a.out(attended(q, k, v))
    k, v = (F.linear(tokens[0], w, c) for w, c in zip(a.kv.weight.chunk(2), a.kv.bias.chunk(2)))
    add = add + a.cross(attended(a.q(s + add), k, v))
    torch.testing.assert_close(a(h, tokens), h + add.T.reshape(1, 64, 2, 2, 2), rtol=1e-4, atol=1e-4)
    assert [unet.Attention(c, 0).heads for c in (8, 32, 96, 104)] == [1, 1, 3, 2]


def test_unet_begins_as_the_identity():
    "Untrained, the last layers are zero, and so is the answer; checkpointing changes no number."
    torch.manual_seed(0)
    net = unet.UNet(2, 4, [8, 16], (False, True), (True, True), 1, 1, "modulate", 8, True, emb=16)
    assert not net(*inputs(net)).any()
    assert all(not m.out.weight.any() for m in net.modules() if isinstance(m, unet.Attention) and m.out is not None)
    plain, again = network().train(), network(checkpointing=True).train()
    for n in (plain, again):
        n(*inputs(n)).square().sum().backward()
    for (k, p), q in zip(plain.named_parameters(), again.parameters()):
        assert p.grad.abs().max() > 0 and torch.equal(p.grad, q.grad), k


# --------------------------------------------------------------------------------------------------------- diffusion
def schedule(name: str, t: float) -> tuple[float, float]:
    "alpha and sigma: flow matching's straight line, the cosine, and DDPM's integral of beta, 0.1 to 20, by quadrature."
    if name == "flow":
        return 1 - t, t
    if name == "cosine":
        return math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    beta = 0.1 + 19.9 * (np.arange(1000) + 0.5) / 1000 * t
    alpha = 0.0 if t > 0.999 else math.exp(-0.5 * beta.mean() * t)
    return alpha, math.sqrt(1 - alpha**2)


@pytest.mark.parametrize("name", ["flow", "cosine", "linear"])
def test_diffusion_schedules(name):
    d = diffusion.Diffusion(name)
    for t in (0.0, 0.1, 0.35, 0.8, 1.0):
        got = [v.item() for v in d.alpha_sigma(torch.tensor(t, dtype=torch.float64))]
        assert got == pytest.approx(schedule(name, t), abs=1e-6)
    for t in (0.2, 0.5, 0.9):
        h = 1e-5
        slope = [(p - m) / (2 * h) for p, m in zip(schedule(name, t + h), schedule(name, t - h))]
        a, s = schedule(name, t)
        x0, eps = torch.tensor(0.7, dtype=torch.float64), -1.3
        got = diffusion.velocity(a * x0 + s * eps, x0, t, d)
        assert got.item() == pytest.approx(slope[0] * 0.7 + slope[1] * eps, rel=1e-3)


@pytest.mark.parametrize("name", ["flow", "cosine", "linear"])
@pytest.mark.parametrize("prediction", ["x0", "v", "eps"])
def test_diffusion_parameterisations(name, prediction):
    "The answer that stands for the true state gives the true state back; its reach is the derivative."
    d, t = diffusion.Diffusion(name, prediction), torch.tensor([0.2, 0.6])
    x0, eps = noise(2, 1, 2, 2, 2), noise(2, 1, 2, 2, 2, seed=1)
    a, s = (torch.tensor([schedule(name, float(v))[i] for v in t]).view(-1, 1, 1, 1, 1) for i in (0, 1))
    x_t = a * x0 + s * eps
    torch.testing.assert_close(d.add_noise(x0, eps, t), x_t, rtol=1e-4, atol=1e-4)
    root = (a**2 + s**2).sqrt()
    answer = {"x0": (x0 - a * x_t / root**2) * root / s, "v": a * eps - s * x0, "eps": eps}[prediction]
    if prediction == "v":
        answer = (a * x_t - root**2 * x0) / s
    torch.testing.assert_close(d.clean(answer, x_t, t), x0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(d.wiener(x_t, t), a * x_t / root**2, rtol=1e-4, atol=1e-4)
    step = (d.clean(answer + 1, x_t, t) - d.clean(answer, x_t, t)).abs().amax((1, 2, 3, 4))
    torch.testing.assert_close(d.output_sensitivity(t), step, rtol=1e-3, atol=1e-4)
    assert d.output_sensitivity(torch.zeros(1)).item() >= 0.0199


@pytest.mark.parametrize("name", ["flow", "cosine", "linear"])
def test_diffusion_ddpm_draws_the_posterior(name):
    "One step against the closed mean and variance of q(x_s | x_t, x_0)."
    d, t, s = diffusion.Diffusion(name), 0.7, 0.4
    (a, g), (b, h) = schedule(name, t), schedule(name, s)
    x, x0 = noise(1, 1, 8, 8, 8), noise(1, 1, 8, 8, 8, seed=1)
    within = g**2 - (a / b) ** 2 * h**2  # variance of q(x_t | x_s)
    mean = (a / b) * h**2 / g**2 * x + b * within / g**2 * x0
    got = diffusion.ddpm(lambda v, time: x0, x, [t, s], d, torch.Generator().manual_seed(3))
    fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(got, mean + h * math.sqrt(within) / g * fresh, rtol=1e-4, atol=1e-4)
    plain = diffusion.ddim(lambda v, time: x0, x, [t, s], d)
    torch.testing.assert_close(plain, b * x0 + h * (x - a * x0) / g, rtol=1e-4, atol=1e-4)
    assert torch.equal(diffusion.ddpm(lambda v, time: x0, x, [t, 0.0], d), x0)


def evolved(name: str, steps: int, how: str) -> float:
    "The denoiser of a Gaussian of deviation 0.5 is a line, D(x, t) = c(t) x; sampled by hand, from 1."
    times = np.linspace(1, 0, steps + 1)
    c = lambda t: (a := schedule(name, t)[0]) * 0.25 / (a * a * 0.25 + schedule(name, t)[1] ** 2)

    def slope(x, t):
        (a, s), h = schedule(name, t), 1e-4
        lo, hi = max(t - h, 0), min(t + h, 1)
        da, ds = (np.subtract(schedule(name, hi), schedule(name, lo)) / (hi - lo)).tolist()
        return da * c(t) * x + ds * (x - a * c(t) * x) / max(s, 1e-6)

    x = 1.0
    for t, s in zip(times, times[1:]):
        v = slope(x, t)
        y = x + (s - t) * v
        x = y if how == "euler" or s == 0 else x + (s - t) * (v + slope(y, s)) / 2
    return x


@pytest.mark.parametrize("name", ["flow", "cosine", "linear"])
@pytest.mark.parametrize("how", ["euler", "heun"])
def test_diffusion_euler_and_heun_by_hand(name, how):
    d = diffusion.Diffusion(name)
    c = lambda t: (a := schedule(name, t)[0]) * 0.25 / (a * a * 0.25 + schedule(name, t)[1] ** 2)
    got = diffusion.SAMPLERS[how](
        lambda x, t: c(t) * x, torch.ones(1, dtype=torch.float64), diffusion.sampling_times(5), d
    )
    assert got.item() == pytest.approx(evolved(name, 5, how), rel=2e-3, abs=2e-4)
    fine = diffusion.SAMPLERS[how](
        lambda x, t: c(t) * x, torch.ones(1, dtype=torch.float64), diffusion.sampling_times(400), d
    )
    assert fine.item() == pytest.approx(0.5, abs=0.02)  # the exact flow maps a deviation of 1 to one of 0.5


@pytest.mark.parametrize("name", ["flow", "cosine"])
def test_diffusion_dpm_solver_by_hand(name):
    "DPM-Solver++(2M) in x / alpha over sigma / alpha; the first and the last step are of first order."
    d, times = diffusion.Diffusion(name), diffusion.sampling_times(5)
    mu = 0.8
    denoise = lambda x, t: mu + 0.1 * x
    sigma = [schedule(name, min(t, 0.999))[1] / schedule(name, min(t, 0.999))[0] for t in times]
    scale = [1.0 / schedule(name, min(t, 0.999))[0] for t in times]
    x, old = -0.6 * sigma[0], None
    for i in range(5):
        now = denoise(x / scale[i], times[i])
        h = math.log(sigma[i] / sigma[i + 1]) if i < 4 else math.inf
        best = now
        if 0 < i < 4:
            r = math.log(sigma[i - 1] / sigma[i]) / h
            best = now + (now - old) / (2 * r)
        x, old = sigma[i + 1] / sigma[i] * x + (1 - sigma[i + 1] / sigma[i]) * best, now
    got = diffusion.dpm(denoise, torch.full((1, 1, 1, 1, 1), -0.6), times, d)
    assert got.item() == pytest.approx(x, rel=1e-3)


def test_diffusion_times():
    assert diffusion.sampling_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_diffusion_bands_of_resolution():
    "Block means of a volume, band by band, in plain numpy."
    x = noise(1, 1, 8, 8, 8)
    two = F.interpolate(F.avg_pool3d(x, 2), scale_factor=2)
    four = F.interpolate(F.avg_pool3d(x, 4), scale_factor=4)
    scales = torch.tensor([2.0, 3.0, 5.0])
    want = 2 * (x - two) + 3 * (two - four) + 5 * four
    torch.testing.assert_close(diffusion.scale_bands(x, scales), want, rtol=1e-4, atol=1e-4)
    got = diffusion.band_rms(x, 3)
    share = [(x - two).square().mean() * 8 / 7, (two - four).square().mean() * 64 / 7, four.square().mean() * 64]
    torch.testing.assert_close(got, torch.stack(share).sqrt(), rtol=1e-4, atol=1e-4)
    assert diffusion.total_rms(got).item() == pytest.approx(x.square().mean().sqrt().item(), rel=1e-4)
    white = diffusion.band_rms(noise(1, 1, 64, 64, 64), 3)
    assert white.tolist() == pytest.approx([1, 1, 1], abs=0.03)
    net = denoiser()
    volume, base = uniform(2, 1, 16, 16, 16), uniform(2, 1, 16, 16, 16, seed=1)
    state = net.to_residual(volume, base)
    torch.testing.assert_close(net.to_volume(state, base), volume, rtol=1e-4, atol=1e-4)
    up = F.interpolate(F.avg_pool3d(volume - base, 2), scale_factor=2)
    torch.testing.assert_close(state, (volume - base - up) / 0.07 + up / 0.19, rtol=1e-4, atol=1e-3)


def test_diffusion_the_mean_views_encode_like_zeros():
    "The encoder sees what differs from the mean views, in cubes of water, enlarged; of display images as they are."
    for net, unit in ((denoiser(), 320.0), (denoiser(line_integrals=False), 1.0)):
        for got, want in zip(net.encode(net.usual[None])[0], net.encoder(torch.zeros(1, 2, 16, 16))[0]):
            assert torch.equal(got, want)
        change = uniform(1, 2, 16, 16)
        got, want = net.encode(net.usual + change * unit)[1], net.encoder(8 * change)[1]
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["parallel", "near"])
def test_diffusion_the_condition_of_a_block(kind):
    "Coverage, positions and features of a crop are the crop of those of the cube; lateral features stay lateral."
    net, views = denoiser(kind=kind), case(kind)[1]
    maps, tokens = net.encode(views)
    whole, origin = net.condition(torch.zeros(2, 1, 16, 16, 16), (maps, tokens)), (8, 0, 4)
    part = net.condition(torch.zeros(2, 1, 8, 8, 8), (maps, tokens), origin)
    cut = lambda v, s: v[..., 8 // s : 16 // s, 0 : 8 // s, 4 // s : 12 // s]
    torch.testing.assert_close(part.extra, cut(whole.extra, 1))
    for level, (a, b) in enumerate(zip(part.lifted, whole.lifted)):
        torch.testing.assert_close(a, cut(b, 2 ** (level + 1)), rtol=1e-4, atol=1e-4)
    c = (torch.arange(16) - 7.5) * 20 * 2 / 320
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = 16
        torch.testing.assert_close(whole.extra[0, 1 + axis], c.view(shape).expand(16, 16, 16))
    assert torch.equal(whole.extra[0, 0], drr.coverage(net.A.geometry, 16, 20.0)[0, 0] / 2)
    changed = views.clone()
    changed[:, 1] += 30 * uniform(2, 16, 16)
    lifted = net.condition(torch.zeros(2, 1, 16, 16, 16), net.encode(changed)).lifted
    for a, b in zip(whole.lifted, lifted):
        assert (a - b).abs().max() > 1e-2
        if kind == "parallel":
            assert (a - b).std(4).max() < 1e-4 < (a - b).std(3).max()  # the lateral view: constant along W


def test_diffusion_bases():
    "The mean, the mean made consistent, a constant; of a coarse network, its expected volume over mirror images."
    views = case()[1]
    A, mean = denoiser().A, denoiser().mean
    for how, damping in (("on", 0.0), ("soft", 0.3), ("off", 0.0)):
        want = consistency.alternating_projections(
            mean.expand(2, -1, -1, -1, -1), views, A, WINDOW, 10, 1, damping=damping, momentum=True
        )
        torch.testing.assert_close(denoiser().prior(views, how), want)
    torch.testing.assert_close(denoiser("MODEL.BASE=mean").prior(views), mean.expand(2, -1, -1, -1, -1))
    assert (denoiser("MODEL.BASE=none").prior(views) == 0.5).all()
    shown = drr.to_display(views)[0]
    display = denoiser(line_integrals=False)
    torch.testing.assert_close(display.prior(shown), display.mean.expand(2, -1, -1, -1, -1))
    net = denoiser("TRAINING.COARSE_EPOCHS=[2]", "TRAINING.FLIP_AXES=[D, W]")
    small, coarse = F.avg_pool2d(views, 2), net.coarse
    assert (coarse.A.size, coarse.A.mm, coarse.A.pixels, len(coarse.mirrors)) == (8, 40.0, 8, 4)
    answers = []
    for axes in ((), (2,), (4,), (2, 4)):  # of (B, 1, D, H, W)
        seen = small.clone()
        if 2 in axes:
            seen = seen.flip(2)
        if 4 in axes:
            seen[:, 0] = seen[:, 0].flip(2)
        base = coarse.prior(seen)
        state = coarse(torch.zeros_like(base), torch.ones(2), coarse.condition(base, coarse.encode(seen)))
        volume = consistency.project_onto_views(coarse.to_volume(state, base), seen, coarse.A, WINDOW)
        answers.append(volume.flip(axes) if axes else volume)
    with torch.no_grad():
        want = F.interpolate(torch.stack(answers).mean(0), scale_factor=2, mode="trilinear")
        torch.testing.assert_close(coarse.coarse_prediction(views, "on", None), want, rtol=1e-3, atol=1e-4)
    assert not any(p.requires_grad for p in coarse.parameters())


def test_diffusion_mirror_images():
    flips = ["D", "H", "W"]
    assert diffusion.valid_mirrors(geometry_of("near"), flips) == [(), (0,)]  # in a cone, near and far differ
    assert diffusion.valid_mirrors(geometry_of("parallel"), ["H", "W"]) == [(), (1,), (2,), (1, 2)]
    A, x = drr.Projector(geometry_of("parallel"), 16, 20.0, 16), uniform(1, 1, 16, 16, 16)
    for axes in diffusion.valid_mirrors(A.geometry, flips):
        torch.testing.assert_close(diffusion.mirror_views(A(x), axes), A(x.flip([a + 2 for a in axes])))


def test_diffusion_settling():
    net, x, views = denoiser(), uniform(2, 1, 16, 16, 16), case()[1]
    for how, damping in (("on", 0.0), ("soft", 0.3)):
        torch.testing.assert_close(
            net.enforce_consistency(x, views, how),
            consistency.project_onto_views(x, views, net.A, WINDOW, damping=damping),
        )
    assert (
        net.enforce_consistency(x, views, "off") is x
        and denoiser(line_integrals=False).enforce_consistency(x, views, "on") is x
    )


def test_diffusion_the_coarse_settings():
    c = load_config(
        sets=[
            *TINY,
            "TRAINING.COARSE_EPOCHS=[9, 40]",
            "MODEL.UNET.NUM_CHANNELS=[8, 16, 24]",
            "BATCH_SIZE=3",
            "MODEL.UNET.ATTENTION_LEVELS=[false, true, true]",
            "MODEL.UNET.CROSS_ATTENTION_LEVELS=[true, true, false]",
            "MODEL.UNET.PLANAR_LEVELS=2",
            "DATA.TARGET_VOLUME_SIZE=32",
            "DATA.TARGET_DRR_SIZE=48",
        ]
    )
    h = diffusion.coarse_config(c)
    assert (h.EPOCHS, h.BATCH_SIZE, h.TRAINING.COARSE_EPOCHS, h.TRAINING.LOSS_PHASE_EPOCHS) == (40, 6, [9], [40, 0])
    assert (h.TRAINING.FULL_NOISE_RATIO, h.TRAINING.PATCH_SIZE, h.DATA.TARGET_VOLUME_SIZE, h.DATA.TARGET_DRR_SIZE) == (
        1.0,
        16,
        16,
        24,
    )
    u = h.MODEL.UNET
    assert (u.NUM_CHANNELS, u.ATTENTION_LEVELS, u.CROSS_ATTENTION_LEVELS, u.PLANAR_LEVELS) == (
        [16, 24],
        [True, True],
        [True, False],
        1,
    )
    assert (h.TRAINING.VALIDATION_FREQ, h.TRAINING.CHECKPOINT_FREQ) == (10, 4) and c.EPOCHS != 40


def test_diffusion_sizes_by_scale():
    net = diffusion.build_denoiser(
        load_config(sets=[*TINY, "MODEL.SCALE=2", "MODEL.UNET.NUM_RES_BLOCKS=1"]), geometry_of("parallel"), 20.0
    )
    assert (
        net.unet.first.out_channels == 16
        and net.encoder.stem.out_channels == 16
        and net.encoder.tokens.out_channels == 16
    )
    odd = load_config(sets=TINY)
    odd.DATA.TARGET_DRR_SIZE = 18
    with pytest.raises(UserError, match="multiple of 4 for the 2 levels"):
        diffusion.build_denoiser(odd, geometry_of("parallel"), 20.0)


def test_diffusion_loss_terms_and_their_units():
    "By hand; every term but SSIM is in units of the scale."
    x, truth = uniform(2, 1, 8, 8, 8), uniform(2, 1, 8, 8, 8, seed=1)
    A, scale = drr.Projector(geometry_of("parallel"), 8, 40.0, 8), torch.tensor([0.1, 0.4])
    e = (x - truth).double().numpy()
    weights = dict.fromkeys(("L2", "L1", "SSIM", "FOURIER", "PROJECTION"), 1.0)
    got = {k: v.double().numpy() for k, v in diffusion.loss_terms(x, truth, scale, weights, A).items()}
    s, over = scale.double().numpy(), (1, 2, 3, 4)
    np.testing.assert_allclose(got["L2"], (e**2).mean(over) / s**2, rtol=1e-4)
    np.testing.assert_allclose(got["L1"], np.abs(e).mean(over) / s, rtol=1e-4)
    # rfftn holds half of the spectrum: the last axis up to the highest frequency
    halves = lambda v: np.abs(np.fft.fftn(v.double().numpy(), axes=(2, 3, 4), norm="ortho"))[..., :5]
    np.testing.assert_allclose(got["FOURIER"], np.abs(halves(x) - halves(truth)).mean(over) / s, rtol=1e-4)
    rays = np.stack([e[:, 0].sum(2), e[:, 0].sum(3)], 1) * 40
    np.testing.assert_allclose(got["PROJECTION"], np.abs(rays).mean((1, 2, 3)) / (320 * s), rtol=1e-4)
    np.testing.assert_allclose(got["SSIM"], diffusion.ssim_loss(x, truth), rtol=1e-5)
    twice = diffusion.loss_terms(x, truth, 2 * scale, weights, A)
    factors = {k: (got[k] / twice[k].double().numpy()).tolist() for k in weights}
    assert factors == {
        k: pytest.approx([v] * 2, rel=1e-4) for k, v in dict(L2=4, L1=2, SSIM=1, FOURIER=2, PROJECTION=2).items()
    }
    counts = 1 + 59 * (uniform(2, 1, 8, 8, 8, seed=2) > 0.9)
    for k, p in (("L2", 2), ("L1", 1)):
        more = diffusion.loss_terms(x, truth, scale, {k: 1.0}, A, counts)[k]
        np.testing.assert_allclose(more, (counts.numpy() * np.abs(e) ** p).mean(over) / s**p, rtol=1e-4)
    assert diffusion.loss_terms(x, truth, scale, {"L1": 1.0}, A).keys() == {"L1"}


def test_diffusion_phases():
    ratios = dict(L1=1.0, SSIM=0.1, FOURIER=0.3, PROJECTION=0.0)
    of = lambda epoch: diffusion.phase_weights(epoch, (3, 2), ratios)
    assert [of(e) for e in (0, 2)] == [{"L2": 1.0}] * 2 and [of(e) for e in (3, 4)] == [{"L1": 1.0}] * 2
    assert of(5) == pytest.approx(dict(L1=1 / 1.4, SSIM=0.1 / 1.4, FOURIER=0.3 / 1.4))


@pytest.mark.parametrize("blend", ["constant", "gaussian", "cosine"])
def test_diffusion_windows_weigh_most_in_their_middle(blend):
    w = diffusion.blend_weight(8, blend)
    u = (np.arange(8) + 0.5) / 4 - 1
    one = dict(constant=np.ones(8), gaussian=np.exp(-8 * u**2), cosine=np.cos(np.pi / 2 * u))[blend].clip(1e-3)
    np.testing.assert_allclose(w, one[:, None, None] * one[:, None] * one, rtol=1e-4)
    assert (w > 0).all() and (w[4, 4, 4] == w.max()) and (w[0, 0, 0] == w.min())
    assert blend == "constant" or w[4, 4, 4] > 10 * w[0, 0, 0]


def test_diffusion_starts():
    assert diffusion.window_starts(16, 8, 0.25) == [0, 6, 8] and diffusion.window_starts(16, 16, 0.25) == [0]
    assert diffusion.window_starts(24, 8, 0.5) == [0, 4, 8, 12, 16] and diffusion.window_starts(16, 8, 0.99) == [
        0,
        2,
        4,
        6,
        8,
    ]
    assert diffusion.window_starts(20, 8, 0.0) == [0, 8, 12]


@pytest.mark.parametrize("batch", [1, 3, None])
def test_diffusion_windows_are_the_weighted_mean_of_their_answers(batch):
    "Window by window, each with the condition of its position."
    net, (volumes, views) = denoiser(), case()
    base, x, t = volumes * 0.9, noise(2, 1, 16, 16, 16), 0.4
    with torch.no_grad():
        encoded = net.encode(views)
        got = diffusion.sliding_window(net, base, encoded, 8, 0.25, "gaussian", batch)(x, t)
        w, top, total = diffusion.blend_weight(8, "gaussian"), torch.zeros_like(x), torch.zeros_like(x)
        for o in itertools.product((0, 6, 8), repeat=3):
            cut = (..., *(slice(i, i + 8) for i in o))
            top[cut] += w * net(x[cut], torch.tensor([t, t]), net.condition(base[cut], encoded, o))
            total[cut] += w
        torch.testing.assert_close(got, top / total, rtol=1e-3, atol=1e-3)
        whole = diffusion.sliding_window(net, base, encoded, 16)(x, t)
        torch.testing.assert_close(whole, net(x, torch.tensor([t, t]), net.condition(base, encoded)))


def test_diffusion_what_the_network_is_given():
    "The input is a Wiener estimate of the residual, the prior from -1 to 1, then the maps of the position."
    net, seen = denoiser(), []
    c = net.condition(uniform(2, 1, 16, 16, 16), net.encode(case()[1]))
    hook = net.unet.first.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = noise(2, 1, 16, 16, 16)
    net(x, torch.tensor([0.25, 0.25]), c)
    hook.remove()
    state = unet.haar(torch.cat([0.75 * x / (0.75**2 + 0.25**2), 2 * c.prior - 1], 1))
    torch.testing.assert_close(seen[0], torch.cat([state, F.avg_pool3d(c.extra, 2)], 1), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ augmentation
STILL = dict(SHARE=1, ROTATE=0, SCALE=0, SHIFT=0, ELASTIC=0, INTENSITY=0, NODULES=0, GEOMETRY=0, PHOTONS=0, GAMMA=0)


def test_augment_renders_where_and_only_where_the_views_no_longer_fit():
    of = lambda flips=(), **change: augment.needs_new_views(AugmentConfig(**STILL | change), flips)
    assert not of() and not of(PHOTONS=1e4) and not of(GAMMA=0.5)
    for change in (dict(ROTATE=5), dict(SCALE=0.1), dict(SHIFT=0.1), dict(ELASTIC=0.02), dict(INTENSITY=0.03)):
        assert of(**change) and not of(**change, SHARE=0), change
    assert of(["W"]) and of(["W"], SHARE=0) and of(NODULES=1, SHARE=0) and of(GEOMETRY=0.1, SHARE=0)
    assert [
        augment.changes_shape(AugmentConfig(**STILL | {k: 0.02})) for k in ("ROTATE", "SCALE", "SHIFT", "ELASTIC")
    ] == [True] * 4
    assert not augment.changes_shape(AugmentConfig(**STILL | dict(INTENSITY=0.1)))


def test_augment_flips_and_intensity():
    x = uniform(1, 8, 8, 8) * 0.5
    still, seen = AugmentConfig(**STILL), []
    for seed in range(40):
        got = augment.augment(x, np.random.default_rng(seed), still, ["D", "W"])
        seen += [[k for k in range(4) if torch.equal(got, x.flip(((), (1,), (3,), (1, 3))[k]) if k else x)][0]]
    assert sorted(set(seen)) == [0, 1, 2, 3] and min(seen.count(k) for k in range(4)) > 3
    ratios = [
        (augment.augment(x, np.random.default_rng(s), AugmentConfig(**STILL | dict(INTENSITY=0.2))) / x)
        for s in range(50)
    ]
    assert all(r.std() < 1e-4 for r in ratios)
    logs = [r.mean().log().item() for r in ratios]
    assert -0.2 <= min(logs) < -0.15 and 0.15 < max(logs) <= 0.2
    assert augment.augment(x / 0.5, np.random.default_rng(2), AugmentConfig(**STILL | dict(INTENSITY=0.9))).max() <= 1
    share = AugmentConfig(**STILL | dict(INTENSITY=0.2, SHARE=0.25))
    spared = sum(torch.equal(augment.augment(x, np.random.default_rng(s), share), x) for s in range(200))
    assert 130 < spared < 170
    c, grid = drr.cell_centres(8, 0.25), augment.warp_grid(8, np.random.default_rng(0), still)
    assert all(torch.allclose(grid[0, ..., k].movedim(2 - k, -1), c, atol=1e-6) for k in range(3))


def test_augment_warps_by_so_much():
    "Each key alone: its own kind of map, and no more than it says."
    grid = lambda seed, **change: augment.warp_grid(9, np.random.default_rng(seed), AugmentConfig(**STILL | change))[
        0
    ].double()
    still = grid(0)
    moves = [grid(s, SHIFT=0.1) - still for s in range(30)]
    assert all(m.std((0, 1, 2)).max() < 1e-6 for m in moves)
    assert 0.08 < max(m.abs().max() for m in moves) <= 0.1 + 1e-6
    sizes = [(grid(s, SCALE=0.1)[4, 4, 8, 0] / still[4, 4, 8, 0]).log().item() for s in range(60)]
    assert 0.09 < max(map(abs, sizes)) <= 0.1 * 4 / 3 + 1e-6 and min(sizes) < -0.05
    for seed in range(10):
        turned = grid(seed, ROTATE=30)
        torch.testing.assert_close(turned.norm(dim=-1), still.norm(dim=-1), rtol=1e-4, atol=1e-6)  # lengths stay
    # about D (W and H are exchanged) up to 30 degrees, about H and W a third of it
    corner = torch.stack([grid(s, ROTATE=30)[4, 4, 8] / still[4, 4, 8, 0] for s in range(300)])  # where +W is read
    about_d, about_h = (
        torch.rad2deg(torch.asin(corner[:, 1])).abs().max(),
        torch.rad2deg(torch.asin(corner[:, 2])).abs().max(),
    )
    assert 27 < about_d < 30.5 and 9 < about_h < 10.5
    bent = [grid(s, ELASTIC=0.02) - still for s in range(20)]
    assert 0.01 < torch.stack(bent).std() < 0.02 and all(b[..., k].std() > 1e-3 for b in bent for k in range(3))


def test_augment_rotation_matrices():
    q = math.pi / 2
    for angles, want in (
        ((q, 0, 0), [[0, -1, 0], [1, 0, 0], [0, 0, 1]]),
        ((0, q, 0), [[0, 0, -1], [0, 1, 0], [1, 0, 0]]),
        ((0, 0, q), [[1, 0, 0], [0, 0, -1], [0, 1, 0]]),
        ((q, q, 0), [[0, -1, 0], [0, 0, -1], [1, 0, 0]]),
    ):
        np.testing.assert_allclose(augment.rotation(angles), want, atol=1e-9)


def test_augment_nodules():
    ball = augment.lesion_shape(32, 2.0, (16, 10, 20), 22)
    assert ball.sum().item() * 8 == pytest.approx(math.pi / 6 * 22**3, rel=0.01) and ball[16, 10, 20] == 1
    middle = [
        (ball * torch.arange(32.0).view(shape)).sum().item() / ball.sum().item()
        for shape in ((32, 1, 1), (32, 1), (32,))
    ]
    assert middle == pytest.approx([16, 10, 20], abs=0.01)
    spiked = augment.lesion_shape(32, 2.0, (16, 10, 20), 22, 12, seed=1)
    assert spiked.sum() > 1.02 * ball.sum() and (spiked >= ball).all()
    assert not torch.equal(spiked, augment.lesion_shape(32, 2.0, (16, 10, 20), 22, 12, seed=2))
    assert augment.lesion_shape(32, 2.0, (0, 0, 31), 22).sum() == pytest.approx(
        0.18 * ball.sum().item(), rel=0.05
    )  # an octant, and half a voxel more on each side
    x = torch.full((1, 32, 32, 32), (-800 - WINDOW[0]) / 2524)
    hu = to_hu(augment.insert_lesion(x, ball, 40.0, WINDOW), WINDOW)[0]
    assert hu[16, 10, 20].item() == pytest.approx(40, abs=0.1) and hu[0, 0, 0].item() == pytest.approx(-800, abs=0.1)
    assert hu[ball > 0].sub(-800).div(ball[ball > 0]).std() < 0.5


def test_augment_sows_nodules_in_the_lungs():
    x = torch.full((1, 32, 32, 32), (40 - WINDOW[0]) / 2524)
    x[:, :, :, 16:] = (-800 - WINDOW[0]) / 2524
    numbers, hus, sizes = [], [], []
    for seed in range(60):
        got, share = augment.add_nodules(x, np.random.default_rng(seed), 1.5, 10.0, WINDOW)
        touched = share[0] > 0
        assert torch.equal(got[0][~touched], x[0][~touched]) and (share <= 1).all()
        numbers.append(bool(touched.any()))
        if (full := share[0] > 0.999).any():
            hus += to_hu(got[0][full], WINDOW).tolist()
            sizes.append(share.sum().item() * 1000)
        assert not touched.any() or touched[:, :, 16:].any()
    assert 60 * 0.6 < sum(numbers) < 60 * 0.95  # 1 - exp(-1.5) is 0.78
    assert min(hus) >= -101 and -100 <= min(hus) < 0 and 100 < max(hus) <= 201
    assert (
        max(sizes) < 3 * math.pi / 6 * 50**3
        and not augment.add_nodules(x, np.random.default_rng(0), 0.0, 10.0, WINDOW)[1].any()
    )
    soft = torch.full_like(x, (40 - WINDOW[0]) / 2524)
    assert torch.equal(augment.add_nodules(soft, np.random.default_rng(0), 20.0, 10.0, WINDOW)[0], soft)


def test_augment_views_of_a_detector():
    "Photons: mean and deviation of -log(counts) / mu; a tone curve keeps black and white; the geometry moves a little."
    y = torch.full((1, 2, 64, 64), 100.0)
    got = augment.add_photon_noise(y, torch.Generator().manual_seed(0), 1e4)
    counts = 1e4 * math.exp(-0.02 * 100)
    assert got.mean().item() == pytest.approx(100, abs=0.1) and got.std().item() == pytest.approx(
        1 / math.sqrt(counts) / 0.02, rel=0.05
    )
    assert augment.add_photon_noise(10 * y, torch.Generator(), 100.0).isfinite().all()
    image = uniform(2, 2, 4, 4)
    got = augment.random_gamma(image, torch.Generator().manual_seed(1), 0.5)
    gammas = got.log() / image.log()
    assert gammas.std((1, 2, 3)).max() < 1e-4 and abs(gammas[0].mean() - gammas[1].mean()) > 1e-3
    assert (gammas.log().abs() <= 0.5 + 1e-5).all()
    A = drr.Projector(geometry_of("x2ct"), 8, 40.0, 8)
    B = augment.jitter_geometry(A, np.random.default_rng(0), 0.05)
    ratios = [getattr(B.geometry, k) / getattr(A.geometry, k) for k in ("sad_mm", "sdd_mm", "panel_mm")]
    assert (
        len(set(ratios)) == 3
        and all(0 < abs(math.log(r)) <= 0.05 for r in ratios)
        and (B.size, B.mm, B.pixels) == (8, 40.0, 8)
    )


# --------------------------------------------------------------------------------- the same network, cut into pieces
BLOCKS = ["encoder", "time", "first", "down0", "down1", "mid", "up1", "up0", "last"]
PLANS = ["balanced", "seed3", {b: i % 3 for i, b in enumerate(BLOCKS)}, {b: 2 - i % 3 for i, b in enumerate(BLOCKS)}]


@pytest.mark.parametrize("plan", PLANS, ids=["balanced", "seed3", "interleaved", "reversed"])
@pytest.mark.parametrize("micro", [1, 3])
def test_parallel_plans_give_the_same_numbers(plan, micro):
    "Three devices that are all the CPU: outputs, gradients, and what travels where."
    net = weigh(diffusion.build_denoiser(load_config(sets=TINY), geometry_of("parallel"), 20.0))
    views, x = case(n=3)[1], noise(3, 1, 16, 16, 16)
    base = torch.full((3, 1, 16, 16, 16), 0.4)

    def run():
        net.zero_grad()
        out = net(x, torch.tensor([0.1, 0.5, 0.9]), net.condition(base, net.encode(views)))
        out.square().mean().backward()
        return out.detach(), {k: p.grad.clone() for k, p in net.named_parameters()}

    want, grads = run()
    assert len(grads) and all(g.abs().max() > 0 for g in grads.values())
    moves: list = []
    spread = parallel.DistributedUNet(
        net.unet, net.encoder, ["cpu"] * 3, plan, 16, micro, lambda v, at: moves.append(v) or v
    )
    assert list(spread.plan) == BLOCKS == list(parallel.named_blocks(net.unet, net.encoder))
    got, again = run()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for k in grads:
        assert (again[k] - grads[k]).norm() <= 1e-4 * grads[k].norm() + 1e-6, k
    sizes = {len(v) for v in moves if isinstance(v, torch.Tensor)}
    assert 1 in sizes if micro == 3 else sizes == {3}
    spread.undo()
    moves.clear()
    assert "forward" not in vars(net.unet) and not spread.hooks and torch.equal(run()[0], want)
    assert not moves


def test_parallel_the_forward_pass_as_data():
    net = network()
    flow = parallel.dataflow(net)
    assert list(flow) == BLOCKS[1:]
    assert flow["down0"] == (["h", "emb", "lifted0", "tokens"], ["h", "skip0.0", "skip0.1"])
    assert flow["mid"] == (["h", "emb", "lifted1", "tokens"], ["h"])
    assert flow["up0"] == (["h", "emb", "lifted0", "tokens", "skip0.0", "skip0.1"], ["h"])
    assert parallel.needed_tensors(flow, ["up1", "up0", "last"]) == [
        "h",
        "emb",
        "lifted1",
        "tokens",
        "skip1.0",
        "skip1.1",
        "lifted0",
        "skip0.0",
        "skip0.1",
    ]
    assert parallel.needed_tensors(flow, ["time", "first"]) == ["t", "x"]
    plain = parallel.dataflow(network(lift="none", cross=(False, False)))
    assert plain["mid"] == (["h", "emb"], ["h"])


def test_parallel_cutting_a_line_and_a_circle():
    costs = [3.0, 1, 4, 1, 5, 9, 2, 6]
    for n in range(1, 5):
        best = min(
            max(sum(costs[a:b]) for a, b in zip((0, *cuts), (*cuts, 8)))
            for cuts in itertools.combinations(range(1, 8), n - 1)
        )
        value, ends = parallel.line_partition(costs, n)
        assert value == best and ends[-1] == 8 and max(sum(costs[a:b]) for a, b in zip((0, *ends), ends)) == best
    names = dict(zip("abcdefgh", costs))
    plan = parallel.ring_partition(names, 3)
    loads = [sum(names[b] for b in names if plan[b] == d) for d in range(3)]
    assert plan["a"] == 0 and max(loads) == 11  # turned round; a line has 14
    assert max(sum(names[b] for b in names if pipeline.line_plan(names, 3)[b] == d) for d in range(3)) == 14
    assert parallel.original_partition(BLOCKS) == dict(
        encoder=0, time=0, first=0, down0=0, down1=1, mid=1, up1=1, up0=2, last=2
    )
    four = ["encoder", *(f"down{i}" for i in range(4)), "mid", *(f"up{i}" for i in (3, 2, 1, 0)), "last"]
    assert [parallel.original_partition(four)[b] for b in four] == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
    for bad, word in (
        ({"a": 0}, "does not place b"),
        ([list("abcdefgh"), ["a"]], "2 times"),
        ({"z": 0}, "not a block"),
        (dict.fromkeys("abcdefgh", 3), "on device 3"),
        (dict.fromkeys("abcdefgh", -1), "on device -1"),
        ("third", "no plan"),
    ):
        with pytest.raises(UserError, match=word):
            parallel.parse_plan(bad, names, 3)
    assert list(parallel.parse_plan([list("hgfe"), list("dcba")], names, 3).items()) == [
        (b, 1 - (b > "d")) for b in "abcdefgh"
    ]


def test_parallel_micro_batches_along_the_diagonal():
    log: list = []

    def walk(name):
        for k in range(2):
            log.append(f"{name} copies {k}")
            yield
            log.append(f"{name} works {k}")
            yield

    parallel.pipeline_schedule(walk(n) for n in "ab")
    assert log == [
        "a copies 0",
        "a works 0",
        "a copies 1",
        "b copies 0",
        "a works 1",
        "b works 0",
        "b copies 1",
        "b works 1",
    ]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_pipeline_parts_in_a_row_are_the_network(n):
    net = weigh(diffusion.build_denoiser(load_config(sets=TINY), geometry_of("parallel"), 20.0))
    lift = lambda maps: net.condition(net.mean, (maps, None)).lifted
    views, t, x = uniform(2, 2, 16, 16), torch.tensor([0.2, 0.8]), noise(2, 6, 16, 16, 16)
    maps, tokens = net.encoder(views)
    want = net.unet(x, t, lift(maps), tokens)
    costs = parallel.block_bytes(net.unet, net.encoder, 16)
    parts = pipeline.partition_model(net.unet, net.encoder, pipeline.line_plan(costs, n), lift)
    assert len(parts) == n and sum(len(p.blocks) for p in parts) == 9
    named = dict(views=views, t=t, x=x)
    values = tuple(named[k] for k in parts[0].takes)
    for p in parts:
        out = p(*values)
        values = out if isinstance(out, tuple) else (out,)
    torch.testing.assert_close(values[0], want, rtol=1e-4, atol=1e-5)
    for a, b in zip(parts, parts[1:]):
        assert a.gives == b.takes
    with pytest.raises(UserError, match="a pipeline is a line"):
        pipeline.partition_model(net.unet, net.encoder, {b: int(b == "mid") for b in BLOCKS}, lift)
    with pytest.raises(UserError, match="rank 1 without a block"):
        pipeline.partition_model(net.unet, net.encoder, {b: 2 * (b == "last") for b in BLOCKS}, lift)
    with pytest.raises(UserError, match="as many blocks"):
        pipeline.line_plan(costs, 10)


def test_pipeline_gradients_can_be_sent():
    x = torch.zeros(2, 3, requires_grad=True)
    seen: list = []
    x.register_hook(lambda g: seen.append(g.is_contiguous()))
    pipeline.Contiguous.apply(x).mT.backward(torch.ones(3, 2))
    assert seen == [True]


# --------------------------------------------------------------------------------------------------- several processes
@pytest.fixture
def three(monkeypatch):
    "Rank 1 of three processes, without any."
    monkeypatch.setattr(groups, "world_size", lambda: 3)
    monkeypatch.setattr(groups, "rank", lambda: 1)


def test_ranks_shares(three, monkeypatch):
    assert groups.rank_share(7) == [3, 4] and groups.rank_share(2) == [1]
    monkeypatch.setattr(groups, "rank", lambda: 0)
    assert groups.rank_share(7) == [0, 1, 2]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert groups.local_ranks() == (4, 2)
    monkeypatch.setattr(groups, "world_size", lambda: 1)
    assert groups.local_ranks() == (1, 0) and groups.rank_share(3) == [0, 1, 2]
    gpus = [torch.device("cuda", i) for i in range(4)]
    assert groups.local_devices(gpus, 2, 1) == gpus[2:] and groups.local_devices(gpus, 4, 1) == gpus[1:2]
    with pytest.raises(UserError, match="cannot be shared by 3"):
        groups.local_devices(gpus, 3, 0)
    assert groups.local_devices([torch.device("cpu")], 3, 2) == [torch.device("cpu")]


def test_ranks_first_total_and_same(three, monkeypatch):
    def arrive(told, value=None, error=None):
        assert told == [None]  # rank 1 has no result
        told[0] = (value, error)

    monkeypatch.setattr(groups.dist, "broadcast_object_list", partial(arrive, value=5))
    assert groups.on_rank_zero(lambda: pytest.fail("runs on rank 0 alone")) == 5
    monkeypatch.setattr(groups.dist, "broadcast_object_list", partial(arrive, error=UserError("no")))
    with pytest.raises(UserError, match="no"):
        groups.on_rank_zero(lambda: 1)
    monkeypatch.setattr(groups.dist, "all_reduce", lambda t: t.mul_(3))
    assert groups.all_reduce_sum({"a": 1.0, "b": 1 / 3}) == {"a": 3.0, "b": 1.0}

    def gather(out, mine):
        out[:] = [mine, mine, mine | {"BATCH_SIZE": "4"}]

    monkeypatch.setattr(groups.dist, "all_gather_object", gather)
    with pytest.raises(UserError, match="process 2 has BATCH_SIZE = 4, process 0 has 2"):
        groups.check_same_on_ranks({"BATCH_SIZE": 2, "SEED": 0})
    groups.check_same_on_ranks({"BATCH_SIZE": 4})
    monkeypatch.setattr(groups, "world_size", lambda: 1)
    assert groups.all_reduce_sum({"a": 1.0}) == {"a": 1.0} and groups.on_rank_zero(lambda: 3) == 3


def test_ranks_wrap_and_lost(three, monkeypatch):
    made: list = []
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda m, **how: made.append(how) or m)
    c = lambda *sets: load_config(sets=[*TINY, *sets])
    groups.wrap_loss(nn.Linear(1, 1), c())
    groups.wrap_loss(nn.Linear(1, 1), c("MODEL.CONDITIONING_ENCODER.LIFT=none"))
    groups.wrap_loss(nn.Linear(1, 1), c("MODEL.UNET.CROSS_ATTENTION_LEVELS=[false, false]"))
    groups.wrap_loss(nn.Linear(1, 1), c("PARALLEL=fsdp"))
    assert [m["find_unused_parameters"] for m in made] == [False, True, True]
    assert not any(m["broadcast_buffers"] for m in made)
    assert groups.is_lost_peer(RuntimeError("[gloo/transport/tcp/pair.cc] closed")) and groups.is_lost_peer(
        groups.dist.DistError("x")
    )
    assert not groups.is_lost_peer(RuntimeError("shape mismatch")) and not groups.is_lost_peer(
        ValueError("gloo/transport")
    )


# --------------------------------------------------------------------------------------------------------- checkpoints
def small_pair() -> tuple:
    c = load_config(sets=[*TINY, "MODEL.UNET.NUM_RES_BLOCKS=1"])
    raw, ema = (weigh(diffusion.build_denoiser(c, geometry_of("near"), 20.0)) for _ in "12")
    for p in raw.parameters():
        p.data += 1
    ema.mean.fill_(0.3)
    ema.usual.fill_(7.0)
    ema.scales.fill_(0.1)
    return c, raw, ema


def test_checkpoint_killed_between_the_two_files(tmp_path, monkeypatch):
    "The training state comes first: what a kill leaves behind is no model that nobody can go on from."
    c, raw, ema = small_pair()
    meta = checkpoint.describe(ema, c, step=1)
    checkpoint.save_checkpoint(tmp_path, 1, raw, ema, dict(w=torch.ones(1)), meta)
    whole = {p.name for p in tmp_path.iterdir()}
    real, calls = checkpoint.write_with_checksum, []

    def once(path, write):
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(path, write)

    monkeypatch.setattr(checkpoint, "write_with_checksum", once)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(tmp_path, 2, raw, ema, dict(w=torch.ones(1)), meta)
    assert calls == ["training_000002.pt", "model_000002.safetensors"]
    assert checkpoint.newest_model(tmp_path).name == "model_000001.safetensors"
    monkeypatch.setattr(checkpoint, "write_with_checksum", real)
    assert checkpoint.load_training(tmp_path, raw, ema)["step"] == 1
    (tmp_path / ".tmp-dead").touch()
    checkpoint.prune_checkpoints(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == whole


def test_checkpoint_holds_both_networks_and_goes_on_from_the_newest(tmp_path):
    c, raw, ema = small_pair()
    for step in (9, 100):
        raw.unet.first.bias.data.fill_(step)
        checkpoint.save_checkpoint(
            tmp_path, step, raw, ema, dict(norms=[float(step)]), checkpoint.describe(ema, c, step=step)
        )
    _, raw2, ema2 = small_pair()
    for net in (raw2, ema2):
        for v in net.state_dict().values():
            v.zero_()
    state = checkpoint.load_training(tmp_path, raw2, ema2)
    assert (
        state == {"step": 100, "norms": [100.0]}
        and checkpoint.newest_model(tmp_path).name == "model_000100.safetensors"
    )
    for (k, a), b in zip(ema.state_dict().items(), ema2.state_dict().values()):
        assert torch.equal(a, b), k
    for (k, a), b in zip(raw.named_parameters(), raw2.parameters()):
        assert torch.equal(a, b), k
    assert (raw2.mean == ema.mean).all() and (raw2.usual == 7).all() and raw2.scales[0] == ema.scales[0]
    model = checkpoint.load_model(tmp_path)
    assert not model.denoiser.training and model.meta["step"] == 100 and model.config == c
    assert (model.denoiser.A.geometry, model.denoiser.A.mm) == (geometry_of("near"), 20.0)
    for (k, a), b in zip(ema.state_dict().items(), model.denoiser.state_dict().values()):
        assert torch.equal(a, b), k
    checkpoint.save_model(tmp_path / "best.safetensors", raw, checkpoint.describe(raw, c, step=50))
    assert checkpoint.model_file(tmp_path).name == "best.safetensors"
    assert not [k for k in checkpoint.safe_open(tmp_path / "best.safetensors", "pt").keys() if k.startswith("raw.")]
    checkpoint.save_checkpoint(tmp_path, 101, raw, ema, {}, checkpoint.describe(ema, c, step=101))
    left = sorted(p.name for p in tmp_path.glob("[mt]*"))
    assert left == [f"{n}_000{s}.{e}" for n, e in (("model", "safetensors"), ("training", "pt")) for s in (100, 101)]
    data = bytearray((tmp_path / "training_000101.pt").read_bytes())
    data[100] ^= 1
    (tmp_path / "training_000101.pt").write_bytes(data)
    assert checkpoint.load_training(tmp_path, raw2, ema2)["step"] == 100


def test_checkpoint_older_formats(tmp_path):
    "One scale for all bands; an encoder whose input was neither enlarged nor freed of its mean."
    meta = {"config": {"DATA": {"TARGET_DRR_SIZE": 16}}}
    got = checkpoint.upgrade_2_to_3(
        {"scale": torch.tensor(0.2), "coarse.scale": torch.tensor(0.3), "w": torch.ones(1)}, meta
    )
    assert got.keys() == {"scales", "coarse.scales", "w"} and got["scales"].tolist() == pytest.approx([0.2] * 2)
    stem = uniform(4, 3, 5, 5)
    got = checkpoint.upgrade_3_to_4({"encoder.stem.weight": stem, "coarse.encoder.stem.weight": stem}, meta)
    assert torch.equal(got["encoder.stem.weight"][:, 0], stem[:, 0] / 8) and torch.equal(
        got["encoder.stem.weight"][:, 1:], stem[:, 1:]
    )
    assert got["usual"].shape == (2, 16, 16) and got["coarse.usual"].shape == (2, 8, 8) and not got["usual"].any()


# ------------------------------------------------------------------------------------------------------------- lesions
def chest() -> torch.Tensor:
    "Labels of a chest of boxes, (D, H, W) of 20: two lungs, a heart between and before them, bone behind."
    v = torch.full((20, 20, 20), LABELS["air"])
    v[2:18, 3:17, 2:18] = LABELS["body"]
    v[4:14, 5:14, 3:8], v[4:14, 5:14, 12:17] = LABELS["lung_right"], LABELS["lung_left"]
    v[6:12, 6:9, 7:14] = LABELS["heart"]  # reaches into both lungs
    v[4:14, 10:12, 9:11] = LABELS["trachea"]
    return v


def test_lesions_sites():
    v = chest()
    lung = (v == LABELS["lung_right"]) | (v == LABELS["lung_left"])
    of = {k: lesions.lesion_region(v, k) for k in ("lung", "retrocardiac", "mediastinum", "chest wall")}
    assert torch.equal(of["lung"], lung)
    d, h, w = of["retrocardiac"].nonzero().T
    assert (
        set(h.tolist()) == set(range(9, 14)) and set(d.tolist()) == set(range(6, 12)) and set(w.tolist()) == {7, 12, 13}
    )
    d, h, w = of["mediastinum"].nonzero().T
    assert (w.min(), w.max()) == (7, 13) and not (of["mediastinum"] & ((v == LABELS["trachea"]) | lung)).any()
    assert of["mediastinum"][8, 7, 9] and of["mediastinum"][5, 12, 9]
    d, h, w = of["chest wall"].nonzero().T
    assert set(w.tolist()) == {2, 17} and set(d.tolist()) == set(range(4, 14)) and set(h.tolist()) == set(range(5, 14))


def test_lesions_spots_and_correlation():
    x, k = uniform(8, 8, 8), torch.zeros(8, 8, 8)
    k[4, 4, 4], k[5, 4, 3] = 2.0, 1.0
    torch.testing.assert_close(lesions.correlate(x, k), 2 * x + x.roll((-1, 1), (0, 2)), rtol=1e-4, atol=1e-5)
    mask = torch.zeros(20, 20, 20, dtype=torch.bool)
    mask[4:13, 4:13, 4:13] = True
    found = lesions.lesion_centres(mask, 50, 10.0, 500)
    shares = {
        p: (augment.lesion_shape(20, 10.0, p, 50) * mask).sum() / augment.lesion_shape(20, 10.0, p, 50).sum()
        for p in found
    }
    assert min(shares.values()) >= 0.8 - 1e-4 and (8, 8, 8) in found and (4, 8, 8) not in found and (5, 8, 8) in found
    assert len(lesions.lesion_centres(mask, 50, 10.0, 3)) == 3 and lesions.lesion_centres(
        mask, 50, 10.0, 3
    ) != lesions.lesion_centres(mask, 50, 10.0, 3, 1)
    assert lesions.lesion_centres(mask, 160, 10.0, 4)  # nowhere four fifths: as much as ever is


def test_lesions_template_is_ball_minus_shell():
    t = lesions.lesion_template(24, 10.0, (12, 12, 12), 40)
    r = (torch.stack(torch.meshgrid(*[torch.arange(24.0)] * 3, indexing="ij")) - 12).norm(dim=0) * 10
    assert t.sum().abs() < 1e-4 and t.clamp(min=0).sum().item() == pytest.approx(1, abs=1e-3)
    assert (t[r < 15] > 0).all() and (t[(r > 38) & (r < 42)] < 0).all() and not t[r > 60].any()
    assert lesions.auc([4, 5, 6], [1, 2, 3])[0] == pytest.approx(1) and lesions.auc([1, 2], [3, 4])[0] == 0
    assert lesions.auc([3, 1, 5], [1, 4, 3])[0] == pytest.approx(
        (0 + 0.5 + 0.5 + 0 + 1 + 1) / 6
    )  # never against its own spot
    _, lo, hi = lesions.auc([1.0, 3, 2, 5, 4, 2.5], [0.0, 2, 3, 1, 4.5, 2])
    assert 0 <= lo < 0.79 < hi <= 1


def test_lesions_verdict_by_hand():
    "Half of the contrast, moved by two voxels along H, with a second ball elsewhere."
    n, mm, at = 24, 10.0, (12, 10, 12)
    healthy = torch.full((1, n, n, n), 0.2)
    healthy[0, 11:14, 10, 12] = 0.5  # a vessel where the lesion will be
    ball = lambda p, d=40: augment.lesion_shape(n, mm, p, d)
    truth = healthy + 0.4 * ball(at)
    mine = lambda *parts: healthy + sum(w * ball(p) for p, w in parts)
    judged = lambda after: lesions.lesion_metrics(after, healthy, truth, healthy, at, 40, mm, WINDOW)
    full, half, ghost = judged(truth), judged(mine((at, 0.2))), judged(mine((at, 0.2), ((12, 10, 3), 0.15)))
    t = lesions.lesion_template(n, mm, at, 40)
    assert full["contrast"] == pytest.approx(1, abs=1e-4) and half["contrast"] == pytest.approx(0.5, abs=1e-3)
    assert full["response"] == pytest.approx((t * truth[0]).sum().item() * 2524, rel=1e-3)
    assert (full["ghosts"], half["ghosts"], ghost["ghosts"]) == (0, 0, 1)
    assert judged(mine((at, 0.2), ((12, 10, 3), 0.05)))["ghosts"] == 0  # less than half of the answer
    moved = judged(mine(((12, 12, 11), 0.4)))
    assert [moved[f"off_{k}"] for k in "dhw"] == [0, 20, 10]
    known = mine((at, 0.1))  # a reconstruction without the lesion that is not the healthy patient
    assert lesions.lesion_metrics(known + 0.2 * ball(at), known, truth, healthy, at, 40, mm, WINDOW)[
        "contrast"
    ] == pytest.approx(0.5, abs=1e-3)
    twice = lesions.lesion_metrics(mine((at, 0.2)), healthy, healthy + 0.8 * ball(at), healthy, at, 40, mm, WINDOW)
    assert twice["contrast"] == pytest.approx(0.25, abs=1e-3)  # of what was planted


def test_lesions_measures_by_hand():
    "Lungs in litres and overlap, the spine in millimetres, the ratio of heart and thorax, HU by tissue."
    v = chest()
    assert lesions.outside_beams(v, torch.zeros(20, 20, 20)).sum() == (v != 0).sum()
    seen = torch.zeros(20, 20, 20)
    seen[:, :, 10:] = 1
    assert set(lesions.outside_beams(v, seen).nonzero()[:, 2].tolist()) == set(
        range(2, 9)
    )  # not what lies outside a beam
    hu = torch.tensor([-1000.0, 40, -100, -800, -800, -1000, 40, 40, 600, 60, 50, 30, 30, 50])[v]
    hu[:, 14:16, 9:11] = torch.where(v[:, 14:16, 9:11] > 0, 600.0, -1000.0)  # the spine
    x = ((hu - WINDOW[0]) / 2524)[None]
    o = lesions.organ_masks(x, WINDOW)
    dense = hu > -400
    assert o["body"][8, 8, 5] and not o["body"][8, 1, 5] and torch.equal(o["lung"], o["body"] & ~dense)
    spine = o["spine"][2:18]
    assert torch.allclose(spine[:, 0], torch.tensor(14.5)) and torch.allclose(spine[:, 1], torch.tensor(9.5))
    assert o["ratio"] == pytest.approx(4 / 14)
    drawn = lesions.organ_labels(x, WINDOW)
    assert (drawn[8, 12, 3:8] == LABELS["lung_right"]).all() and (drawn[8, 12, 12:17] == LABELS["lung_left"]).all()
    assert drawn[8, 15, 9] == LABELS["bone"] and drawn[8, 4, 4] == LABELS["body"] and drawn[0, 0, 0] == LABELS["air"]
    less = x.clone()
    less[0, 4:9, 5:14, 3:8] = (40 - WINDOW[0]) / 2524  # half of the right lung filled
    less[0][v == LABELS["lung_left"]] += 50 / 2524
    m = lesions.organ_metrics(less, x, v, 10.0, WINDOW)
    lost = ((v[4:9, 5:14, 3:8] == LABELS["lung_right"]).sum().item()) / 1000
    assert m["lung_litres"] == pytest.approx(-lost, abs=0.02) and m["hu_lung_left"] == pytest.approx(50, abs=0.1)
    a, b = lesions.organ_masks(less, WINDOW)["lung"], o["lung"]
    assert m["lung_dice"] == pytest.approx(2 * (a & b).sum().item() / (a.sum() + b.sum()).item())
    assert m["body_dice"] == 1 and m["spine_mm"] == 0
    wider = x.clone()
    wider[0, 4:14, 5:14, 12] = (40 - WINDOW[0]) / 2524
    assert lesions.organ_metrics(wider, x, v, 10.0, WINDOW)["ratio"] == pytest.approx(1 / 14)
    shifted = lesions.organ_metrics(x.roll(1, 3), x, v, 10.0, WINDOW)
    assert shifted["spine_mm"] == pytest.approx(10) and math.isnan(m["hu_liver"])


def test_lesions_heart_and_thorax():
    lung = torch.zeros(8, 4, 20, dtype=torch.bool)
    lung[:, :, 1:19] = True  # a thorax of 18 voxels
    lung[7, :, 16:] = False  # narrower further down
    lung[6, 1:, 7:13] = False  # a heart of 6, through most of the depth, low down
    lung[1, :, 6:15] = False  # a wider one high up does not count
    assert lesions.shadow_ratio(lung) == pytest.approx(6 / 18)


if __name__ == "__main__":
    with torch.no_grad():
        found = {name: [float(f"{v:.7g}") for v in fingerprint(make())] for name, make in ANSWERS.items()}
    STORED.write_text("{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "\n}\n")
