"""`diffx2ct_reconstruct` from the outside: images of all kinds as other programs write them, a NIfTI volume and a
DICOM series as other programs read them."""

import gzip
import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import run_cmd
from PIL import Image

from diffx2ct.basics import UserError, save_tensor
from diffx2ct.calibrate import Calibrator
from diffx2ct.checkpoint import describe, load_model, save_model
from diffx2ct.commands import SHARP_NOTE
from diffx2ct.config import load_config
from diffx2ct.data import density, to_unit, write_manifest
from diffx2ct.diffusion import build_denoiser
from diffx2ct.drr import geometry
from diffx2ct.phantom import phantom
from diffx2ct.reconstruct import reconstruct
from diffx2ct.two_images import VIEW_LETTERS, calibrate_views, main, read_view, save_dicom, size_on_panel, to_film

N, MM, WINDOW = 16, 20.0, (-1024.0, 1500.0)
TINY = [
    f"DATA.TARGET_VOLUME_SIZE={N}",
    f"DATA.TARGET_DRR_SIZE={N}",
    "TRAINING.PATCH_SIZE=16",
    "TRAINING.AMP=off",
    "MODEL.UNET.NUM_CHANNELS=[8, 16]",
    "MODEL.UNET.ATTENTION_LEVELS=[false, true]",
    "MODEL.UNET.CROSS_ATTENTION_LEVELS=[false, false]",
    "MODEL.CONDITIONING_ENCODER.NUM_CHANNELS=8",
]
LANDMARKS = {
    (1, 3, 12): 1400,
    (14, 12, 12): 1200,
    (7, 3, 2): 1000,
}  # (d, h, w): HU; head front left, foot back left, middle front right
CR, DX, CT = (f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("1", "1.1", "2"))


def place_of(d, h, w):
    return [(i - (N - 1) / 2) * MM * s for i, s in ((w, 1), (h, 1), (d, -1))]  # mm to the left, the back, the head


def make_model(folder, line_integrals=True):
    "An untrained model whose mean patient is a mean of phantoms with landmarks in it."
    torch.manual_seed(0)
    c = load_config(sets=TINY)
    net = build_denoiser(c, geometry("parallel", N * MM), MM, line_integrals).eval().requires_grad_(False)
    mean = torch.stack([to_unit(phantom(seed, N)[0], WINDOW) for seed in range(1, 6)]).mean(0)
    for at, hu in LANDMARKS.items():
        mean[at] = (hu - WINDOW[0]) / (WINDOW[1] - WINDOW[0])
    net.mean.copy_(mean)
    net.scales.fill_(0.05)
    save_model(folder / "best.safetensors", net, describe(net, c))
    return net


def grey(y, top, gamma=0.6, size=96):
    return (
        (
            torch.nn.functional.interpolate((y / y.max())[None, None], (size, size), mode="bilinear")[0, 0].clamp(0, 1)
            ** gamma
            * top
        )
        .round()
        .numpy()
    )


def png(a, path, kind=np.uint8):
    Image.fromarray(a.astype(kind)).save(path)
    return path


def dicom(
    path,
    numbers,
    photometric="MONOCHROME2",
    sop=DX,
    modality="DX",
    bits=12,
    signed=False,
    syntax="ExplicitVRLittleEndian",
    **tags,
):
    "A radiograph as pydicom writes it."
    pydicom = pytest.importorskip("pydicom")
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    ds.PatientName, ds.PatientID, ds.Modality = "QUIXOTE^DULCINEA", "MRN12345", modality
    ds.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    ds.Rows, ds.Columns = numbers.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, photometric
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, bits, bits - 1, int(signed)
    order = ">" if "BigEndian" in syntax else "<"
    ds.PixelData = np.asarray(numbers).astype(f"{order}i8").astype(f"{order}i2").tobytes()
    ds["PixelData"].VR = "OW"
    for key, value in tags.items():
        setattr(ds, key, value)
    ds.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A folder with two models, and the views of a patient they have not seen."
    at = tmp_path_factory.mktemp("two images")
    net = make_model(at / "model")
    make_model(at / "display", line_integrals=False)
    y = net.A(density(to_unit(phantom(0, N)[0], WINDOW)[None, None], WINDOW))[0]
    for view, name in zip(y, VIEW_LETTERS):
        png(grey(view, 255), at / f"{name}.png")
        save_tensor(view, at / f"{name}.pt")
    return SimpleNamespace(at=at, net=net, y=y, pngs=[at / "AP.png", at / "LAT.png"], pts=[at / "AP.pt", at / "LAT.pt"])


@pytest.fixture
def say(here, capfd):
    "Run the command in this process; (stdout, stderr) of a good run."

    def run(*args, files=None, model="model", code=0):
        args = [*map(str, files or here.pngs), "--checkpoint_dir", str(here.at / model), *map(str, args)]
        capfd.readouterr()
        if code == 0:
            main(args)
        else:
            with pytest.raises(SystemExit) as e:
                main(args)
            assert e.value.code == code
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        if code:
            assert err.startswith("diffx2ct: ") and err.count("\n") == 1 and not out, err
        return out, err

    return run


@pytest.mark.slow
def test_help_teaches():
    shown = run_cmd([sys.executable, "-c", "from diffx2ct.two_images import main; main(['--help'])"])
    assert (
        shown.returncode == 0
        and shown.stdout.startswith("usage: diffx2ct_reconstruct")
        and shown.stdout.count("  diffx2ct_reconstruct ") >= 4
    ), shown.stderr


def test_one_command_from_two_pictures_to_a_volume(here, tmp_path):
    "Run in a separate process, in another folder; return the output."
    made = run_cmd(
        [
            sys.executable,
            "-c",
            "from diffx2ct.two_images import main; main()",
            *here.pngs,
            "--checkpoint_dir",
            here.at / "model",
            "--out",
            "deep/case.nii.gz",
        ],
        cwd=tmp_path,
    )
    assert made.returncode == 0 and made.stderr == "", made.stderr
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == [
        "case.nii.gz",
        "case_coverage.nii.gz",
        "case_path_density.nii.gz",
        "case_trust.json",
    ] and [p.name for p in tmp_path.iterdir()] == ["deep"]
    notes = [line for line in made.stdout.splitlines() if line.startswith("note: ")]
    assert (
        len(notes) == 3
        and "display images, so consistency is soft" in notes[2]
        and "not for clinical use" in made.stdout.splitlines()[-1]
    )


# what comes out


