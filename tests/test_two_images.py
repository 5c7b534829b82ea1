"`diffx2ct_reconstruct` from the outside: images of all kinds as other programs write them, a NIfTI volume and a DICOM series as other programs read them."

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import run_cmd
from PIL import Image

from diffx2ct.checkpoint import describe, save_model
from diffx2ct.data import density, load_config, save_tensor, to_unit, write_manifest
from diffx2ct.diffusion import build
from diffx2ct.drr import geometry
from diffx2ct.phantom import phantom
from diffx2ct.two_images import ORDER, calibrate, main, on_panel, read_view, save_dicom

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
    net = build(c, geometry("parallel", N * MM), MM, line_integrals).eval().requires_grad_(False)
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


def dicom(path, numbers, photometric="MONOCHROME2", sop=DX, modality="DX", bits=12, **tags):
    "A radiograph as pydicom writes it."
    pydicom = pytest.importorskip("pydicom")
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientName, ds.PatientID = (
        sop,
        pydicom.uid.generate_uid(),
        "DOE^JANE",
        "MRN12345",
    )
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = (
        pydicom.uid.ExplicitVRLittleEndian,
        sop,
        ds.SOPInstanceUID,
    )
    ds.Modality, ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = (
        modality,
        *numbers.shape,
        1,
        photometric,
    )
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.PixelData = (
        16,
        bits,
        bits - 1,
        0,
        numbers.astype(np.uint16).tobytes(),
    )
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
    for view, name in zip(y, ORDER):
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


def test_help_teaches():
    shown = run_cmd([sys.executable, "-c", "from diffx2ct.two_images import main; main(['--help'])"])
    assert (
        shown.returncode == 0
        and shown.stdout.startswith("usage: diffx2ct_reconstruct")
        and shown.stdout.count("  diffx2ct_reconstruct ") >= 4
    ), shown.stderr


def test_one_command_from_two_pictures_to_a_volume(here, tmp_path):
    "As a process of its own, in another folder, and what it says."
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
    files = [dicom(tmp_path / f"{n}.dcm", grey(v, 4000), ImagerPixelSpacing=[3.3, 3.3]) for v, n in zip(here.y, ORDER)]
    say("--out", tmp_path / "out/c.nii", "--dicom", tmp_path / "out/s", files=files)
    for f in (tmp_path / "out").rglob("*.*"):
        assert not f.is_file() or not any(word in f.read_bytes() for word in (b"DOE", b"MRN12345")), f


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


# what goes in


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
        pairs[name], done, doubts = calibrate(here.net, tuple(read_view(make(v, n), n) for v, n in zip(y, ORDER)))
        assert doubts == [] and len(done) == 2
        assert all(
            ("black and white were exchanged" in line) == (name in ("inverted", "CR1", "DX1")) for line in done
        ), (name, done)
        assert all(("MONOCHROME1" in line) == (name in ("CR1", "DX1")) for line in done), (name, done)
    for name, pair in pairs.items():
        assert (pair - pairs["png16"]).norm() / pairs["png16"].norm() < 0.04, name
    mean = here.net.A(density(here.net.mean, WINDOW))[0]
    assert (pairs["png16"] - y).norm() < 0.8 * (mean - y).norm()


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
    at = lambda **tags: on_panel(read_view(dicom(tmp_path / "x", n, **tags), "AP"), here.net.A)
    edge = N * MM / 96
    plain = at(ImagerPixelSpacing=[edge] * 2)[0]
    for tags in (
        dict(ImagerPixelSpacing=[1.5 * edge] * 2, EstimatedRadiographicMagnificationFactor=1.5),
        dict(ImagerPixelSpacing=[1.25 * edge] * 2, DistanceSourceToDetector=1500, DistanceSourceToPatient=1200),
        dict(PixelSpacing=[edge] * 2, PixelSpacingCalibrationType="GEOMETRY"),
        dict(PixelSpacing=[edge] * 2),
        dict(ImagerPixelSpacing=[edge] * 2, PixelSpacing=[9, 9]),
    ):
        torch.testing.assert_close(at(**tags)[0], plain, msg=str(tags))
    calibrated = dict(PixelSpacing=[edge] * 2, PixelSpacingCalibrationType="GEOMETRY")
    for tags, inside in (
        (calibrated, True),
        (dict(PixelSpacing=[edge] * 2), False),
        (calibrated | dict(ImagerPixelSpacing=[edge] * 2), False),
    ):
        assert read_view(dicom(tmp_path / "x", n, **tags), "AP").calibrated == inside, tags
    half, seen = at(ImagerPixelSpacing=[edge / 2, edge])
    assert seen.any(1).sum() == N // 2 and seen.any(0).all()  # rows and columns are not confused


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


