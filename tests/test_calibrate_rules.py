"Rules of calibration, each by a small case worked out by hand."

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import diffx2ct.calibrate as calibrate
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
from diffx2ct.data import to_unit
from diffx2ct.drr import Projector, geometry
from diffx2ct.phantom import phantom

WINDOW, N = (-1024.0, 1500.0), 32


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    "Numbers of a normal distribution, the same each time."
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
    images, *_ = draw_batch([torch.zeros(1)], [torch.ones(1)], None, WINDOW, np.random.default_rng(0), c)
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


def test_small_films_count_with_their_own_width():
    "Films narrower than half of the detector are compared too; films without a common row differ most."
    y, seen = torch.zeros(2, 16, 16), torch.zeros(2, 16, 16)
    y[0, 4:8, 5:10], y[1, 8:12, 5:10] = 1.0, 1.0
    seen[:, 4:12, 5:10] = 1
    assert mass_difference(y, seen) == pytest.approx(2)
    seen[0, 8:], seen[1, :8] = 0, 0
    assert mass_difference(y, seen) == 2