def test_nifti_lies_right_in_the_patient(here, say, tmp_path):
    say("--out", tmp_path / "c.nii.gz", "--method", "mean")
    img = sitk.ReadImage(str(tmp_path / "c.nii.gz"))
    assert img.GetSpacing() == pytest.approx((MM,) * 3)
    for at, hu in LANDMARKS.items():
        assert img[img.TransformPhysicalPointToIndex(place_of(*at))] == hu, at
    nib = pytest.importorskip("nibabel")
    img = nib.load(tmp_path / "c.nii.gz")
    for at, hu in LANDMARKS.items():
        left, back, head = place_of(*at)
        i = (
            np.linalg.solve(img.affine, [-left, -back, head, 1])[:3].round().astype(int)
        )  # NIfTI counts to the right, the front, the head
        assert img.get_fdata()[tuple(i)] == hu, at


def test_dicom_series_lies_right_in_the_patient_and_says_what_it_is(here, say, tmp_path):
    say("--out", tmp_path / "c.nii.gz", "--dicom", tmp_path / "series", "--method", "mean", "--seed", "7")
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "series"))
    img = sitk.ReadImage(files)
    for at, hu in LANDMARKS.items():
        assert img[img.TransformPhysicalPointToIndex(place_of(*at))] == hu, at
    lps = sitk.DICOMOrient(img, "LPS")
    assert (
        sitk.GetArrayFromImage(lps)
        == sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(tmp_path / "c.nii.gz")), "LPS"))
    ).all()
    assert lps.GetOrigin() == pytest.approx((-150,) * 3) and lps.GetSpacing() == pytest.approx((MM,) * 3)
    pydicom = pytest.importorskip("pydicom")
    slices = sorted(
        (pydicom.dcmread(f) for f in (tmp_path / "series").iterdir()), key=lambda s: -s.ImagePositionPatient[2]
    )  # head first
    assert len(slices) == N and [s.InstanceNumber for s in slices] == list(range(1, N + 1))
    for key in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        assert len({s[key].value for s in slices}) == 1
    uids = [s.SOPInstanceUID for s in slices] + [
        slices[0].StudyInstanceUID,
        slices[0].SeriesInstanceUID,
        slices[0].FrameOfReferenceUID,
    ]
    assert len(set(uids)) == N + 3 and all(
        re.fullmatch(r"2\.25\.[1-9]\d{0,38}", u) and pydicom.uid.UID(u).is_valid for u in uids
    )
    for k, s in enumerate(slices):
        assert (s.SOPClassUID, s.file_meta.MediaStorageSOPInstanceUID, s.Modality, s.PhotometricInterpretation) == (
            CT,
            s.SOPInstanceUID,
            "CT",
            "MONOCHROME2",
        )
        assert (
            list(s.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
            and list(s.ImageOrientationPatient) == [1, 0, 0, 0, 1, 0]
            and list(s.PixelSpacing) == [MM, MM]
            and s.SliceThickness == MM
        )
        assert (
            "ynthetic" in s.SeriesDescription
            and "not for clinical use" in s.SeriesDescription
            and len(s.SeriesDescription) <= 64
            and "seed 7" in s.DerivationDescription
            and s.BurnedInAnnotation == "NO"
        )
        assert (
            s.RescaleType == "HU"
            and s.SpacingBetweenSlices == MM
            and all(key in s for key in ("KVP", "AcquisitionNumber", "PositionReferenceIndicator"))
        )  # may be empty, not absent
        hu = s.pixel_array * float(s.RescaleSlope) + float(s.RescaleIntercept)
        for at, value in LANDMARKS.items():
            left, back, head = (np.array(place_of(*at)) - s.ImagePositionPatient) / MM
            if abs(head) < 0.01:
                assert at[0] == k and hu[round(back), round(left)] == value
    assert slices[0].pixel_array.shape == (N, N)


def test_every_series_is_a_new_one(here, say, tmp_path):
    uid = lambda name: sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(tmp_path / name))
    for name in ("a", "b"):
        say("--dicom", tmp_path / name, "--method", "mean")
    assert len(uid("a")) == len(uid("b")) == 1 and uid("a") != uid("b")


def test_dicom_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    count, execute = [], sitk.ImageFileWriter.Execute

    def fail(self, *a):
        count.append(1)
        if len(count) > 3:
            raise RuntimeError("no space left")
        return execute(self, *a)

    monkeypatch.setattr(sitk.ImageFileWriter, "Execute", fail)
    with pytest.raises(Exception, match="could not be saved"):
        save_dicom(np.zeros((8, 8, 8)), 2.0, tmp_path / "s")
    assert len(count) == 4 and list(tmp_path.iterdir()) == []


def test_nothing_of_the_input_header_leaves_it(here, say, tmp_path):
    files = [
        dicom(tmp_path / f"{n}.dcm", grey(v, 4000), ImagerPixelSpacing=[3.3, 3.3]) for v, n in zip(here.y, VIEW_LETTERS)
    ]
    say("--out", tmp_path / "out/c.nii", "--dicom", tmp_path / "out/s", files=files)
    for f in (tmp_path / "out").rglob("*.*"):
        assert not f.is_file() or not any(word in f.read_bytes() for word in (b"QUIXOTE", b"MRN12345")), f


@pytest.mark.slow
def test_names_of_folders_and_files_leave_no_trace(here, say, tmp_path):
    "A patient's name as a folder or a file is in no output, packed or not."
    at = tmp_path / "QUIXOTE_DULCINEA_19700131"
    at.mkdir()
    for name, files in {
        "png": [shutil.copy(p, at / f"Quixote^Dulcinea {p.name}") for p in here.pngs],
        "pt": [shutil.copy(p, at / f"Quixote^Dulcinea {p.name}") for p in here.pts],
        "dcm": [
            dicom(at / f"Quixote^Dulcinea {n}", grey(v, 4000), ImagerPixelSpacing=[3.3] * 2)
            for v, n in zip(here.y, VIEW_LETTERS)
        ],
    }.items():
        out = tmp_path / "out" / name
        say("--out", out / "c.nii.gz", "--dicom", out / "s", "--samples", 2, "--steps", 1, files=files)
        written = [f for f in out.rglob("*") if f.is_file()]
        assert len(written) > N + 6
        for f in written:
            b = f.read_bytes()
            b = (gzip.decompress(b) + b if f.suffix == ".gz" else b).lower()
            assert not any(w in b for w in (b"quixote", b"dulcinea", b"19700131", b"mrn12345", bytes(tmp_path))), f


