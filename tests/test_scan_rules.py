"Rules of reading and resampling a scan, each by a small case worked out by hand."

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from diffx2ct.basics import UserError
from diffx2ct.commands import prepare_options
from diffx2ct.scans import (
    AIR_HU,
    Slice,
    as_image,
    as_tensor,
    file_scans,
    folder_settings,
    read_h5,
    resample,
    scans_to_add,
    share_inside,
    smooth,
    sort_slices,
    to_cube,
)

STEP = 2.5


def slices(places=None, change=None, tmp_path="x"):
    "Eight slices, one each 2.5 mm, or at these places; `change` is what the fifth states otherwise."
    out = []
    for k, z in enumerate(np.arange(8) * STEP if places is None else places):
        stated = dict(
            path=tmp_path / f"{k}.dcm",
            frame=0,
            modality="CT",
            series="1.2",
            patient="nobody",
            instance=str(k),
            size=(16, 16),
            frames=1,
            position=np.array([0.0, 0.0, z]),
            orientation=np.array([[1.0, 0, 0], [0, 1, 0]]),
            spacing=np.array([1.0, 1.0]),
        )
        out.append(Slice(**stated | (change(k) if change else {})))
    return out


def test_slices_are_put_in_order(tmp_path):
    found = sort_slices(slices(np.arange(8)[::-1] * STEP, tmp_path=tmp_path), tmp_path)
    assert [s.path.stem for s in found] == list("76543210")


@pytest.mark.parametrize(
    "places, change, words",
    [
        ([0, 1, 2, 3.4, 4.4, 5.4, 6.4, 7.4], None, "lacks a slice between"),  # 40 % too far
        ([0, 1, 2, 4, 5, 6, 7, 8], None, "lacks a slice between"),
        ([0, 1, 2, 2, 3, 4, 5, 6], None, "two slices at the same place"),
        (None, lambda k: dict(position=np.array([0, 0.3 * k, STEP * k])), "tilted gantry"),
        (None, lambda k: dict(size=(16, 12)) if k == 4 else {}, "different size"),
        (None, lambda k: dict(spacing=np.array([1.0, 1.1])) if k == 4 else {}, "different spacing"),
        (None, lambda k: dict(modality="MR") if k == 4 else {}, "different modality"),
    ],
    ids=["part of a gap", "gap", "double", "tilt", "size", "spacing", "modality"],
)
def test_stacks_that_are_none_are_refused(places, change, words, tmp_path):
    places = None if places is None else STEP * np.array(places)
    with pytest.raises(UserError, match=words):
        sort_slices(slices(places, change, tmp_path), tmp_path)


def test_an_array_is_an_image_around_the_isocentre():
    "The first voxel is at the right, at the front and at the head: the last axis counts to the left."
    img = as_image(np.zeros((4, 6, 8), np.float32), 10.0)
    assert img.GetOrigin() == (-35, -25, 15)
    assert img.TransformIndexToPhysicalPoint((7, 5, 3)) == (35, 25, -15)


def test_what_a_scan_does_not_reach_is_air():
    img = as_image(np.full((8, 8, 8), 40, np.float32), 10.0)
    got = as_tensor(resample(img, np.zeros(3), (16, 16, 16), 10.0))
    assert got[8, 8, 8] == 40 and got[0, 0, 0] == AIR_HU and (got == 40).sum() == 8**3
    up = as_tensor(resample(img, np.array([0, 0, 40.0]), (16, 16, 16), 10.0))  # a grid that lies nearer to the head
    assert up[:8].max() == AIR_HU and up[8:].max() == 40


def test_voxels_are_widened_before_they_are_picked_and_never_otherwise():
    rough = np.random.default_rng(0).normal(0, 100, (24, 24, 24)).astype(np.float32)
    img = as_image(rough, 1.0)
    assert sitk.GetArrayFromImage(smooth(img, 4.0)).std() < 20
    assert np.array_equal(sitk.GetArrayFromImage(smooth(img, 0.5)), rough)


def test_an_x2ct_file_is_stored_with_its_offset(tmp_path):
    with h5py.File(tmp_path / "ct.h5", "w") as f:
        f["ct"] = np.where(np.indices((8, 8, 8))[0] < 4, 1064, 24).astype(np.int16)
    assert as_tensor(read_h5(tmp_path / "ct.h5")).unique().tolist() == [-1000, 40]
    assert as_tensor(read_h5(tmp_path / "ct.h5", 1000)).unique().tolist() == [-976, 64]


