"Rules of alignment, each by a small case worked out by hand."

import math
from dataclasses import astuple

import pytest
import torch
import torch.nn.functional as F

import diffx2ct.align as align
from diffx2ct.align import Placement, align_pair, find_bars, fit_height, masked_average, recognise, resample_to_detector


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    "Numbers of a normal distribution, the same each time."
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def patches() -> torch.Tensor:
    "Two views without symmetry, (2, 64, 64), bright towards the middle."
    rough = F.interpolate(drawn(1, 2, 6, 6, seed=4), (64, 64), mode="bicubic", align_corners=False)[0]
    ball = 1 - torch.linspace(-1, 1, 64)[:, None] ** 2 - torch.linspace(-1, 1, 64) ** 2
    return rough + ball


def test_a_film_lies_where_its_place_is():
    film, seen = torch.ones(10, 10), torch.ones(10, 10, dtype=torch.bool)
    for row, column in ((0.25, 0.0), (0.0, 0.25), (-0.25, 0.25)):
        _, covered = resample_to_detector(film, seen, Placement(0.2, row, column), 40)
        middle = covered.nonzero().float().mean(0) / 40 - 0.4875
        torch.testing.assert_close(middle, torch.tensor([row, column]), atol=0.02, rtol=0)


def test_masked_pixels_of_a_film_do_not_count_in_a_cell():
    grey, seen = torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool)
    grey[0, 0], seen[0, 0] = 99, False
    assert torch.equal(masked_average(grey, seen, (2, 2))[0], torch.ones(2, 2))


@pytest.mark.parametrize("edge", ["top", "bottom", "left", "right"])
def test_a_bar_is_found_at_each_edge(edge):
    v, bar = drawn(64, 64).sigmoid(), torch.zeros(64, 64, dtype=torch.bool)
    {"top": bar[:8], "bottom": bar[-8:], "left": bar[:, :8], "right": bar[:, -8:]}[edge][:] = True
    v[bar] = 0
    got = find_bars(v)
    assert got[bar].all() and got[~bar].float().mean() < 0.1


def test_films_that_are_as_like_either_way_are_not_exchanged(monkeypatch):
    "The margin speaks for the order that the user gave."
    monkeypatch.setattr(align, "peak_score", lambda g, m, r: (0.5, -0.5))
    seen = torch.ones(64, 64, dtype=torch.bool)
    assert not recognise(list(patches()), (seen, seen), patches()).exchanged


@pytest.mark.parametrize(
    "exchanged, inverted, mirrored",
    [
        (False, (False, False), False),
        (False, (True, False), True),
        (True, (False, True), False),
        (True, (True, True), True),
    ],
)
def test_exchanged_inverted_and_mirrored_films_are_recognised(exchanged, inverted, mirrored):
    views, seen = patches(), torch.ones(64, 64, dtype=torch.bool)
    films = [views[0], views[1].flip(1) if mirrored else views[1]]
    films = [-f if i else f for f, i in zip(films, inverted)]
    got = recognise(films[::-1] if exchanged else films, (seen, seen), views)
    assert (got.exchanged, got.inverted, got.mirrored) == (exchanged, inverted, mirrored)
    assert min(got.margins.values()) > 0


def test_each_film_is_laid_on_its_own_view():
    views = patches()
    films, seen = [views[0][8:], views[1][:, 6:]], None
    seen = [torch.ones_like(f, dtype=torch.bool) for f in films]
    first, second = align_pair(films, seen, views)
    for got, want in ((first, (56 / 64, 4 / 64, 0)), (second, (1, 0, 3 / 64))):
        assert astuple(got)[:3] == pytest.approx(want, abs=0.06) and got.likeness > 0.8, (got, want)


def test_the_whole_detector_costs_nothing_and_every_other_place_does():
    here, away = torch.zeros(1), torch.tensor([0.25])
    assert align.place_cost(here, here, 1.0, (64, 64), False).item() == 0
    assert align.place_cost(here, here, 0.8, (64, 80), False).item() == 0  # the longer edge is the detector's
    assert align.place_cost(here, here, 0.5, (64, 64), False).item() == pytest.approx(align.SCALE_COST * math.log(2))
    assert align.place_cost(here, here, 0.5, (64, 64), True).item() == 0  # a known scale costs nothing
    inside = align.place_cost(away, here, 0.5, (64, 64), True).item()
    assert inside == pytest.approx(0.25 * align.CENTRE_COST)  # a half film has room
    beyond = align.place_cost(here, away, 1.0, (64, 64), True).item()
    assert beyond == pytest.approx(inside + (0.25 - 0.5 / align.GRID) * align.BEYOND_COST)


@pytest.mark.parametrize("elsewhere, moves", [(0.6, False), (0.95, True)])
def test_a_film_is_the_whole_detector_unless_another_place_is_much_more_like(monkeypatch, elsewhere, moves):
    def at(height):
        pixels = round(align.GRID * height)
        likeness = torch.zeros(align.GRID + 2 * align.PAD - pixels + 1, align.GRID + 2 * align.PAD - pixels + 1)
        if pixels == align.GRID:
            likeness[align.PAD, align.PAD] = 0.5
        if pixels == round(0.8 * align.GRID):
            likeness[align.PAD + 3, align.PAD + 3] = elsewhere
        return height, (pixels, pixels), likeness

    monkeypatch.setattr(align, "correlations", lambda grey, seen, view, heights: [at(h) for h in heights])
    film = torch.zeros(64, 64)
    found = align.match_view(film, film == 0, film)
    assert (found.height, found.row, found.column) == ((0.8, 0, 0) if moves else (1, 0, 0))
    assert found.likeness == pytest.approx(elsewhere if moves else 0.5)


def test_height_and_scale_of_the_lateral_film_are_fitted():
    blob = torch.exp(-(((torch.linspace(-1, 1, 64)[:, None] - 0.1) / 0.4) ** 2)) * torch.ones(64, 64)
    blob, seen = blob + torch.linspace(0, 0.3, 64)[:, None], torch.ones(64, 64, dtype=torch.bool)
    for wrong in (Placement(1.06, 0, 0), Placement(1, 0.06, 0)):
        places = Placement(1, 0, 0), wrong
        got = fit_height([blob, blob], [seen, seen], places, 64, lambda image, seen: image)
        assert (got.height, got.row) == pytest.approx((1, 0), abs=0.025)
