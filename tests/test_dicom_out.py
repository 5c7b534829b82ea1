"The DICOM series of `diffx2ct_reconstruct --dicom`, as validators and another converter read it."

import shutil
import subprocess

import numpy as np
import pytest
import SimpleITK as sitk

from diffx2ct.two_images import save_dicom
from diffx2ct.volumes import save_nifti

pydicom = pytest.importorskip("pydicom")
N = 12


@pytest.fixture(scope="module", params=[2.0, 320 / 17], ids=["2 mm", "an edge of many digits"])
def case(request, tmp_path_factory):
    "A folder with `series` and `volume.nii` of one volume without any symmetry."
    at = tmp_path_factory.mktemp("series")
    hu = np.random.default_rng(0).integers(-1024, 1500, (N, N, N)).astype(np.float32)
    save_dicom(hu, request.param, at / "series", "diffx2ct expected, seed 0, of two X-ray images")
    save_nifti(hu, request.param, at / "volume.nii")
    return at


def files(case):
    return sorted(str(p) for p in (case / "series").iterdir())


def call(name, *args):
    "Run a program of the system; the test is skipped where it is not installed."
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed (Debian: dicom3tools, dcm2niix)")
    done = subprocess.run([name, *map(str, args)], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_one_study_has_one_time(case):
    "Fields of the study and the series are equal in all slices; the fields that readers need are present."
    slices = [pydicom.dcmread(f) for f in files(case)]
    assert len(slices) == N
    own = {"SOPInstanceUID", "InstanceNumber", "ImagePositionPatient", "PixelData"}  # of each slice
    for element in slices[0]:
        if element.keyword not in own:
            assert len({str(s[element.tag].value) for s in slices}) == 1, element.keyword
    first = slices[0]
    for word in ("Study", "Series", "Content"):
        assert len(first[f"{word}Date"].value) == 8 and len(first[f"{word}Time"].value) == 6
    assert (first.WindowCenter, first.WindowWidth) == (40, 400)  # mediastinum
    assert first.StudyID == "1" and "Laterality" in first and first.AccessionNumber == ""
    assert {e.keyword for e in slices[0]} == {e.keyword for e in slices[-1]}


def test_dciodvfy_finds_no_error(case):
    for file in files(case):
        code, said = call("dciodvfy", file)
        assert code == 0 and "Error" not in said, said


def test_dcentvfy_finds_no_error(case):
    code, said = call("dcentvfy", *files(case))
    assert code == 0 and "Error" not in said, said


def test_dcm2niix_makes_the_same_volume(case, tmp_path):
    code, said = call("dcm2niix", "-z", "n", "-f", "made", "-o", tmp_path, case / "series")
    assert code == 0, said
    made = list(tmp_path.glob("*.nii"))
    assert len(made) == 1, said
    ours, theirs = (
        sitk.DICOMOrient(sitk.ReadImage(str(p), sitk.sitkFloat32), "LPS") for p in (case / "volume.nii", made[0])
    )
    assert (sitk.GetArrayFromImage(ours) == sitk.GetArrayFromImage(theirs)).all()
    assert ours.GetSpacing() == pytest.approx(theirs.GetSpacing(), abs=1e-3)
    assert ours.GetOrigin() == pytest.approx(theirs.GetOrigin(), abs=1e-3)
    assert ours.GetDirection() == pytest.approx(theirs.GetDirection(), abs=1e-5)