def test_a_packed_array_has_its_head_at_the_end(tmp_path):
    volumes = np.full((2, 8, 8, 8), -1000, np.int16)
    volumes[1, 7, 2, 3] = volumes[0, 0, 0, 0] = 500
    np.savez(tmp_path / "two.npz", volumes_hu_zyx=volumes, ids=np.array(["a", "b"]), spacing_mm=10.0)
    a, b = file_scans(tmp_path / "two.npz")
    assert (as_tensor(b.read()) == 500).nonzero().tolist() == [[0, 2, 3]] and as_tensor(a.read())[7, 0, 0] == 500


@pytest.fixture
def lying():
    "A body of 120 x 100 x 80 mm off the middle, towards the head, the front and the left, above a thin table."
    hu = np.full((40, 40, 40), -1000, np.float32)
    hu[4:16, 6:16, 26:34] = 40
    hu[2:38, 30, 4:36] = 300
    return as_image(hu, 10.0)


def test_the_cube_lies_about_the_body_or_about_the_scan(lying):
    _, body = to_cube(lying, 16, 20.0, "body", "remove")
    _, whole = to_cube(lying, 16, 20.0, "volume", "remove")
    assert whole["centre_lps_mm"] == [0, 0, 0]
    assert body["centre_lps_mm"] == pytest.approx([100, -90, 100], abs=8)  # left, back, head


def test_the_table_goes_and_the_body_stays(lying):
    hu, info = to_cube(lying, 20, 20.0, "volume", "remove")
    assert hu[5, 5, 15] == pytest.approx(40, abs=5) and hu[:, 14:].max() == AIR_HU and info["body_inside"] == 1
    kept, _ = to_cube(lying, 20, 20.0, "volume", "keep")
    assert kept[:, 14:].max() > -800


def test_the_share_of_a_body_inside_a_cube():
    mask, nowhere = torch.ones(10, 10, 10, dtype=torch.bool), np.zeros(3)
    assert share_inside(mask, nowhere, 1.0, nowhere, 100.0) == 1
    assert share_inside(mask, nowhere, 1.0, nowhere, 4.0) == pytest.approx(0.4**3)  # four voxels of ten along each axis
    assert share_inside(mask, nowhere, 1.0, np.array([0, 0, 5.0]), 10.0) == pytest.approx(0.5)
    mask[:5] = False  # what is left lies at the feet
    assert share_inside(mask, nowhere, 1.0, np.array([0, 0, 5.0]), 10.0) == 0


def test_settings_of_a_folder_are_kept_where_nothing_is_said(tmp_path):
    hu = np.zeros((16, 16, 16), np.float32)
    sitk.WriteImage(as_image(hu, 20.0), str(tmp_path / "a.nii.gz"))
    scans, a = file_scans(tmp_path / "a.nii.gz"), prepare_options().parse_args(["x", "--out", str(tmp_path / "out")])
    old = folder_settings(a, scans, None) | dict(size=32, mm=7.0, pixels=48, view_domain="line_integral")
    old["geometry"] = old["geometry"] | dict(panel_mm=224.0)
    new = folder_settings(a, scans, old)
    assert (new["size"], new["mm"], new["pixels"]) == (32, 7.0, 48)


def test_a_case_without_one_of_its_views_is_not_done(tmp_path):
    sitk.WriteImage(as_image(np.zeros((16, 16, 16), np.float32), 20.0), str(tmp_path / "a.nii.gz"))
    (scan,) = file_scans(tmp_path / "a.nii.gz")
    out, old = tmp_path / "out", dict(cases={"a": dict(fingerprint=scan.mark)})
    files = [out / "volumes/a.pt", out / "drrs/a/AP.pt", out / "drrs/a/LAT.pt"]
    for f in files:
        f.parent.mkdir(parents=True, exist_ok=True)
        f.touch()
    assert scans_to_add([scan], out, old, False) == [] and scans_to_add([scan], out, old, True) == [scan]
    for f in files:
        f.unlink()
        assert scans_to_add([scan], out, old, False) == [scan], f
        f.touch()
