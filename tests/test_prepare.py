"""`diffx2ct_prepare` from the outside: real processes, tiny synthetic scans of every kind, and real CT where it is
there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import write_slices

from diffx2ct.scans import fingerprint, main

CT = Path(os.environ.get("DIFFX2CT_CT_DIR", Path(__file__).parents[1] / "../shared/ct"))
real = pytest.mark.skipif(not CT.is_dir(), reason=f"no real CT at {CT}; set DIFFX2CT_CT_DIR")
LPI = (1, 0, 0, 0, 1, 0, 0, 0, -1)
WINDOW = (-1024.0, 1500.0)


def run(*args, code=0):
    "Run the command; returns its output, or its one sentence."
    p = subprocess.run(
        [Path(sys.executable).with_name("diffx2ct_prepare"), *map(str, args)],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert p.returncode == code, (p.returncode, p.stdout, p.stderr)
    assert "Traceback" not in p.stderr
    if code == 2:
        assert p.stderr.startswith("diffx2ct: ") and p.stderr.count("\n") == 1, p.stderr
    return p.stderr if code else p.stdout


def refused(capfd, *args):
    "The one sentence of a refused run, in this process because it is quicker; what libraries print is seen too."
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in args])
    printed = capfd.readouterr().err
    assert e.value.code == 2 and printed.startswith("diffx2ct: ") and printed.count("\n") == 1, printed
    return printed


def patient(shape=(28, 24, 32)):
    "(D, H, W) HU: large right lung, small left one, spine at the back, tooth at the head."
    hu = np.full(shape, -1000, np.int16)
    grid = np.meshgrid(*[(np.arange(n) + 0.5) / n for n in shape], indexing="ij")
    for centre, radii, value in (
        ((0.5, 0.5, 0.5), (0.9, 0.36, 0.44), 40),
        ((0.5, 0.45, 0.3), (0.35, 0.22, 0.15), -800),
        ((0.45, 0.45, 0.72), (0.2, 0.2, 0.11), -800),
        ((0.5, 0.75, 0.5), (0.9, 0.06, 0.06), 700),
        ((0.12, 0.35, 0.5), (0.08, 0.08, 0.08), 1200),
    ):
        hu[sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii)) < 1] = value
    return hu


def image(hu, mm=10.0):
    img = sitk.GetImageFromArray(hu)
    img.SetSpacing([mm] * 3)
    img.SetDirection(LPI)
    img.SetOrigin([-(n - 1) / 2 * mm * s for n, s in zip(img.GetSize(), (1, 1, -1))])
    return img


def write_dicom(img, folder, modality="CT", uid="1.2.826.0.1.3680043.2.1125.1", skip=(), prefix="s"):
    tags = {
        "0008|0060": modality,
        "0010|0010": "DOE^JANE",
        "0010|0020": "MRN12345",
        "0008|0020": "20010203",
        "0008|103e": "Jane chest",
        "0020|000e": uid,
        "0020|000d": "1.2.826.0.1.3680043.2.1125.9",
        "0018|0050": f"{img.GetSpacing()[2]:g}",
    }
    write_slices(img, folder, lambda k: f"{prefix}{900 - k}.dcm", tags, skip)


def hu_of(out, case):
    return torch.load(out / f"volumes/{case}.pt", weights_only=True).float() * (WINDOW[1] - WINDOW[0]) + WINDOW[0]


def files(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    "One patient as NIfTI, NRRD, MHA, DICOM in different orientations, prepared in one run."
    tmp = tmp_path_factory.mktemp("scans")
    img = image(patient())
    scans = []
    for name, code in {
        "lps.nii.gz": "LPS",
        "ras.nii": "RAS",
        "psr.nrrd": "PSR",
        "ila.mha": "ILA",
        "sal.mhd": "SAL",
    }.items():
        sitk.WriteImage(sitk.DICOMOrient(img, code), str(tmp / name))
        scans.append(tmp / name)
    for name, code in {"axial": "LPS", "coronal": "LSA", "sagittal": "PSR"}.items():
        write_dicom(sitk.DICOMOrient(img, code), tmp / name)
        scans.append(tmp / name)
    return tmp, tmp / "out", run(*scans, "--out", tmp / "out", "--size", 16, "--mm", 20, "--pictures", "--keep_names")


def test_every_format_and_orientation_gives_the_same_patient(cases):
    _, out, _ = cases
    names = ["lps", "ras", "psr", "ila", "sal", "axial", "coronal", "sagittal"]
    volumes = [hu_of(out, n) for n in names]
    for n, v in zip(names, volumes):
        assert (v - volumes[0]).abs().max() < 1.5, n
    views = [
        torch.stack([torch.load(out / f"drrs/{n}/{v}.pt", weights_only=True) for v in ("AP", "LAT")]) for n in names
    ]
    for n, v in zip(names, views):
        assert (v - views[0]).abs().max() < 0.5, n
    assert volumes[0].shape == (16, 16, 16) and views[0].shape == (2, 16, 16) and views[0].dtype == torch.float32


def test_no_mirrored_patient(cases):
    v = hu_of(cases[1], "axial")
    lung = (v > -950) & (v < -400)
    assert lung[4:-4, :, :8].sum() > 1.4 * lung[4:-4, :, 8:].sum()  # big lung at the patient's right
    assert (v > 300)[:, 8:].sum() > 2 * (v > 300)[:, :8].sum()  # spine at the back
    assert v[:6].max() > v[10:].max() + 100  # tooth at the head


def test_views_are_the_integrals_of_the_stored_volume(cases):
    _, out, _ = cases
    rho = 1 + hu_of(out, "lps") / 1000
    ap, lat = (torch.load(out / f"drrs/lps/{v}.pt", weights_only=True) for v in ("AP", "LAT"))
    torch.testing.assert_close(ap, rho.sum(1) * 20, atol=0.05, rtol=1e-4)
    torch.testing.assert_close(lat, rho.sum(2) * 20, atol=0.05, rtol=1e-4)


def test_manifest_and_last_line(cases):
    _, out, printed = cases
    m = json.loads((out / "drrs/manifest.json").read_text())
    assert (m["format"], m["view_domain"], m["size"], m["mm"], m["pixels"], m["hu_window"], m["geometry"]["kind"]) == (
        1,
        "line_integral",
        16,
        20.0,
        16,
        [-1024.0, 1500.0],
        "parallel",
    )
    assert set(m["cases"]) == {p.stem for p in (out / "volumes").glob("*.pt")} and len(m["cases"]) == 8
    last = printed.strip().splitlines()[-1]
    assert f"DATA.PT_DATA_DIR={out}/volumes" in last and f"DATA.DRR_DIR={out}/drrs" in last
    assert (out / "pictures/lps.png").read_bytes()[:4] == b"\x89PNG"
    from diffx2ct.config import load_config
    from diffx2ct.data import CTPairs

    sets = re.findall(r"--set (\S+)", last)
    assert len(CTPairs(load_config(sets=sets).DATA)) == 8  # the printed options are right as they stand


def test_nothing_of_the_header_leaves_it(cases):
    _, out, printed = cases
    for word in (b"DOE^", b"JANE", b"Jane", b"MRN12345", b"20010203", b"1.2.826"):
        assert word.decode() not in printed
        for p in files(out):
            assert word not in p.read_bytes(), (p, word)


@pytest.mark.slow
def test_a_second_run_adds_and_keeps(cases):
    tmp, out, _ = cases
    before = files(out / "volumes")
    (tmp / "more").mkdir(exist_ok=True)
    sitk.WriteImage(image(patient() + np.int16(5)), str(tmp / "more/new one.nii.gz"))
    printed = run(tmp / "lps.nii.gz", tmp / "more/new one.nii.gz", "--out", out)
    assert "1 case written, 1 kept" in printed and (out / "volumes/new_one.pt").exists()
    after = files(out / "volumes")
    assert {k: after[k] for k in before} == before
    assert "new_one" in json.loads((out / "drrs/manifest.json").read_text())["cases"]
    assert "1 case written" in run(tmp / "lps.nii.gz", "--out", out, "--overwrite")
    assert files(out / "volumes")[out / "volumes/lps.pt"] != before[out / "volumes/lps.pt"]


@pytest.mark.slow
def test_two_at_once_share_a_folder(tmp_path):
    "The second waits for the first; the folder then holds what both were given, and the manifest lists both."
    for name in "ab":
        sitk.WriteImage(image(patient() + ord(name)), str(tmp_path / f"{name}.nii.gz"))
    command = [
        Path(sys.executable).with_name("diffx2ct_prepare"),
        "--out",
        tmp_path / "out",
        "--size",
        "16",
        "--mm",
        "20",
    ]
    both = [
        subprocess.Popen(
            [*command, tmp_path / f"{name}.nii.gz"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, encoding="utf-8"
        )
        for name in "ab"
    ]
    for p in both:
        assert "Traceback" not in p.communicate(timeout=300)[1] and p.returncode == 0
    assert set(json.loads((tmp_path / "out/drrs/manifest.json").read_text())["cases"]) == {"a", "b"}
    assert sorted(p.name for p in (tmp_path / "out/volumes").iterdir()) == ["a.pt", "b.pt"]


@pytest.mark.parametrize(
    "args, word",
    [
        (("--size", 24), "size 16, not 24"),
        (("--mm", 10), "mm 20, not 10"),
        (("--geometry", "x2ct"), "geometry"),
        (("--window", -1000, 1000), "hu_window"),
        (("--pixels", 32), "pixels 16, not 32"),
        (("--table", "keep"), "table left open, not keep"),
        (("--centre", "volume"), "centre left open, not volume"),
        (("--air_threshold", -400), "air_threshold -500, not -400"),
        (("--no-float16",), "float16 True, not False"),
    ],
)
def test_settings_may_not_change(cases, args, word, capfd):
    tmp, out, _ = cases
    before = files(out)
    assert word in refused(capfd, tmp / "lps.nii.gz", "--out", out, *args)
    assert files(out) == before


@pytest.mark.slow
def test_one_name_from_two_scans(cases):
    tmp, out, _ = cases
    (tmp / "again").mkdir(exist_ok=True)
    sitk.WriteImage(image(patient() + np.int16(9)), str(tmp / "again/ras.nii"))
    assert "made from other files" in run(tmp / "again/ras.nii", "--out", out, code=2)
    run(tmp / "again/ras.nii", tmp / "ras.nii", "--out", tmp / "both", "--size", 16)
    assert len(list((tmp / "both/volumes").glob("*.pt"))) == 2


def test_a_scan_in_company_keeps_its_name(tmp_path, capfd):
    "Two patients on one grid: same name, same header, same corners."
    for p, lung in (("p1", -800), ("p2", -850)):
        hu = patient()
        hu[hu == -800] = lung
        (tmp_path / p).mkdir()
        sitk.WriteImage(image(hu), str(tmp_path / p / "ct.nii"))
    go = lambda *names: main(
        [*(str(tmp_path / p / "ct.nii") for p in names), "--out", str(tmp_path / "o"), "--size", "16"]
    )
    for names, printed in (
        (("p1",), "1 case written, 0 kept"),
        (("p2", "p1"), "1 case written, 1 kept"),
        (("p1", "p2"), "0 cases written, 2 kept"),
        (("p2",), "0 cases written, 1 kept"),
    ):
        go(*names)
        assert printed in capfd.readouterr().out
    assert set(json.loads((tmp_path / "o/drrs/manifest.json").read_text())["cases"]) == {"ct", "p2_ct"}


def test_settings_are_taken_over(tmp_path, capfd):
    for name in "ab":
        sitk.WriteImage(image(patient() + np.int16(ord(name))), str(tmp_path / f"{name}.nii"))
    main(
        [
            str(tmp_path / "a.nii"),
            "--out",
            str(tmp_path / "o"),
            "--size",
            "16",
            "--table",
            "keep",
            "--centre",
            "volume",
            "--air_threshold",
            "-400",
            "--no-float16",
        ]
    )
    main([str(tmp_path / "b.nii"), "--out", str(tmp_path / "o")])
    at = tmp_path / "o/drrs/manifest.json"
    m = json.loads(at.read_text())
    assert {(c["table"], c["centre"]) for c in m["cases"].values()} == {("keep", "volume")} and (
        m["air_threshold"],
        m["float16"],
    ) == (-400, False)
    assert torch.load(tmp_path / "o/volumes/b.pt", weights_only=True).dtype == torch.float32
    before = {
        k: v for k, v in m.items() if k not in ("table", "centre", "air_threshold", "float16")
    }  # as it was written before
    at.write_text(
        json.dumps(
            before
            | dict(
                cases={
                    n: c | dict(fingerprint=fingerprint([tmp_path / f"{n}.nii"], places=(0, 1)))
                    for n, c in m["cases"].items()
                }
            )
        )
    )
    main([str(tmp_path / "a.nii"), str(tmp_path / "b.nii"), "--out", str(tmp_path / "o"), "--table", "remove"])
    assert "0 cases written, 2 kept" in capfd.readouterr().out
    at.write_text(json.dumps(m | {"air_threshold": "-400"}))
    assert "is not a manifest" in refused(capfd, tmp_path / "a.nii", "--out", tmp_path / "o")


def test_a_case_is_never_half_new(tmp_path, monkeypatch):
    """A new version that cannot be written leaves the old one; stopped between the new views and the new volume, a
    case has no volume."""
    from diffx2ct import basics, data

    old, new = (torch.zeros(8, 8, 8), torch.zeros(2, 8, 8)), (torch.ones(8, 8, 8), torch.ones(2, 8, 8))
    save = lambda case, pair: data.save_case(case, *pair, tmp_path / "volumes", tmp_path / "drrs")
    there = lambda: [
        float(basics.load_tensor(p, dims=d).mean())
        for p, d in ((tmp_path / "volumes/a.pt", 3), (tmp_path / "drrs/a/AP.pt", 2), (tmp_path / "drrs/a/LAT.pt", 2))
    ]
    files = lambda: sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    save("a", old)
    with monkeypatch.context() as m:

        def full(thing, path):
            path.write_bytes(b"half")
            if thing.ndim == 3:
                raise OSError(28, "No space left on device")

        m.setattr(data, "write_pt", full)
        with pytest.raises(
            data.UserError,
            match="a.pt could not be saved .No space left on device.; what was there before is unchanged",
        ):
            save("a", new)
    assert there() == [0, 0, 0] and files() == ["AP.pt", "LAT.pt", "a.pt"]
    with monkeypatch.context() as m:
        replace = basics.os.replace

        def stopped(source, target):
            if target.name == "LAT.pt":
                raise KeyboardInterrupt
            replace(source, target)

        m.setattr(basics.os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            save("a", new)
    assert data.list_cases(tmp_path / "volumes") == [] and files() == ["AP.pt", "LAT.pt"]
    save("a", new)
    assert there() == [1, 1, 1]
    (tmp_path / "volumes/b.pt").mkdir()
    with pytest.raises(data.UserError, match="cannot be replaced"):
        save("b", new)


@pytest.mark.slow
def test_table_is_removed_or_kept(tmp_path):
    hu = patient((32, 48, 48))
    hu[:, 43, 2:46] = 0
    hu[:, 46, 2:46] = 0
    sitk.WriteImage(image(hu, 6.0), str(tmp_path / "t.nii"))
    run(tmp_path / "t.nii", "--out", tmp_path / "r", "--size", 48, "--mm", 6, "--centre", "volume")
    run(
        tmp_path / "t.nii",
        "--out",
        tmp_path / "k",
        "--size",
        48,
        "--mm",
        6,
        "--centre",
        "volume",
        "--table",
        "keep",
        "--no-float16",
    )
    removed, kept = hu_of(tmp_path / "r", "t"), hu_of(tmp_path / "k", "t")
    assert kept[:, 43].max() > -200 and removed[:, 43:].max() < -990
    assert ((removed - kept)[:, :41].abs() > 1.5).float().mean() < 1e-3  # the patient is untouched
    assert torch.load(tmp_path / "k/volumes/t.pt", weights_only=True).dtype == torch.float32


@pytest.mark.slow
def test_x2ct_tree_and_packed_array(tmp_path):
    cube = patient((16, 16, 16))
    for case in ("LIDC-1", "LIDC-2"):
        (tmp_path / f"x2ct/{case}").mkdir(parents=True)
        with h5py.File(tmp_path / f"x2ct/{case}/ct_xray_data.h5", "w") as f:
            f["ct"], f["xray1"] = cube + 1000, np.zeros((4, 4), np.uint8)
    run(tmp_path / "x2ct", "--out", tmp_path / "o", "--h5_offset", 1000, "--geometry", "x2ct", "--pixels", 24)
    m = json.loads((tmp_path / "o/drrs/manifest.json").read_text())
    assert (m["size"], m["mm"], m["geometry"]["sad_mm"], sorted(m["cases"]), m["cases"]["LIDC-1"]["h5_offset"]) == (
        16,
        20.0,
        541.0,
        ["LIDC-1", "LIDC-2"],
        1000,
    )
    assert (hu_of(tmp_path / "o", "LIDC-2") - torch.from_numpy(cube).float()).abs().max() < 1.5
    (tmp_path / "LIDC-3").mkdir()
    (tmp_path / "x2ct/LIDC-1/ct_xray_data.h5").rename(tmp_path / "LIDC-3/ct_xray_data.h5")
    run(tmp_path / "LIDC-3", "--out", tmp_path / "o", "--overwrite")  # the offset is taken over, and so is the name
    assert (hu_of(tmp_path / "o", "LIDC-1") - torch.from_numpy(cube).float()).abs().max() < 1.5
    np.savez(tmp_path / "pack.npz", volumes_hu_zyx=np.stack([cube[::-1]] * 2), ids=["P1", "P2"], spacing_mm=3.27)
    run(tmp_path / "pack.npz", "--out", tmp_path / "p")
    assert json.loads((tmp_path / "p/drrs/manifest.json").read_text())["mm"] == 3.27
    assert (hu_of(tmp_path / "p", "P2") - torch.from_numpy(cube).float()).abs().max() < 1.5


def bad_scans(tmp):
    "name -> (what makes it, words of the sentence)"
    img = sitk.DICOMOrient(image(patient()), "LPS")

    def nifti(change=lambda b: b, hu=None, name="bad.nii"):
        sitk.WriteImage(img if hu is None else image(hu), str(tmp / name))
        (tmp / name).write_bytes(change(bytearray((tmp / name).read_bytes())))
        return tmp / name

    def no_affine(b):
        b[252:256] = bytes(4)
        return b

    def cut(b):
        return b[: len(b) // 2]

    def nan():
        hu = patient().astype(np.float32)
        hu[3, 3, 3] = np.nan
        return nifti(hu=hu)

    def four():
        sitk.WriteImage(sitk.JoinSeries([img, img]), str(tmp / "bad.nii"))
        return tmp / "bad.nii"

    def series(**kw):
        write_dicom(img, tmp / "bad", **kw)
        return tmp / "bad"

    def two():
        write_dicom(img[:, :, :9], tmp / "bad", uid="1.2.826.0.1.3680043.2.1125.2", prefix="t")
        return series()

    def short_slice():
        p = series()
        f = p / "s899.dcm"
        f.write_bytes(f.read_bytes()[:-400])
        return p

    def h5(short=False):
        with h5py.File(tmp / "bad.h5", "w") as f:
            f["ct" if short else "xray1"] = patient((16, 16, 16))
        if short:
            (tmp / "bad.h5").write_bytes((tmp / "bad.h5").read_bytes()[:3000])
        return tmp / "bad.h5"

    def text(name):
        (tmp / name).write_text("hello")
        return tmp / name

    def folder():
        (tmp / "bad").mkdir()
        return tmp / "bad"

    return dict(
        missing=(lambda: tmp / "bad.nii", "does not exist"),
        empty_folder=(folder, "holds no scan"),
        no_affine=(lambda: nifti(no_affine), "left and right"),
        four_d=(four, "4 dimensions"),
        short_nii=(lambda: nifti(cut), "truncated"),
        short_gz=(lambda: nifti(cut, name="bad.nii.gz"), "truncated"),
        short_header=(lambda: nifti(lambda b: b[:200]), "bad.nii"),
        not_nifti=(lambda: text("bad.nii"), "bad.nii"),
        suffix=(lambda: text("bad.jpg"), "no kind that can be read"),
        two_series=(two, "1: 28 slices of 32x24"),
        gap=(lambda: series(skip=[11]), "lacks a slice between"),
        not_ct=(lambda: series(modality="MR"), "modality is MR"),
        short_slice=(short_slice, "s899.dcm"),
        no_ct=(h5, "no dataset 'ct'"),
        short_h5=(lambda: h5(True), "truncated"),
        zeros=(lambda: nifti(hu=patient() * 0), "every voxel"),
        air=(lambda: nifti(hu=patient() // 100 - np.int16(900)), "nothing but air"),
        offset=(lambda: nifti(hu=patient() + np.int16(1024)), "offset"),
        padded=(lambda: nifti(hu=np.where(patient() > 1000, np.int16(-24), patient() + np.int16(1000))), "from -24 to"),
        nan=(nan, "NaN"),
    )


BY_COMMAND = "missing", "short_nii", "gap", "short_slice"  # as processes of their own


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k in BY_COMMAND else k for k in bad_scans(Path())]
)
def test_bad_scans_are_refused_in_one_sentence(tmp_path, kind, capfd):
    make, word = bad_scans(tmp_path)[kind]
    path = make()
    args = (path, "--out", tmp_path / "out", "--size", 16)
    printed = run(*args, code=2) if kind in BY_COMMAND else refused(capfd, *args)
    assert word in printed and path.name in printed and "Jane" not in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_series_is_picked(tmp_path):
    img = sitk.DICOMOrient(image(patient()), "LPS")
    write_dicom(img, tmp_path / "p")
    write_dicom(img[:, :, :9], tmp_path / "p", uid="1.2.826.0.1.3680043.2.1125.2", prefix="t")
    run(tmp_path / "p", "--out", tmp_path / "o", "--size", 16, "--series", 2, "--keep_names")
    assert json.loads((tmp_path / "o/drrs/manifest.json").read_text())["cases"]["p"]["scan_size"] == [9, 24, 32]
    write_dicom(img, tmp_path / "q", uid="1.2.826.0.1.3680043.2.1125.3")
    run(
        tmp_path / "p", tmp_path / "q", "--out", tmp_path / "o", "--series", 2, "--keep_names"
    )  # q has no choice to make
    assert json.loads((tmp_path / "o/drrs/manifest.json").read_text())["cases"]["q"]["scan_size"] == [28, 24, 32]
    assert "no series '7'" in run(tmp_path / "p", "--out", tmp_path / "o2", "--series", 7, code=2)


def test_help_teaches():
    printed = run("--help")
    assert "diffx2ct_prepare patient1.nii.gz" in printed and "--series" in printed and "diffx2ct_train --set" in printed


@pytest.mark.slow
@real
def test_two_real_chests(tmp_path):
    run(CT / "lidc_idri_0001.nii.gz", CT / "lung_dx_a0001_dicom", "--out", tmp_path, "--size", 32, "--keep_names")
    for case in ("lidc_idri_0001", "lung_dx_a0001_dicom"):
        v = hu_of(tmp_path, case)
        spine, lung, heart = v[24:] > 250, (v < -600) & (v > -980), (v > -100) & (v < 400)
        assert spine[:, 16:].sum() > 5 * spine[:, :16].sum(), case  # the spine is at the back
        assert lung[:16].sum() > lung[-6:].sum() and lung[10:20].sum() > 400, (
            case
        )  # lungs above, belly below, inside the mask
        assert heart[14:22, 8:16, 17:24].sum() > heart[14:22, 8:16, 8:15].sum(), case  # the heart is to the left
        assert v.min() >= -1001 and (v[:, -2:] < -900).float().mean() > 0.5, case  # no table at the back


@pytest.mark.slow
@real
def test_real_packed_array(tmp_path):
    printed = run(CT / "sts_ct_32.npz", "--out", tmp_path)
    assert "40 cases written" in printed
    packed = np.load(CT / "sts_ct_32.npz")
    got = hu_of(tmp_path, "STS_003").numpy()
    assert np.abs(got - packed["volumes_hu_zyx"][2][::-1].clip(-1000, 1500)).max() < 1.5
    assert json.loads((tmp_path / "drrs/manifest.json").read_text())["mm"] == pytest.approx(float(packed["spacing_mm"]))