@pytest.mark.slow
def test_samples_mean_and_spread(here, say, tmp_path):
    read = lambda name: sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name))).astype(float)
    note = lambda name: sitk.ReadImage(str(tmp_path / name)).GetMetaData("descrip").strip()
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        say("--out", tmp_path / f"{name}.nii.gz", "--method", "sample", "--samples", 3, "--steps", 2, "--seed", seed)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"{n}{k}"
        for n in "abc"
        for k in (
            ".nii.gz",
            "_mean.nii.gz",
            "_spread.nii.gz",
            "_spread_95.nii.gz",
            "_coverage.nii.gz",
            "_path_density.nii.gz",
            "_trust.json",
        )
    )
    for k in ("", "_mean", "_spread", "_spread_95"):
        assert (read(f"a{k}.nii.gz") == read(f"b{k}.nii.gz")).all() and (
            read(f"a{k}.nii.gz") != read(f"c{k}.nii.gz")
        ).any()
    assert read("a_spread.nii.gz").min() >= 0 < read("a_spread.nii.gz").mean()
    assert (
        "sample, seed 3" in note("a.nii.gz")
        and "mean, seeds 3 to 5" in note("a_mean.nii.gz")
        and "spread, seeds 4 to 6" in note("c_spread.nii.gz")
    )
    say("--out", tmp_path / "m.nii.gz", "--method", "mean_of_k", "--samples", 3, "--steps", 2, "--seed", 3)
    assert (read("m.nii.gz") == read("m_mean.nii.gz")).all() and (read("m.nii.gz") == read("a_mean.nii.gz")).all()
    out, _ = say("--out", tmp_path / "s.nii.gz", "--method", "sharp", "--samples", 3, "--steps", 2, "--seed", 3)
    assert f"note: sharp: {SHARP_NOTE}" in out and "sharp, seed 3" in note("s.nii.gz")
    assert (read("s.nii.gz") != read("a.nii.gz")).any()
    for k in ("_mean", "_spread", "_spread_95"):  # of true samples, whatever the method of the volume
        assert (read(f"s{k}.nii.gz") == read(f"a{k}.nii.gz")).all()


# what goes in


@pytest.mark.slow
def test_the_same_image_in_every_format(here, tmp_path):
    "8 and 16 bits, bright and dark bone, PNG, NIfTI and DICOM: one calibrated pair."
    y, at = here.y, tmp_path
    kinds = {
        "png8": lambda v, n: png(grey(v, 255), at / f"8{n}.png"),
        "png16": lambda v, n: png(grey(v, 65535), at / f"16{n}.png", np.uint16),
        "inverted": lambda v, n: png(255 - grey(v, 255), at / f"i{n}.png"),
        "gamma": lambda v, n: png(grey(v, 65535, 1.7), at / f"g{n}.png", np.uint16),
    }

    def nifti(v, n):
        img = sitk.GetImageFromArray(grey(v, 4000).astype(np.float32))
        img.SetSpacing((N * MM / 96,) * 2)
        sitk.WriteImage(img, str(at / f"{n}.nii.gz"))
        return at / f"{n}.nii.gz"

    kinds["nifti"] = nifti
    try:
        import pydicom  # noqa: F401
    except ImportError:
        pass
    else:
        for sop, mod in ((CR, "CR"), (DX, "DX")):
            kinds |= {
                mod: lambda v, n, sop=sop, mod=mod: dicom(
                    at / f"{mod}{n}",
                    grey(v, 4000),
                    sop=sop,
                    modality=mod,
                    ImagerPixelSpacing=[N * MM / 96] * 2,
                    RescaleSlope=2,
                    RescaleIntercept=-100,
                ),
                mod + "1": lambda v, n, sop=sop, mod=mod: dicom(
                    at / f"{mod}1{n}",
                    4095 - grey(v, 4000),
                    "MONOCHROME1",
                    sop,
                    mod,
                    ImagerPixelSpacing=[N * MM / 96] * 2,
                ),
            }
    pairs = {}
    for name, make in kinds.items():
        pairs[name], done, _, _ = calibrate_views(
            here.net, tuple(read_view(make(v, n), n) for v, n in zip(y, VIEW_LETTERS))
        )
        assert len(done) == 2
        assert all(
            ("black and white were exchanged" in line) == (name in ("inverted", "CR1", "DX1")) for line in done
        ), (name, done)
        assert all(("MONOCHROME1" in line) == (name in ("CR1", "DX1")) for line in done), (name, done)
    for name, pair in pairs.items():  # a pixel size stated by a file is the scale
        like = pairs["png16" if name in ("png8", "png16", "inverted", "gamma") else "nifti"]
        limit = 0.15 if name == "gamma" else 0.04  # bars are found in grey values, so a tone curve can move their edge
        assert (pair - like).norm() / like.norm() < limit, name


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_window_is_that_of_the_standard(photometric, tmp_path):
    n = np.arange(32 * 32).reshape(32, 32) * 3 % 4001
    m = n * 2.0 - 50
    view = read_view(
        dicom(
            tmp_path / "x",
            n,
            photometric,
            RescaleSlope=2,
            RescaleIntercept=-50,
            WindowCenter=[3000, 10],
            WindowWidth=[2001, 10],
        ),
        "AP",
    )
    want = np.clip((m - 2999.5) / 2000 + 0.5, 0, 1)
    torch.testing.assert_close(
        view.grey.numpy(), (1 - want if photometric == "MONOCHROME1" else want).astype(np.float32), atol=1e-4, rtol=0
    )


def test_spacing_and_magnification(here, tmp_path):
    n = grey(here.y[0], 4000, 1.0)
    at = lambda **tags: size_on_panel(read_view(dicom(tmp_path / "x", n, **tags), "AP"), here.net.A)
    edge = N * MM / 96
    for tags in (
        dict(ImagerPixelSpacing=[edge] * 2),
        dict(ImagerPixelSpacing=[1.5 * edge] * 2, EstimatedRadiographicMagnificationFactor=1.5),
        dict(ImagerPixelSpacing=[1.25 * edge] * 2, DistanceSourceToDetector=1500, DistanceSourceToPatient=1200),
        dict(PixelSpacing=[edge] * 2, PixelSpacingCalibrationType="GEOMETRY"),
        dict(PixelSpacing=[edge] * 2),
        dict(ImagerPixelSpacing=[edge] * 2, PixelSpacing=[9, 9]),
    ):
        assert at(**tags) == pytest.approx((1, 1)), tags
    calibrated = dict(PixelSpacing=[edge] * 2, PixelSpacingCalibrationType="GEOMETRY")
    for tags, inside in (
        (calibrated, True),
        (dict(PixelSpacing=[edge] * 2), False),
        (calibrated | dict(ImagerPixelSpacing=[edge] * 2), False),
    ):
        assert read_view(dicom(tmp_path / "x", n, **tags), "AP").calibrated == inside, tags
    assert at(ImagerPixelSpacing=[edge / 2, edge]) == pytest.approx((0.5, 1))  # rows and columns are not confused
    assert at() is None


