"Rules of films, of their calibration and their place, and of the optimizer, each by a small case worked out by hand."

import math
from collections import Counter
from dataclasses import astuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffx2ct.align as align
import diffx2ct.calibrate as calibrate
from diffx2ct.align import Placement, align_pair, find_bars, fit_height, on_detector, recognise, shrink
from diffx2ct.calibrate import (
    Calibrator,
    CalibratorConfig,
    JoinViews,
    cut_height,
    draw_batch,
    film_case,
    learning_rate,
    mass_difference,
    match_quantiles,
)
from diffx2ct.data import load_config, to_unit
from diffx2ct.diffusion import build
from diffx2ct.drr import Projector, geometry
from diffx2ct.optimizer import Muon, make_optimizer, orthogonalize
from diffx2ct.phantom import phantom
from diffx2ct.radiograph import (
    CT_KEV,
    ENERGIES,
    FilmSettings,
    add_noise,
    attenuation,
    collimation,
    film,
    local_contrast,
    moved,
    open_field,
    randomise,
    scatter,
    tissue_integrals,
)

WINDOW, N = (-1024.0, 1500.0), 32
SQUARE = Projector(geometry("parallel", 320), N, 320 / N, N)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    "Numbers of a normal distribution, the same each time."
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Optimizer


def test_orthogonal_matrices_have_singular_values_near_one():
    for shape in ((8, 20), (20, 8)):
        m = drawn(*shape)
        values = torch.linalg.svdvals(orthogonalize(m))
        assert 0.65 < values.min() and values.max() < 1.25, values
        u, _, v = torch.linalg.svd(m, full_matrices=False)
        assert F.cosine_similarity(orthogonalize(m).flatten(), (u @ v).flatten(), 0) > 0.97


def test_two_steps_are_those_of_the_equation():
    "Nesterov momentum, decay by the learning rate, a step of 0.2 root mean square whatever the shape."
    p, lr, decay, mu = nn.Parameter(drawn(6, 30)), 0.02, 0.1, 0.9
    optimizer, by_hand, m = Muon([dict(params=[p], muon=True)], lr, decay, mu), p.detach().clone(), torch.zeros(6, 30)
    for step in (1, 2):
        p.grad = drawn(6, 30, seed=step)
        m = mu * m + (1 - mu) * p.grad
        by_hand = by_hand * (1 - lr * decay) - 0.2 * lr * 30**0.5 * orthogonalize(mu * m + (1 - mu) * p.grad)
        optimizer.step()
        torch.testing.assert_close(p.detach(), by_hand, rtol=1e-4, atol=1e-6)


def test_the_last_layer_and_places_are_left_to_adamw_and_all_weights_decay():
    sets = ["MODEL.SCALE=0.25", "DATA.TARGET_VOLUME_SIZE=16", "DATA.TARGET_DRR_SIZE=16", "TRAINING.PATCH_SIZE=16"]
    c = load_config(sets=[*sets, "TRAINING.OPTIMIZER=muon", "TRAINING.WEIGHT_DECAY=0.03"])
    denoiser = build(c, geometry("parallel", 320.0), 20.0)
    optimizer = make_optimizer(denoiser, c)
    held = {id(p): g["muon"] for g in optimizer.param_groups for p in g["params"]}
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.03, 0.03]
    for name, p in denoiser.named_parameters():
        assert held[id(p)] == (p.ndim > 1 and not name.startswith(("unet.last.", "encoder.place"))), name


# Films


def test_light_of_the_open_beam():
    field = open_field((5, 5), 10.0, heel=0.5)
    assert field[4, 2] > field[2, 2] > field[0, 2] and field[2, 2] == 1
    full = open_field((101, 101), 4.0, heel=0.5)[:, 50]
    assert (full[-1] / full[0]).item() == pytest.approx(1.5, rel=0.02)  # lower edge over upper edge, minus one: 0.5
    flat = open_field((3, 3), 100.0, heel=0.0, sdd_mm=100.0)
    assert flat[1, 2].item() == pytest.approx(2**-1.5)  # inverse square, and cosine of the angle of incidence


