"Rules of two images, each by a small case worked out by hand."

from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from diffx2ct.align import Recognised
from diffx2ct.drr import Projector, geometry
from diffx2ct.two_images import (
    Film,
    FilmOptions,
    View,
    fractional_ranks,
    known_answers,
    perspective_warning,
    recognition_warnings,
    same_picture,
    save_dicom,
    size_on_panel,
    size_warning,
    truncated_share,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    "Numbers of a normal distribution, the same each time."
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_ranks_are_shares_and_equal_values_are_equal():
    assert fractional_ranks(torch.tensor([2.0, 1.0, 1.0, 3.0])).tolist() == [0.625, 0.25, 0.25, 0.875]


@pytest.mark.parametrize(
    "calibrated, enlarged, factor",
    [(False, None, 1), (True, None, 949 / 541), (False, 1.2, 949 / 541 / 1.2)],
)
def test_magnification_of_a_cone_beam(calibrated, enlarged, factor):
    "Pixels measured in the patient's middle are as many times larger on the detector."
    A = Projector(geometry("x2ct", 320.0), 16, 20.0, 100)  # a detector of 500 mm
    view = View("x", torch.rand(40, 40), mm=(5.0, 5.0), calibrated=calibrated, enlarged=enlarged)
    assert size_on_panel(view, A) == pytest.approx((0.4 * factor,) * 2)


def found(margin=0.5, twice=-0.5, likeness=(0.8, 0.8), exchanged=False, mirrored=False):
    margins = dict(exchanged=margin, frontal=margin, lateral=margin, mirrored=margin)
    return Recognised(exchanged, (False, False), mirrored, margins, likeness, twice)


def words(what, wish=FilmOptions(), pictures=True, **view):
    return " ".join(
        recognition_warnings(
            (View("one", torch.rand(9, 9), **view), View("two", torch.rand(9, 9), **view)), what, wish, pictures
        )
    )


def test_each_suspicion_has_its_figure():
    assert words(found()) == ""
    assert "one does not look like the AP view" in words(found(likeness=(0.3, 0.8)))
    assert "two does not look like the LAT view" in words(found(likeness=(0.8, 0.3)))
    assert "look like the same view (by 0.20" in words(found(twice=0.2))
    assert "two looks mirrored (margin 0.50)" in words(found(mirrored=True), pictures=False)
    assert "look exchanged (margin 0.50)" in words(found(exchanged=True), pictures=False)


def test_small_margins_are_said_and_options_silence_them():
    said = words(found(margin=0.01))
    assert all(option in said for option in ("--keep_order", "--bone", "--facing")), said
    assert words(found(margin=0.01), FilmOptions("left", "bright", True)) == ""
    assert words(found(margin=0.01), stored=True) == ""


def test_what_is_known_is_not_asked():
    one, two = (View(n, torch.rand(9, 9)) for n in ("one", "two"))
    assert known_answers((one, two), FilmOptions()) == dict(exchanged=None, inverted=(None, None), mirrored=None)
    assert known_answers((one, two), FilmOptions("right", "dark", True)) == dict(
        exchanged=False, inverted=(True, True), mirrored=True
    )
    two.sided = True
    assert (
        known_answers((one, two), FilmOptions())["mirrored"] is False
        and known_answers((one, two), FilmOptions("right"))["mirrored"] is True
    )
    one.stored = True
    assert known_answers((one, two), FilmOptions(bone="dark")) == dict(
        exchanged=False, inverted=(False, True), mirrored=False
    )


def test_the_same_picture_is_known_again():
    a, b = drawn(48, 48), drawn(48, 48, seed=1)
    film = lambda v: Film(v, torch.ones_like(v, dtype=torch.bool), None)
    for again in (a, -a, a.flip(1), a**3):
        assert same_picture([film(a), film(again)]) > 0.95
    assert same_picture([film(a), film(b)]) < 0.2


@pytest.mark.parametrize("back", [True, False])
def test_a_film_that_ends_inside_the_body_is_cut(back):
    y, seen = torch.full((16, 16), 200.0), torch.zeros(16, 16, dtype=torch.bool)
    seen[:, 3:13] = True
    assert truncated_share(y, seen, back) == 1
    y[:8, 11:], y[:8, :5] = 0, 0
    assert truncated_share(y, seen, back) == 0.5
    assert truncated_share(y, torch.ones_like(seen), back) == 0


def test_perspective_is_that_of_the_other_side():
    chest, view = Projector(geometry("chest", 384.0), 16, 24.0, 16), View("x", torch.rand(9, 9))
    assert (
        perspective_warning(view, chest, FilmOptions())
        == perspective_warning(view, chest, FilmOptions(frontal="pa"))
        == ""
    )
    factor = (1608 + 60) / (1608 - 60)  # detector at 1800 mm in both
    assert f"{factor - 1:.0%} too wide" in perspective_warning(view, chest, FilmOptions(frontal="ap"))
    front = Projector(geometry("x2ct", 320.0), 16, 20.0, 16)
    assert "too narrow" in perspective_warning(View("x", torch.rand(9, 9), source="pa"), front, FilmOptions())


def test_a_small_film_is_measured_on_the_detector():
    A, place = Projector(geometry("chest", 384.0), 16, 24.0, 64), SimpleNamespace(height=0.8)
    size = lambda n: size_warning(View("x", torch.rand(n, n)), Film(torch.rand(n, n), None, None), place, A)
    assert "50 x 50 pixels, 62 along" in size(50) and size(52) == ""


def test_a_series_lies_where_the_volume_does(tmp_path):
    hu = np.full((4, 6, 8), -1000, np.int16)
    hu[0, 1, 2] = 700  # in the slice nearest to the head
    save_dicom(hu, 10.0, tmp_path / "series")
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "series"))
    img = sitk.ReadImage(files)
    assert img.GetSpacing() == (10, 10, 10)
    at = img.TransformPhysicalPointToIndex((-15.0, -15.0, 15.0))  # left, back, head
    assert (
        img[at] == 700 and sitk.GetArrayFromImage(img).min() == -1000 and (sitk.GetArrayFromImage(img) > 0).sum() == 1
    )