def test_half_a_header_is_none(here, tmp_path):
    view = read_view(
        dicom(
            tmp_path / "x",
            grey(here.y[0], 4000),
            WindowCenter=500,
            PixelSpacing=[0, 0],
            DistanceSourceToDetector=1500,
            DistanceSourceToPatient=0,
        ),
        "AP",
    )
    assert view.mm is None and view.enlarged is None and view.grey.max() > 3900  # a centre without a width is no window


@pytest.mark.parametrize("which", ["AP", "LAT"])
def test_patient_orientation_is_obeyed(which, here, tmp_path):
    "All eight ways to store an image: each comes out as the upright one, with the edges of its pixels."
    right, down = VIEW_LETTERS[which]
    opposite = dict(zip("LRAPFH", "RLPAHF"))
    n = grey(here.y[list(VIEW_LETTERS).index(which)], 4000)[:, :80]
    plain = read_view(dicom(tmp_path / "a", n, PatientOrientation=[right, down], ImagerPixelSpacing=[0.2, 0.1]), which)
    assert not plain.done and plain.mm == (0.2, 0.1)
    for k in range(8):
        a, columns, rows, mm = n, right, down, [0.2, 0.1]
        if k & 1:
            a, columns = a[:, ::-1], opposite[columns]
        if k & 2:
            a, rows = a[::-1], opposite[rows]
        if k & 4:
            a, columns, rows, mm = a.T, rows, columns, mm[::-1]
        file = dicom(tmp_path / "b", a, PatientOrientation=[columns, rows], ImagerPixelSpacing=mm)
        turned = read_view(file, which)
        assert torch.equal(plain.grey, turned.grey) and turned.mm == plain.mm and not turned.doubts, k
        assert len(turned.done) == bin(k).count("1"), turned.done
    other = "LAT" if which == "AP" else "AP"
    assert (
        "those of this view lead to"
        in read_view(dicom(tmp_path / "c", n, PatientOrientation=list(VIEW_LETTERS[other])), which).doubts[0]
    )
    for letters in ([right], "", [right, ""], ["X", "Y"]):
        assert torch.equal(read_view(dicom(tmp_path / "d", n, PatientOrientation=letters), which).grey, plain.grey)


def test_pixels_that_are_not_square(here, tmp_path):
    "PixelAspectRatio, height to width: half the rows, each twice as high, are the same image."
    n = grey(here.y[0], 4000)
    plain = to_film(read_view(dicom(tmp_path / "a", n), "AP"), here.net.A).grey
    low = n.reshape(48, 2, 96).mean(1).round()
    half = read_view(dicom(tmp_path / "b", low, PixelAspectRatio=["2", "1"]), "AP")
    film = to_film(half, here.net.A)
    got, want = film.grey[film.seen], plain.reshape(48, 2, 48, 2).mean((1, 3))[film.seen]
    assert film.grey.shape == (48, 48) and film.seen.float().mean() > 0.9
    assert (got - want).norm() / want.norm() < 0.02
    turned = dicom(tmp_path / "c", low.T, PixelAspectRatio=["1", "2"], PatientOrientation=["F", "L"])
    assert torch.equal(read_view(turned, "AP").grey, half.grey) and read_view(turned, "AP").aspect == half.aspect
    both = dict(PixelAspectRatio=["2", "1"], ImagerPixelSpacing=[3.0, 3.0])  # not allowed together: the spacing counts
    square = dict(ImagerPixelSpacing=[3.0, 3.0])
    views = [read_view(dicom(tmp_path / "d", low, **t), "AP") for t in (both, square)]
    assert torch.equal(*[to_film(v, here.net.A).grey for v in views])


SYNTAXES = [
    *("ExplicitVRLittleEndian", "ImplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian")
]


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("signed, bits", [(False, 12), (False, 16), (True, 12), (True, 15), (True, 16)])
def test_monochrome1_is_turned_over_after_the_window(signed, bits, syntax, tmp_path):
    "Values come from the stored numbers, not from ITK."
    n = np.arange(32 * 32).reshape(32, 32) * 3 % 4001 - (2000 if signed else 0)
    scale = dict(RescaleSlope=2, RescaleIntercept=-50)
    window = dict(WindowCenter=int(n.mean()), WindowWidth=2001)
    one, two = (f"MONOCHROME{k}" for k in (1, 2))
    for tags, v in (({}, n), (scale, 2.0 * n - 50), (window, n), (scale | window, 2.0 * n - 50)):
        want = np.clip((v - (int(n.mean()) - 0.5)) / 2000 + 0.5, 0, 1) if "WindowCenter" in tags else v
        assert len(np.unique(want)) > 100
        for photometric, right in ((two, want), (one, want.max() + want.min() - want)):
            file = dicom(tmp_path / "x", n, photometric, bits=bits, signed=signed, syntax=syntax, **tags)
            got = read_view(file, "AP").grey.numpy()
            np.testing.assert_allclose(got, right, atol=1e-3, err_msg=f"{photometric} {tags}")


PADDINGS = {  # bits, signed, value of the padded pixels, header
    "0": (12, False, 0, dict(PixelPaddingValue=0)),
    "4095": (12, False, 4095, dict(PixelPaddingValue=4095)),
    "65535": (16, False, 65535, dict(PixelPaddingValue=65535)),
    "-1 in place of 65535": (16, False, 65535, dict(PixelPaddingValue=-1)),
    "above the bits that are stored": (12, False, 65535, dict(PixelPaddingValue=65535)),
    "-2000": (16, True, -2000, dict(PixelPaddingValue=-2000)),
    "-2000 of 12 bits": (12, True, -2000, dict(PixelPaddingValue=-2000)),
    "a range": (12, False, 4050, dict(PixelPaddingValue=4095, PixelPaddingRangeLimit=4000)),
    "a range below": (16, True, -1500, dict(PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1000)),
}