def test_scatter_is_none_in_air_and_grows_with_thickness():
    slab = lambda mm: torch.full((8, 8), math.exp(-0.02 * mm))
    for mm in (0, 100, 200, 300):
        torch.testing.assert_close(scatter(slab(mm), 0.8, 2.0), 0.8 * slab(mm) * mm / 200, rtol=1e-4, atol=1e-6)


def test_bone_and_water_attenuate_alike_at_the_energy_of_a_ct():
    at = [np.interp(math.log(CT_KEV), np.log(ENERGIES), attenuation(what).log().numpy()) for what in ("water", "bone")]
    assert at[0] == pytest.approx(at[1], abs=1e-4)


def test_noise_follows_the_light_and_the_readout():
    for level in (1.0, 0.02):
        noise = add_noise(torch.full((200, 200), level), 2e4, 3.0, torch.Generator().manual_seed(0)).std().item()
        assert noise == pytest.approx(math.sqrt(2e4 * level + 9) / 2e4, rel=0.03)


@pytest.mark.parametrize("edge, where", [("top", np.s_[:3]), ("bottom", np.s_[-3:]), ("left", 0), ("right", 0)])
def test_each_edge_is_collimated_at_its_side(edge, where):
    open_ = collimation((20, 20), 1.0, FilmSettings(**{f"{edge}_mm": 3.0}))
    shut = {"left": open_[:, :3], "right": open_[:, -3:]}.get(edge, open_[where])
    assert not shut.any() and open_.sum() == 20 * 17


def test_what_belongs_to_a_machine_is_that_of_the_other_film():
    for seed in range(20):
        first = randomise(np.random.default_rng(seed))
        second = randomise(np.random.default_rng(seed + 100), first)
        for name, f in FilmSettings.model_fields.items():
            if f.json_schema_extra and not f.json_schema_extra["exposure"]:
                assert getattr(first, name) == getattr(second, name), name
        assert first.photons != second.photons


def test_latitude_is_the_share_of_coarse_contrast_that_is_left():
    ramp = torch.zeros(64, 64)
    ramp[:, 32:] = 1
    kept = local_contrast(ramp, 0.0, 4.0, 0.5)
    assert (kept[32, -1] - kept[32, 0]).item() == pytest.approx(0.5, abs=0.02)


def test_the_window_is_measured_inside_the_collimator():
    "A film keeps its grey values where a part of it without contrast is shut."
    t = torch.linspace(0, 300, 40).expand(40, 40)
    t = torch.cat([t, torch.full((40, 40), 900.0)])  # the lower half is far denser
    s = dict(scatter=0, heel=0, blur_mm=0, photons=1e9, electronic=0, detail=0, latitude=1, slope=0, bars=0, bits=16)
    got = film(t, 0 * t, 1.0, FilmSettings(**s, bottom_mm=40))
    assert got[20].max() > 0.9 and got[20].min() < 0.1 and not got[-1].any()


def test_a_patient_who_moves_is_another_one_in_the_lateral_view():
    now, later = drawn(2, 1, N, N, N).abs().unbind(0)
    got = tissue_integrals(now[None], SQUARE, lateral=later[None])
    one, other = (tissue_integrals(v[None], SQUARE) for v in (now, later))
    for g, a, b in zip(got, one, other):
        torch.testing.assert_close(g, torch.stack([a[:, 0], b[:, 1]], 1))