def test_patient_orientation_is_believed(here, tmp_path):
    n = grey(here.y[1], 4000)
    plain = read_view(dicom(tmp_path / "a", n, PatientOrientation=["P", "F"]), "LAT")
    turned = read_view(dicom(tmp_path / "b", n[::-1, ::-1], PatientOrientation=["A", "H"]), "LAT")
    assert torch.equal(plain.grey, turned.grey) and len(turned.done) == 2 and not plain.done


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


def test_suspicions_warn_and_go_on(here, say, tmp_path):
    flip = lambda name: png(np.asarray(Image.open(here.at / name))[:, ::-1], tmp_path / f"m{name}")
    noise = png(np.random.default_rng(0).integers(0, 255, (64, 64)), tmp_path / "noise.png")
    for files, words in (
        (here.pngs[::-1], "look exchanged"),
        ([here.pngs[0], flip("LAT.png")], "looks mirrored"),
        ([here.pngs[0], noise], "noise.png does not look like the LAT view"),
        (here.pts[::-1], "look exchanged"),
    ):
        out, err = say(
            "--out",
            tmp_path / "c.nii.gz",
            "--method",
            "mean",
            *([] if files[0].suffix == ".pt" else ["--pixel_mm", 3.3, 3.3]),
            files=files,
        )
        assert words in err and "look whether" in err and err.startswith("diffx2ct: warning: "), err
    small = png(
        np.pad(np.asarray(Image.open(here.at / "LAT.png").resize((72, 72))), 12), tmp_path / "small.png"
    )  # a smaller patient, or another scale
    out, err = say("--out", tmp_path / "c.nii.gz", "--method", "mean", files=[here.pngs[0], small])
    assert (
        "AP.png and" in err
        and "small.png spread the body differently from head to feet" in err
        and "at one scale" in err
        and err.count("\n") == 1
    )
    assert say("--out", tmp_path / "c.nii.gz", "--method", "mean")[1] == ""


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
    return [save_tensor(v, tmp / f"p/{n}.pt") for v, n in zip(here.y, ORDER)]


def photo(tmp):
    return png(np.random.default_rng(0).integers(0, 255, (40, 40, 3)), tmp / "photo.png")


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
        "ct.nii.gz is a volume of 16 x 16 x 16 voxels, no X-ray image",
    ),
    "a film of CTs": (lambda h, t: nifti(np.zeros((4, 8, 8, 8), np.int16), t / "ct.nii.gz"), [], "no X-ray image"),
    "a CT slice": (
        lambda h, t: dicom(t / "ct", grey(h.y[0], 4000), sop=CT, modality="CT"),
        [],
        "ct is of modality CT, no X-ray image",
    ),
    "an MR slice": (
        lambda h, t: dicom(t / "mr", grey(h.y[0], 4000), modality="MR"),
        [],
        "mr is of modality MR, no X-ray image",
    ),
    "NaN": (lambda h, t: save_tensor(torch.full((N, N), torch.nan), t / "a.pt"), [], "a.pt holds NaN"),
    "black": (lambda h, t: png(np.zeros((64, 64)), t / "a.png"), [], "value 0 in every pixel"),
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
        "says cone beams, a detector of 500 mm and 16 x 16 pixels, SAD 541 and SDD 949 mm, but",
    ),
    "another domain": (
        lambda h, t: wrong_manifest(h, t / "drrs", "parallel", "display"),
        [],
        "16 x 16 pixels, display images, but",
    ),
    "rows that differ": (
        lambda h, t: png(grey(h.y[0], 255, size=80), t / "a.png"),
        [],
        "a.png has 80 rows of pixels and",
    ),
    "spacing of one only": (
        lambda h, t: nifti(grey(h.y[0], 255), t / "a.nii"),
        [],
        "LAT.png does not say its pixel size and",
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
        "says '0.2x\\\\0.25' where its header needs numbers (tag 0018,1164)",
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