QUICK = {"0", "-2000 of 12 bits", "a range"}


@pytest.mark.parametrize("photometric", ["MONOCHROME1", pytest.param("MONOCHROME2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PADDINGS])
def test_padding_is_no_image(name, photometric, here, tmp_path):
    "The views are those of the same images with other values in the same padding; so are the notes."
    bits, signed, value, header = PADDINGS[name]
    header = {k: v % 65536 if not signed and v < 0 else v for k, v in header.items()}
    outside = np.zeros((96, 96), bool)
    outside[:, :16] = outside[80:] = True

    def calibrated(value, **tags):
        views = []
        for v, which in zip(here.y, VIEW_LETTERS):
            n = 100 + grey(v, 1800)
            n = np.where(outside, value, 2000 - n if photometric == "MONOCHROME1" else n)
            file = dicom(
                tmp_path / which, n, photometric, bits=bits, signed=signed, RescaleSlope=1, RescaleIntercept=-7, **tags
            )
            views.append(read_view(file, which))
        return views, calibrate_views(here.net, tuple(views))

    views, (y, done, _, _) = calibrated(value, **header)
    assert (views[0].covered.numpy() == ~outside).all() and all("padding, which is not image" in line for line in done)
    want = calibrated(17, PixelPaddingValue=17)[1][0]
    torch.testing.assert_close(y, want)
    taken = calibrated(value)[1][0]
    assert (taken - want).abs().max() > 1  # without the tag it is image


@pytest.mark.parametrize("signed, vr, value", [(False, "SS", -2000), (True, "US", 63536)])
def test_padding_of_the_other_kind_of_number(signed, vr, value, here, tmp_path):
    "Sixteen bits are sixteen bits, whether the header takes them for a signed number or not."
    pydicom = pytest.importorskip("pydicom")
    n = grey(here.y[0], 4000)
    n[:, :10] = -2000 if signed else 63536
    file = dicom(tmp_path / "x", n, bits=16, signed=signed)
    ds = pydicom.dcmread(file)
    ds.add_new(0x00280120, vr, value)
    ds.save_as(file)
    assert (~read_view(file, "AP").covered).sum() == 960


def test_headers_as_pydicom_reads_them(here, tmp_path):
    "Fields that the standard forbids or requires to be ignored."
    pydicom = pytest.importorskip("pydicom")
    from pydicom.pixels import apply_modality_lut

    n = grey(here.y[0], 4000)
    garbage = n.astype(int) | (np.arange(96) % 16 << 12)
    for numbers, tags in (
        (n, dict(RescaleIntercept=-1000)),  # half a rescaling is none
        (n, dict(RescaleSlope=2)),
        (n, dict(RescaleSlope=-1, RescaleIntercept=0)),
        (n, dict(RescaleSlope="0.001", RescaleIntercept="-1")),
        (garbage, {}),  # bits above those that are stored
        (garbage, dict(photometric="MONOCHROME1")),
        (n, dict(HighBit=15)),
        (n, dict(PixelPaddingRangeLimit=0)),  # a limit without a value
        (n, dict(SmallestImagePixelValue=7, LargestImagePixelValue=9)),
    ):
        file = dicom(tmp_path / "x", numbers, **tags)
        ds = pydicom.dcmread(file)
        want = apply_modality_lut(ds.pixel_array, ds).astype(np.float64)
        if ds.PhotometricInterpretation == "MONOCHROME1":
            want = want.max() + want.min() - want
        np.testing.assert_allclose(read_view(file, "AP").grey, want, atol=1e-3, err_msg=str(tags))
    with pytest.raises(UserError, match="High Bit"):  # it is unclear which bits are the pixel's
        read_view(dicom(tmp_path / "x", garbage, HighBit=15), "AP")
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [4, 0, 16], "US"
    table.LUTData = np.arange(4, dtype="<u2").tobytes()
    table["LUTData"].VR = "OW"
    window = dict(WindowCenter=1, WindowWidth=2)
    for key, words in (("ModalityLUTSequence", "modality lookup table"), ("VOILUTSequence", "VOI lookup table")):
        for syntax in SYNTAXES:
            tags = {key: pydicom.Sequence([table])} | (window if key[0] == "M" else {})
            view = read_view(dicom(tmp_path / "y", n, syntax=syntax, **tags), "AP")
            assert words in view.done[0] and (view.grey.numpy() == n).all()
    assert not read_view(dicom(tmp_path / "z", n), "AP").done


def test_spacing_of_a_scanned_film_and_headers_without_sense(here, tmp_path):
    n = grey(here.y[0], 4000)
    view = lambda **tags: read_view(dicom(tmp_path / "x", n, **tags), "AP")
    assert view(NominalScannedPixelSpacing=[0.2, 0.2]).mm == (0.2, 0.2)
    assert view(ImagerPixelSpacing=[0, 0], PixelSpacing=[0.3, 0.3]).mm == (0.3, 0.3)
    assert view(EstimatedRadiographicMagnificationFactor=0.5).enlarged is None
    assert "is not possible" in view(EstimatedRadiographicMagnificationFactor=0.5).done[0]


def test_nifti_headers_as_nibabel_reads_them(here, tmp_path):
    nib = pytest.importorskip("nibabel")
    n = grey(here.y[0], 4000).T.astype(np.int16)[:, ::-1]  # to the left, to the head
    path = tmp_path / "x.nii"

    def write(changes, form):
        nib.save(nib.Nifti1Image(n[:, None].astype(form), np.diag([-3.3, -3.3, 3.3, 1])), path)
        header = nib.Nifti1Header.template_dtype.fields
        b = bytearray(path.read_bytes())
        for field, k, value in changes:
            dtype, at = header[field][:2]
            at += dtype.base.itemsize * k
            b[at : at + dtype.base.itemsize] = np.array(value, dtype.base).tobytes()
        path.write_bytes(b)

    for form in (np.int16, np.float32):
        for changes in (
            [],
            [("scl_slope", 0, 0), ("scl_inter", 0, 1e12)],
            [("scl_slope", 0, np.nan), ("scl_inter", 0, 1e12)],
            [("scl_slope", 0, -2), ("scl_inter", 0, 5)],
            [("pixdim", 1, -3.3)],
            [("pixdim", 3, -3.3)],
            [("pixdim", 0, 0), ("pixdim", 5, np.nan)],
            [("cal_max", 0, 3), ("cal_min", 0, 1)],
            [("intent_code", 0, 1007)],
        ):
            write(changes, form)
            want = np.asarray(nib.load(path).get_fdata())[:, 0, ::-1].T
            view = read_view(path, "AP")
            np.testing.assert_allclose(view.grey, want, rtol=1e-5, err_msg=str(changes))
            assert view.mm == pytest.approx((3.3, 3.3), rel=1e-5), changes
    nib.save(nib.Nifti2Image(n[:, None], np.diag([-3.3, -3.3, 3.3, 1])), path)
    view = read_view(path, "AP")
    assert (view.grey.numpy() == n[:, ::-1].T).all() and view.mm == pytest.approx((3.3, 3.3))


@pytest.mark.parametrize(
    "error", [ValueError, IndexError, RuntimeError, MemoryError, OverflowError, KeyError, TypeError]
)
def test_whatever_a_library_raises_is_one_sentence(error, here, say, tmp_path, monkeypatch):
    def fail(*a, **k):
        raise error("first line\nsecond line")

    dicom(tmp_path / "a.dcm", grey(here.y[0], 4000))
    nifti(grey(here.y[0], 4000), tmp_path / "a.nii")
    for target, file in (
        ("open_dicom", tmp_path / "a.dcm"),
        ("read_nifti_view", tmp_path / "a.nii"),
        ("read_picture", here.pngs[0]),
        ("load_tensor", here.pts[0]),
    ):
        with monkeypatch.context() as m:
            m.setattr(f"diffx2ct.two_images.{target}", fail)
            said = say("--out", tmp_path / "c.nii", files=[file, here.pngs[1]], code=2)[1]
        assert f"{file} cannot be read as an X-ray image ({error.__name__}" in said, said


def test_damaged_headers_are_one_sentence_or_an_image(here, tmp_path):
    "Bytes of the header replaced by others, a few hundred times."
    g = grey(here.y[0], 4000)
    files = [
        dicom(
            tmp_path / "a.dcm", g, WindowCenter=500, WindowWidth=300, PixelPaddingValue=0, PatientOrientation=["F", "L"]
        ),
        nifti(g.astype(np.int16), tmp_path / "a.nii"),
        png(g, tmp_path / "a.png", np.uint16),
        tmp_path / "a.tiff",
        tmp_path / "a.jpg",
    ]
    exif = Image.Exif()
    exif[274] = 6
    for file in files[3:]:
        Image.fromarray((g / 16).astype(np.uint8)).save(file, exif=exif)
    r = np.random.default_rng(0)
    ends = {"View": 0, "UserError": 0}
    for file in files:
        whole = file.read_bytes()
        for _ in range(60):
            b = bytearray(whole)
            for at in r.integers(0, min(len(b), 600), 3):
                b[at] = r.integers(256)
            bad = tmp_path / f"bad{file.suffix}"
            bad.write_bytes(b)
            try:
                ends[type(read_view(bad, "AP")).__name__] += 1
            except UserError as e:
                ends["UserError"] += 1
                assert "bad" in str(e) and "\n" not in str(e), str(e)
    assert min(ends.values()) > 10, ends


def test_stored_views_are_line_integrals(here, say, tmp_path):
    out, err = say("--out", tmp_path / "c.nii.gz", "--method", "consistent_mean", "--consistency", "on", files=here.pts)
    assert err == "" and "display" not in out
    x = to_unit(
        torch.from_numpy(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "c.nii.gz"))).astype(np.float32)), WINDOW
    )
    assert (
        here.net.A(density(x[None, None], WINDOW))[0] - here.y
    ).norm() / here.y.norm() < 0.01  # head up, left at the right: as projected
    out, _ = say("--out", tmp_path / "m.nii.gz", files=[here.pts[0], here.pngs[1]])
    assert "stored view, taken as it is" in out and "consistency is soft" in out  # one picture is enough to be careful
    out, err = say("--out", tmp_path / "w.nii.gz", files=[here.pts[0], save_tensor(here.y[1] / 10, tmp_path / "cm.pt")])
    assert "consistency is soft for this case" in err  # centimetres