def test_a_breath_moves_the_lower_end_and_leaves_the_upper_one():
    rows = torch.arange(N).float()[:, None, None].expand(1, 1, N, N, N)
    shift = (moved(rows, breath=0.2) - rows)[0, 0, :, N // 2, N // 2].abs()
    assert shift[1] < 0.2 and shift[-8] > 2 * shift[8] > 0.5


# Calibration


def test_rows_of_a_view_are_joined_with_those_of_the_other():
    f, join = drawn(4, 8, 6, 6), JoinViews(8)
    nn.init.zeros_(join.mix.weight)
    nn.init.zeros_(join.mix.bias)
    join.mix.weight.data[:, 8:, 0, 0] = torch.eye(8)  # only what comes from the other view
    for i, other in enumerate((1, 0, 3, 2)):
        torch.testing.assert_close(join(f)[i] - f[i], f[other].mean(-1, keepdim=True).expand(8, 6, 6))


def test_masked_pixels_are_neither_read_nor_shown():
    torch.manual_seed(0)
    net, image, seen = Calibrator([8, 8]), drawn(1, 2, 16, 16).sigmoid(), torch.ones(1, 2, 16, 16)
    seen[:, 0, :8], black = 0, image.clone()
    black[:, 0, :8] = 0
    assert not net(image, seen)[:, 0, :8].any()  # before training the film itself
    nn.init.normal_(net.fields.weight, 0, 0.1)
    torch.testing.assert_close(net(image, seen), net(black, seen))


def test_scans_end_at_the_head_at_the_feet_or_at_both():
    x, found = torch.ones(1, N, 2, 2), Counter()
    for seed in range(60):
        rows = cut_height(x, np.random.default_rng(seed))[0, :, 0, 0]
        found[(bool(rows[0]), bool(rows[-1]))] += 1
    assert all(found[ends] > 5 for ends in ((False, True), (True, False), (False, False))), found


@pytest.fixture(scope="module")
def chest() -> tuple[torch.Tensor, Projector]:
    "A patient as a unit volume, and the detector."
    return to_unit(phantom(0, N, 384 / N)[0], WINDOW)[None], Projector(geometry("chest", 384), N, 384 / N, N)


def test_a_patient_who_moves_does_so_in_the_views(chest):
    quiet = dict(CUT_SHARE=0, FILMS=1, MASK_SHARE=0)
    still, moving = (
        film_case(*chest, WINDOW, np.random.default_rng(1), CalibratorConfig(**quiet, MOVE_SHARE=share))[0][2]
        for share in (0, 1)
    )
    torch.testing.assert_close(still[0], moving[0])
    assert (still[1] - moving[1]).abs().max() > 5


def test_two_films_have_each_their_exposure_and_letters_are_masked(chest, monkeypatch):
    settings, letters = [], []

    def films(water, bone, A, pair, generator):
        settings.append(pair)
        return torch.full((2, N, N), 0.25)

    def letter(image, rng):
        seen = torch.ones_like(image)
        seen[2:5, 2:5] = 0
        letters.append(seen)
        return seen

    monkeypatch.setattr(calibrate, "film_pair", films)
    monkeypatch.setattr(calibrate, "add_letter", letter)
    c = CalibratorConfig(FILMS=12, MASK_SHARE=1)
    cases = film_case(*chest, WINDOW, np.random.default_rng(0), c)
    assert all(a.photons != b.photons and a.kvp == b.kvp for a, b in settings)
    hidden = sum(not m[2:5, 2:5].any() for _, masks, _ in cases for m in masks)
    assert hidden >= len(letters) > 2


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_real_chests(share, monkeypatch):
    monkeypatch.setattr(calibrate, "film_case", lambda x, *_: [(x, x, x)])
    c = CalibratorConfig(REAL_SHARE=share, PATIENTS=6)
    images, *_ = draw_batch([torch.zeros(1)], [torch.ones(1)], SQUARE, WINDOW, np.random.default_rng(0), c)
    assert images.mean() == share


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    c = CalibratorConfig(STEPS=1000, LEARNING_RATE=0.5)
    assert learning_rate(0, c) == pytest.approx(0.01) and learning_rate(49, c) == pytest.approx(0.5, rel=0.01)
    assert learning_rate(500, c) == pytest.approx(0.25) and learning_rate(999, c) < 1e-5


def test_rows_that_one_view_hides_do_not_count():
    y, seen = torch.ones(2, 10, 10), torch.ones(2, 10, 10, dtype=torch.bool)
    y[1, :3], seen[1, :3] = 9, False
    assert mass_difference(y, seen) == pytest.approx(0, abs=1e-6) and mass_difference(y) > 0.5


def test_matched_values_are_the_quantiles_in_the_middle_of_each_rank():
    image = torch.arange(4.0).view(1, 2, 2).expand(2, 2, 2)
    known = torch.arange(101.0).expand(2, 101)
    got = match_quantiles(image, known)
    torch.testing.assert_close(got.flatten(1), torch.tensor([12.5, 37.5, 62.5, 87.5]).expand(2, 4))


# Place


def patches() -> torch.Tensor:
    "Two views without symmetry, (2, 64, 64), bright towards the middle."
    rough = F.interpolate(drawn(1, 2, 6, 6, seed=4), (64, 64), mode="bicubic", align_corners=False)[0]
    ball = 1 - torch.linspace(-1, 1, 64)[:, None] ** 2 - torch.linspace(-1, 1, 64) ** 2
    return rough + ball


def test_a_film_lies_where_its_place_is():
    film, seen = torch.ones(10, 10), torch.ones(10, 10, dtype=torch.bool)
    for row, column in ((0.25, 0.0), (0.0, 0.25), (-0.25, 0.25)):
        _, covered = on_detector(film, seen, Placement(0.2, row, column), 40)
        middle = covered.nonzero().float().mean(0) / 40 - 0.4875
        torch.testing.assert_close(middle, torch.tensor([row, column]), atol=0.02, rtol=0)


def test_masked_pixels_of_a_film_do_not_count_in_a_cell():
    grey, seen = torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool)
    grey[0, 0], seen[0, 0] = 99, False
    assert torch.equal(shrink(grey, seen, (2, 2))[0], torch.ones(2, 2))


