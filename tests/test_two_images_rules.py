"Rules of two images, each by a small case worked out by hand."

from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from diffx2ct.drr import Projector, geometry
from diffx2ct.two_images import View, askew, gap, laid, on_panel, ranks, save_dicom


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    "Numbers of a normal distribution, the same each time."
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_ranks_are_shares_and_equal_values_are_equal():
    assert ranks(torch.tensor([2.0, 1.0, 1.0, 3.0])).tolist() == [0.625, 0.25, 0.25, 0.875]


@pytest.mark.parametrize(
    "calibrated, enlarged, factor",
    [(False, None, 1), (True, None, 949 / 541), (False, 1.2, 949 / 541 / 1.2)],
)
def test_magnification_of_a_cone_beam(calibrated, enlarged, factor):
    "Pixels measured in the patient's middle are as many times larger on the detector."
    A = Projector(geometry("x2ct", 320.0), 16, 20.0, 100)  # a detector of 500 mm
    view = View("x", torch.rand(40, 40), mm=(5.0, 5.0), calibrated=calibrated, enlarged=enlarged)
    seen = on_panel(view, A)[1]
    assert seen.sum().item() ** 0.5 * 5 == pytest.approx(200 * factor, abs=10)


def suspicions(first, second, ref):
    seen = torch.ones(32, 32, dtype=torch.bool)
    return " ".join(askew([(first, seen), (second, seen)], ref, ("one", "two")))


def test_exchanged_and_mirrored_images_are_suspected():
    common = drawn(32, 32, seed=2)
    ref = torch.stack([common + drawn(32, 32, seed=k) for k in (0, 1)])  # the two views are half alike
    assert suspicions(ref[0], ref[1], ref) == ""
    assert "look exchanged" in suspicions(ref[1], ref[0], ref)
    assert "two looks mirrored" in suspicions(ref[0], ref[1].flip(1), ref)
    assert "mirrored" not in suspicions(ref[0], ref[1].flip(0), ref)


def test_a_gap_counts_what_is_missing_and_what_is_too_much():
    y = torch.ones(2, 10, 10)
    y[1, :5] = 0  # half of the weight is elsewhere
    assert gap(y) == pytest.approx(1) and gap(y[[0, 0]] * torch.tensor([1.0, 3.0])[:, None, None]) == pytest.approx(0)


def test_a_negative_is_turned_over_and_a_positive_is_not():
    A = Projector(geometry("parallel", 320.0), 16, 20.0, 16)
    net, ref = SimpleNamespace(A=A), drawn(16, 16).expand(2, 16, 16)
    for sign in (1, -1):
        grey, _, said = laid(net, View("x", sign * ref[0]), ref)
        assert torch.allclose(grey, ref[0], atol=1e-5) and any("exchanged" in s for s in said) == (sign < 0)


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