def test_a_model_of_display_images_takes_them_as_they_are(here, say, tmp_path):
    out, err = say("--out", tmp_path / "c.nii.gz", model="display")
    assert err == "" and "from black to white" in out and "consistency is off" in out
    assert (
        "needs line integrals"
        in say("--out", tmp_path / "d.nii.gz", "--consistency", "soft", model="display", code=2)[1]
    )
    assert (
        "consistent_mean is not one this model has"
        in say("--out", tmp_path / "d.nii.gz", "--method", "consistent_mean", model="display", code=2)[1]
    )


@pytest.mark.slow
def test_films_are_set_right_and_said_so(here, say, tmp_path):
    "Exchanged, mirrored and inverted films give the volume of the same films as they should be."
    plain, _ = say("--out", tmp_path / "a.nii")
    flip = png(np.asarray(Image.open(here.at / "LAT.png"))[:, ::-1], tmp_path / "m.png")
    dark = [png(255 - np.asarray(Image.open(p)).astype(int), tmp_path / f"d{p.name}") for p in here.pngs]
    read = lambda name: sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name))).astype(float)
    for name, files, words in (
        ("b.nii", here.pngs[::-1], "so they were exchanged (margin"),
        ("c.nii", [here.pngs[0], flip], "faces right, so it was mirrored (margin"),
        ("d.nii", dark, "bone is darker than air, so black and white were exchanged (margin"),
    ):
        out, _ = say("--out", tmp_path / name, files=files)
        assert words in out and words not in plain
        assert np.abs(read(name) - read("a.nii")).mean() < 20, name
    out, _ = say("--out", tmp_path / "e.nii", "--facing", "right", "--keep_order", "--bone", "dark", files=here.pngs)
    assert "faces right, so it was mirrored" in out and out.count("bone is darker than air") == 2


def test_what_was_found_is_in_the_report(here, say, tmp_path):
    out, _ = say("--out", tmp_path / "c.nii", files=here.pngs[::-1])
    films = json.loads((tmp_path / "c_trust.json").read_text())["films"]
    assert films["report"] in out and films["exchanged"] and films["facing"] == "left" and films["height_fitted"]
    assert films["mass_difference"]["after"] <= films["mass_difference"]["before"]
    assert "films" not in json.loads(
        (say("--out", tmp_path / "p.nii", files=here.pts), tmp_path / "p_trust.json")[1].read_text()
    )