@pytest.mark.parametrize("edge", ["top", "bottom", "left", "right"])
def test_a_bar_is_found_at_each_edge(edge):
    v, bar = drawn(64, 64).sigmoid(), torch.zeros(64, 64, dtype=torch.bool)
    {"top": bar[:8], "bottom": bar[-8:], "left": bar[:, :8], "right": bar[:, -8:]}[edge][:] = True
    v[bar] = 0
    got = find_bars(v)
    assert got[bar].all() and got[~bar].float().mean() < 0.1


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("inverted", [(False, False), (True, False), (False, True), (True, True)])
def test_exchanged_inverted_and_mirrored_films_are_recognised(exchanged, inverted):
    views, seen = patches(), torch.ones(64, 64, dtype=torch.bool)
    for mirrored in (False, True):
        films = [views[0], views[1].flip(1) if mirrored else views[1]]
        films = [-f if i else f for f, i in zip(films, inverted)]
        got = recognise(films[::-1] if exchanged else films, (seen, seen), views)
        assert (got.exchanged, got.inverted, got.mirrored) == (exchanged, inverted, mirrored)
        assert min(got.margins.values()) > 0


def test_films_that_are_as_like_either_way_are_not_exchanged(monkeypatch):
    "The margin speaks for the order that the user gave."
    monkeypatch.setattr(align, "likeness", lambda g, m, r: (0.5, -0.5))
    seen = torch.ones(64, 64, dtype=torch.bool)
    assert not recognise(list(patches()), (seen, seen), patches()).exchanged


def test_each_film_is_laid_on_its_own_view():
    views = patches()
    films, seen = [views[0][8:], views[1][:, 6:]], None
    seen = [torch.ones_like(f, dtype=torch.bool) for f in films]
    first, second = align_pair(films, seen, views)
    for got, want in ((first, (56 / 64, 4 / 64, 0)), (second, (1, 0, 3 / 64))):
        assert astuple(got)[:3] == pytest.approx(want, abs=0.06) and got.likeness > 0.8, (got, want)


def test_height_and_scale_of_the_lateral_film_are_fitted():
    blob = torch.exp(-(((torch.linspace(-1, 1, 64)[:, None] - 0.1) / 0.4) ** 2)) * torch.ones(64, 64)
    blob, seen = blob + torch.linspace(0, 0.3, 64)[:, None], torch.ones(64, 64, dtype=torch.bool)
    for wrong in (Placement(1.06, 0, 0), Placement(1, 0.06, 0)):
        places = Placement(1, 0, 0), wrong
        got = fit_height([blob, blob], [seen, seen], places, 64, lambda image, seen: image)
        assert (got.height, got.row) == pytest.approx((1, 0), abs=0.025)