def test_suspicions_warn_and_go_on(here, say, tmp_path):
    noise = png(np.random.default_rng(0).integers(0, 255, (64, 64)), tmp_path / "noise.png")
    again = png(np.asarray(Image.open(here.at / "AP.png"))[6:, 4:], tmp_path / "again.png")
    for files, words in (
        ([here.pngs[0], noise], "noise.png does not look like the LAT view"),
        (here.pts[::-1], "look exchanged"),
        ([here.pngs[0], again], "look like the same view"),
    ):
        out, err = say("--out", tmp_path / "c.nii.gz", "--method", "mean", files=files)
        assert words in err and "check that" in err and err.startswith("diffx2ct: warning: "), err
    small = [png(grey(v, 255, size=12), tmp_path / f"s{n}.png") for v, n in zip(here.y, VIEW_LETTERS)]
    assert "is small: 12 x 12 pixels" in say("--out", tmp_path / "c.nii.gz", "--method", "mean", files=small)[1]


def test_films_of_other_heights_and_of_half_a_pixel_size_are_taken(here, say, tmp_path):
    low = png(grey(here.y[0], 255, size=80), tmp_path / "a.png")
    assert "no pixel size" in say("--out", tmp_path / "c.nii", files=[low, here.pngs[1]])[0]
    image = sitk.GetImageFromArray(grey(here.y[0], 255).astype(np.float32))
    image.SetSpacing([N * MM / 96] * 2)
    sitk.WriteImage(image, str(tmp_path / "b.nii"))
    out, _ = say("--out", tmp_path / "c.nii", files=[tmp_path / "b.nii", here.pngs[1]])
    assert (
        "pixels of 3.33 x 3.33 mm, from the file" in out and "its scale is guessed from the size of the detector" in out
    )


def test_the_network_of_a_checkpoint_calibrates(here, tmp_path):
    "An untrained one gives its films times 250 mm; its detector may be finer than the model's."
    net = Calibrator([8, 8])
    head = SimpleNamespace(pixels=2 * N)
    pair = tuple(read_view(p, n) for p, n in zip(here.pngs, VIEW_LETTERS))
    y, done, _, found = calibrate_views(here.net, pair, net, head)
    assert y.shape == (2, N, N) and 200 < y.max() <= 250 and "network" in found["calibration"] in done[0]


# what is refused


def cut(path, to, share):
    to.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return to


def spoil(path, old, new):
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


def nifti(a, path):
    sitk.WriteImage(sitk.GetImageFromArray(a), str(path))
    return path


def written(path, words):
    path.write_text(words)
    return path


def wrong_manifest(here, tmp, spec="x2ct", domain="line_integral"):
    from dataclasses import asdict

    (tmp / "p").mkdir(parents=True)
    write_manifest(tmp, asdict(geometry(spec, N * MM)), N, MM, N, WINDOW, {}, domain)
    return [save_tensor(v, tmp / f"p/{n}.pt") for v, n in zip(here.y, VIEW_LETTERS)]


def photo(tmp):
    return png(np.random.default_rng(0).integers(0, 255, (40, 40, 3)), tmp / "photo.png")


def pages(tmp, n=2):
    "A TIFF file of several pages."
    a = [Image.fromarray(np.random.default_rng(k).integers(0, 255, (32, 32)).astype(np.uint8)) for k in range(n)]
    a[0].save(tmp / "pages.tiff", save_all=True, append_images=a[1:])
    return tmp / "pages.tiff"


def clear(tmp, alpha):
    a = np.random.default_rng(0).integers(0, 255, (32, 32)).astype(np.uint8)
    Image.fromarray(np.dstack([a, np.full_like(a, alpha)]), "LA").save(tmp / "clear.png")
    return tmp / "clear.png"


BAD = {  # name: (what stands for the AP image, or for both; options; words of the sentence)
    "missing": (lambda h, t: t / "no.png", [], "no.png does not exist"),
    "a folder": (lambda h, t: t, [], "is a folder; name the one image file of the AP view"),
    "text": (lambda h, t: written(t / "a.txt", "x"), [], "no kind that can be read"),
    "text called PNG": (lambda h, t: written(t / "a.png", "x"), [], "a.png cannot be read to its end"),
    "text called DICOM": (lambda h, t: written(t / "a.dcm", "x"), [], "no kind that can be read"),
    "truncated PNG": (lambda h, t: cut(h.pngs[0], t / "a.png", 0.5), [], "a.png cannot be read to its end"),
    "truncated NIfTI": (
        lambda h, t: cut(nifti(np.random.rand(64, 64).astype(np.float32), t / "b.nii"), t / "a.nii", 0.5),
        [],
        "a.nii is truncated",
    ),
    "truncated packed NIfTI": (
        lambda h, t: cut(nifti(np.random.rand(64, 64).astype(np.float32), t / "b.nii.gz"), t / "a.nii.gz", 0.5),
        [],
        "a.nii.gz cannot be read to its end",
    ),
    "truncated DICOM": (
        lambda h, t: cut(dicom(t / "b", grey(h.y[0], 4000)), t / "a", 0.5),
        [],
        "a cannot be read to its end",
    ),
    "colour photograph": (lambda h, t: photo(t), [], "is a colour picture"),
    "a chest CT": (
        lambda h, t: nifti(np.zeros((16, 16, 16), np.int16), t / "ct.nii.gz"),
        [],
        "ct.nii.gz is a volume of 16 x 16 x 16 voxels, not an X-ray image",
    ),
    "a film of CTs": (lambda h, t: nifti(np.zeros((4, 8, 8, 8), np.int16), t / "ct.nii.gz"), [], "not an X-ray image"),
    "a CT slice": (
        lambda h, t: dicom(t / "ct", grey(h.y[0], 4000), sop=CT, modality="CT"),
        [],
        "ct is of modality CT, not an X-ray image",
    ),
    "an MR slice": (
        lambda h, t: dicom(t / "mr", grey(h.y[0], 4000), modality="MR"),
        [],
        "mr is of modality MR, not an X-ray image",
    ),
    "NaN": (lambda h, t: save_tensor(torch.full((N, N), torch.nan), t / "a.pt"), [], "a.pt holds NaN"),
    "black": (lambda h, t: png(np.zeros((64, 64)), t / "a.png"), [], "value 0 in every pixel"),
    "two pages": (lambda h, t: pages(t), [], "pages.tiff holds 2 pictures; export the right one"),
    "transparent everywhere": (
        lambda h, t: clear(t, 0),
        [],
        "clear.png holds no image: 1 of its pixels are transparent",
    ),
    "padding everywhere": (
        lambda h, t: dicom(t / "a", np.full((32, 32), 7), PixelPaddingValue=7),
        [],
        "a holds no image: 1 of its pixels are padding",
    ),
    "two frames": (
        lambda h, t: dicom(t / "a", np.ones((32, 32)), NumberOfFrames=2, PixelData=bytes(4096)),
        [],
        "a holds 2 frames",
    ),
    "a slope of nothing": (
        lambda h, t: dicom(t / "a", grey(h.y[0], 4000), RescaleSlope=0, RescaleIntercept=5),
        [],
        "a has a Rescale Slope of 0",
    ),
    "a stamp": (lambda h, t: png(np.eye(5), t / "a.png"), [], "5 x 5 pixels"),
    "stored at another size": (
        lambda h, t: save_tensor(torch.rand(N, 8), t / "a.pt"),
        [],
        "a.pt has shape (16, 8), the model reads 16 x 16 pixels",
    ),
    "a volume as .pt": (lambda h, t: save_tensor(torch.rand(N, N, N), t / "a.pt"), [], "2 axes are needed"),
    "another geometry": (
        lambda h, t: wrong_manifest(h, t / "drrs"),
        [],
        "states cone beams, a detector of 500 mm and 16 x 16 pixels, SAD 541 and SDD 949 mm, but",
    ),
    "another domain": (
        lambda h, t: wrong_manifest(h, t / "drrs", "parallel", "display"),
        [],
        "16 x 16 pixels, display images, but",
    ),
    "the same film twice": (lambda h, t: [h.pngs[0]] * 2, [], "are the same picture (correlation 1.00)"),
    "mirrored, the same film": (
        lambda h, t: [h.pngs[0], png(255 - np.asarray(Image.open(h.pngs[0]))[:, ::-1].astype(int), t / "m.png")],
        [],
        "are the same picture",
    ),
    "spacing in metres": (lambda h, t: h.pngs, ["--pixel_mm", "0.0001", "0.0001"], "check its pixel spacing"),
    "consistency on": (lambda h, t: h.pngs, ["--consistency", "on"], "--consistency on needs line integrals, but"),
    "mean of no samples": (lambda h, t: h.pngs, ["--method", "mean_of_k"], "--samples"),
    "one sample": (lambda h, t: h.pngs, ["--samples", "1"], "2 or more"),
    "pixels of stored views": (lambda h, t: h.pts, ["--pixel_mm", "1", "1"], "--pixel_mm is for pictures"),
    "words for numbers": (
        lambda h, t: spoil(
            dicom(t / "a", grey(h.y[0], 4000), ImagerPixelSpacing=[0.25, 0.25]), b"0.25\\0.25", b"0.2x\\0.25"
        ),
        [],
        "states '0.2x\\\\0.25' where its header needs numbers (tag 0018,1164)",
    ),
    "pixels of nothing": (lambda h, t: h.pngs, ["--pixel_mm", "0", "1"], "--pixel_mm"),
    "seed below zero": (lambda h, t: h.pngs, ["--seed", "-1"], "--seed -1"),
    "no such device": (lambda h, t: h.pngs, ["--device", "cuda:77"], "--device cuda:77"),
    "out is no NIfTI": (lambda h, t: h.pngs, ["--out", "case.png"], "end it in .nii.gz"),
    "out below a file": (lambda h, t: h.pngs, ["--out", "{}/f/case.nii.gz"], "cannot be written"),
    "out is a folder": (
        lambda h, t: ((t / "d.nii").mkdir(), h.pngs)[1],
        ["--out", "{}/d.nii"],
        "is a folder; name a file",
    ),
    "series is there": (lambda h, t: h.pngs, ["--dicom", "{}"], "is there already"),
    "no checkpoint": (lambda h, t: h.pngs, ["--checkpoint_dir", "{}/none"], "none does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_sentence_and_nothing_written(name, here, say, tmp_path):
    make, options, words = BAD[name]
    (tmp_path / "f").write_text("x")
    made = make(here, tmp_path)
    files, before = made if isinstance(made, list) else [made, here.pngs[1]], sorted(tmp_path.rglob("*"))
    _, said = say("--out", tmp_path / "new/c.nii.gz", *(o.format(tmp_path) for o in options), files=files, code=2)
    assert words in said, said
    assert [p for p in tmp_path.rglob("*") if p not in before] == []


def test_pixel_sizes_belong_to_their_images(here, say, tmp_path):
    out, _ = say("--out", tmp_path / "c.nii", "--method", "mean", "--pixel_mm", 3.3, 2.5)
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert (
        "AP.png: pixels of 3.3 mm, by --pixel_mm" in notes[0] and "LAT.png: pixels of 2.5 mm, by --pixel_mm" in notes[1]
    )


def test_there_must_be_somewhere_to_write(here, say, tmp_path):
    assert "--out" in say(code=2)[1]
    assert list(tmp_path.iterdir()) == []


def test_a_series_alone_has_its_maps_beside_it(here, say, tmp_path):
    out, _ = say("--dicom", f"{tmp_path}/s/", "--method", "sample", "--samples", 2, "--steps", 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "s",
        "s_coverage.nii.gz",
        "s_mean.nii.gz",
        "s_path_density.nii.gz",
        "s_spread.nii.gz",
        "s_spread_95.nii.gz",
        "s_trust.json",
    ]
    assert [p.suffix for p in (tmp_path / "s").iterdir()] == [".dcm"] * N
    assert all(str(p) in out for p in tmp_path.iterdir())


def test_one_call_from_python(here, say, tmp_path):
    "`reconstruct(load_model(...), views)` is the command's volume, with the checkpoint's own settings."
    model = load_model(here.at / "model")
    x = reconstruct(model, here.y.numpy())
    assert torch.equal(x, reconstruct(model.denoiser, here.y[None], c=model.config.DIFFUSION))
    say("--out", tmp_path / "c.nii", files=here.pts)
    made = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "c.nii"))).astype(np.float32)
    assert np.abs(made - (x[0].numpy() * (WINDOW[1] - WINDOW[0]) + WINDOW[0])).max() <= 0.51
    with pytest.raises(UserError, match="mm of water"):
        reconstruct(model, here.y / here.y.max())
    with pytest.raises(UserError, match="display images"):
        reconstruct(load_model(here.at / "display"), here.y)
