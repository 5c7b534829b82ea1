"""Readers of scans against the standards and against pydicom and nibabel: the right HU, or one sentence."""

import gzip
import json
import shutil
import struct

import numpy as np
import pytest
import SimpleITK as sitk

from diffx2ct.basics import UserError
from diffx2ct.scans import find_scans, main, read_image

pydicom = pytest.importorskip("pydicom")
nib = pytest.importorskip("nibabel")
MM = 10.0
CT, ENHANCED, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.4"


def body(n=(12, 10, 14)):
    "(z to the head, y to the back, x to the left) HU: a body with a lung at the right, a spine and a tooth."
    hu = np.full(n, -1000, np.int16)
    z, y, x = np.meshgrid(*[(np.arange(k) + 0.5) / k for k in n], indexing="ij")
    for c, r, v in (
        ((0.5, 0.5, 0.5), (0.95, 0.4, 0.45), 40),
        ((0.5, 0.42, 0.28), (0.35, 0.22, 0.16), -800),
        ((0.5, 0.78, 0.5), (0.95, 0.08, 0.07), 700),
        ((0.85, 0.3, 0.6), (0.09, 0.1, 0.08), 1200),
    ):
        hu[((z - c[0]) / r[0]) ** 2 + ((y - c[1]) / r[1]) ** 2 + ((x - c[2]) / r[2]) ** 2 < 1] = v
    return hu


def series(folder, hu=None, mm=MM, slope=1, inter=-1024, bits=12, signed=0, edit=None, syntax=None):
    "Write one CT series; slope and inter may depend on the slice; edit(ds, k) changes a slice before it is written."
    hu = body() if hu is None else hu
    folder.mkdir(parents=True, exist_ok=True)
    uid, study = pydicom.uid.generate_uid(), pydicom.uid.generate_uid()
    for k, plane in enumerate(hu):
        ds = pydicom.Dataset()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = syntax or pydicom.uid.ExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CT
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        ds.Modality, ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.InstanceNumber = "CT", study, uid, k + 1
        ds.PatientName, ds.PatientID = "TEST^NOBODY", "T0"
        ds.Rows, ds.Columns = plane.shape
        ds.ImagePositionPatient = [-mm * (ds.Columns - 1) / 2, -mm * (ds.Rows - 1) / 2, mm * (k - (len(hu) - 1) / 2)]
        ds.ImageOrientationPatient, ds.PixelSpacing, ds.SliceThickness = [1, 0, 0, 0, 1, 0], [mm, mm], mm
        a, b = (v(k) if callable(v) else v for v in (slope, inter))
        ds.RescaleSlope, ds.RescaleIntercept = a, b
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, bits, bits - 1, signed
        order = ">" if syntax == pydicom.uid.ExplicitVRBigEndian else "<"
        ds.PixelData = np.rint((plane.astype(float) - b) / a).astype(f"{order}{'ui'[signed]}2").tobytes()
        ds["PixelData"].VR = "OW"
        if edit:
            edit(ds, k)
        ds.save_as(folder / f"{k:03d}.dcm", enforce_file_format=True)
    return folder


def read(path, **how):
    "(z to the head, y, x) HU of the only scan in a file or folder."
    (scan,) = find_scans([path], **how)
    return sitk.GetArrayFromImage(scan.read())[::-1]


def cells(ds, change):
    "Change the stored cells of a slice."
    a = np.frombuffer(ds.PixelData, "<u2").reshape(ds.Rows, ds.Columns).copy()
    ds.PixelData = change(a).astype("<u2").tobytes()


def tags(**values):
    "An edit that sets header fields."

    def edit(ds, k):
        for key, value in values.items():
            setattr(ds, key, value)

    return edit


def frame(value, vr=None, limit=None, low=None):
    "An edit that gives each slice two columns of padding at both sides."

    def edit(ds, k):
        def change(a):
            a[:, :2] = a[:, -2:] = value & 0xFFFF
            return a

        cells(ds, change)
        ds.add_new(0x00280120, vr or ("SS" if ds.PixelRepresentation else "US"), value if low is None else low)
        if limit is not None:
            ds.add_new(0x00280121, vr or ("SS" if ds.PixelRepresentation else "US"), limit)

    return edit


def overlay(ds, k):
    cells(ds, lambda a: a | 0xA000)


def metal(ds, k):
    ds.PhotometricInterpretation = "MONOCHROME1"


def own_bits(ds, k):
    "Every second slice has other bits, sign and intercept."
    if k % 2:
        plane = np.frombuffer(ds.PixelData, "<u2").astype(int) - 1024
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.RescaleIntercept = 16, 15, 1, 0
        ds.PixelData = plane.astype("<i2").tobytes()


DICOM = dict(
    plain=dict(),
    monochrome1_signed=dict(inter=0, bits=16, signed=1, edit=metal),
    monochrome1_12_bit=dict(edit=metal),
    monochrome1_windowed=dict(edit=tags(PhotometricInterpretation="MONOCHROME1", WindowCenter=40, WindowWidth=1)),
    intercept_of_each_slice=dict(inter=lambda k: -1000 - k, bits=16),
    slope_of_each_slice=dict(slope=lambda k: 0.5 + k / 4, inter=-1000, bits=16),
    bits_and_sign_of_each_slice=dict(edit=own_bits),
    twelve_bits_signed=dict(
        hu=np.clip(body(), -1000, 1000), inter=0, signed=1, edit=lambda ds, k: cells(ds, lambda a: a & 0x0FFF)
    ),
    overlay_in_high_bits=dict(edit=overlay),
    high_bit_of_another_file=dict(edit=tags(HighBit=15)),
    padding_4095=dict(edit=frame(4095)),
    padding_65535_of_16_bits=dict(edit=frame(65535), bits=16),
    padding_65535_of_12_bits=dict(edit=frame(65535)),
    padding_0_is_water=dict(edit=frame(0), hu=np.where(body() == 0, 1, body()), inter=0, bits=16, signed=1),
    padding_minus_2000=dict(edit=frame(-2000), inter=0, bits=16, signed=1),
    padding_63536_in_signed_cells=dict(edit=frame(63536, "US"), inter=0, bits=16, signed=1),
    padding_minus_2000_in_unsigned_cells=dict(edit=frame(-2000, "SS"), bits=16),
    padding_range=dict(edit=frame(4000, low=4090, limit=3990)),
    padding_range_without_a_value=dict(edit=tags(PixelPaddingRangeLimit=0)),
    padding_of_some_slices=dict(edit=lambda ds, k: frame(4000)(ds, k) if k % 3 == 0 else None),
    implicit=dict(syntax=pydicom.uid.ImplicitVRLittleEndian, edit=frame(4095)),
    big_endian=dict(syntax=pydicom.uid.ExplicitVRBigEndian),
    deflated=dict(syntax=pydicom.uid.DeflatedExplicitVRLittleEndian),
    values_that_do_not_count=dict(
        edit=tags(
            SmallestImagePixelValue=7, LargestImagePixelValue=8, SliceThickness=99, SpacingBetweenSlices=-77,
            GantryDetectorTilt=20, ImagerPixelSpacing=[1, 1], PixelAspectRatio=[3, 1], WindowCenter=0, WindowWidth=0,
            SliceLocation=5, RescaleType="US", NumberOfFrames=1, PatientOrientation=["R", "A"],
            LossyImageCompression="01",
        )
    ),
)  # fmt: skip


@pytest.mark.parametrize("kind", DICOM)
def test_stored_numbers_become_the_right_hu(tmp_path, kind):
    how = DICOM[kind]
    want = how.get("hu", body()).astype(float).copy()
    got = read(series(tmp_path / "scan", **how))
    if "padding" in kind and kind != "padding_range_without_a_value" or kind == "implicit":
        these = slice(None, None, 3) if kind == "padding_of_some_slices" else slice(None)
        want[these, :, :2] = want[these, :, -2:] = -1000
        got = np.maximum(got, -1000)
    np.testing.assert_allclose(got, want, atol=1.5 if "slope" in kind else 1e-3)
    if "padding" in kind or kind in ("implicit", "overlay_in_high_bits"):
        return
    pixels = [pydicom.dcmread(f) for f in sorted((tmp_path / "scan").iterdir())]
    theirs = np.stack([pydicom.pixels.apply_modality_lut(ds.pixel_array, ds) for ds in pixels])
    np.testing.assert_allclose(got, theirs, atol=1e-3)


def compressed(folder, how):
    "A series whose pixels GDCM (or pydicom, RLE) has compressed."
    for k, f in enumerate(sorted(series(folder, edit=metal).iterdir())):
        ds = pydicom.dcmread(f)
        if how == "RLE":
            ds.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
        else:
            img = sitk.JoinSeries([sitk.GetImageFromArray(ds.pixel_array.astype(np.uint16))])
            writer = sitk.ImageFileWriter()
            writer.SetFileName(str(folder / "packed.dcm"))
            writer.UseCompressionOn()
            writer.SetCompressor(how)
            writer.Execute(img)
            packed = pydicom.dcmread(folder / "packed.dcm")
            assert packed["PixelData"].is_undefined_length
            ds.file_meta.TransferSyntaxUID = packed.file_meta.TransferSyntaxUID
            ds["PixelData"] = packed["PixelData"]
            ds.BitsStored, ds.HighBit = packed.BitsStored, packed.HighBit
            (folder / "packed.dcm").unlink()
        if k % 2:  # each slice its own
            ds.RescaleIntercept = -1024 + k
        ds.save_as(f)
    return folder


@pytest.mark.parametrize("how", ["JPEG", "JPEG2000", "RLE"])
def test_compressed_pixels_become_the_right_hu(tmp_path, how):
    want = body().astype(float)
    want[1::2] += np.arange(1, 12, 2)[:, None, None]
    np.testing.assert_allclose(read(compressed(tmp_path / how, how)), want, atol=1e-3)


def enhanced(folder, positions=True, edit=lambda ds: None):
    "One file with all slices as frames, in another order than that of their places, each with its own intercept."
    ds = pydicom.dcmread(series(folder).joinpath("000.dcm"))
    shutil.rmtree(folder)
    folder.mkdir()
    hu, order = body(), np.random.default_rng(0).permutation(12)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ENHANCED
    ds.NumberOfFrames = 12
    item = pydicom.Dataset()

    def group(parent, name, **values):
        inner = pydicom.Dataset()
        for key, value in values.items():
            setattr(inner, key, value)
        setattr(parent, name, [inner])

    group(item, "PlaneOrientationSequence", ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    group(item, "PixelMeasuresSequence", PixelSpacing=[MM, MM])
    ds.SharedFunctionalGroupsSequence = [item]
    del ds.ImageOrientationPatient, ds.PixelSpacing, ds.RescaleSlope, ds.RescaleIntercept, ds.ImagePositionPatient
    frames = []
    for k in map(int, order):
        frames.append(pydicom.Dataset())
        if positions:
            group(frames[-1], "PlanePositionSequence", ImagePositionPatient=[-65, -45, MM * (k - 5.5)])
        group(frames[-1], "PixelValueTransformationSequence", RescaleSlope=1, RescaleIntercept=-1024 + k)
    ds.PerFrameFunctionalGroupsSequence = frames
    ds.PixelData = np.stack([hu[k].astype(int) + 1024 - k for k in order]).astype("<u2").tobytes()
    edit(ds)
    ds.save_as(folder / "all.dcm")
    return folder


def test_enhanced_ct(tmp_path):
    np.testing.assert_allclose(read(enhanced(tmp_path / "scan")), np.maximum(body(), -1024), atol=12)
    got = read(tmp_path / "scan")
    inside = body() > -900
    np.testing.assert_allclose(got[inside], body()[inside], atol=1e-3)


def table(top=3095, inter=None, slope=None):
    "An edit that gives each slice a Modality LUT, and slope and intercept only where they are named."

    def edit(ds, k):
        item = pydicom.Dataset()
        item.add_new(0x00283002, "US", [4096, 0, 16])
        item.add_new(0x00283006, "US", [min(v, top) for v in range(4096)])
        item.ModalityLUTType = "HU"
        ds.ModalityLUTSequence = [item]
        ds.RescaleSlope, ds.RescaleIntercept = slope, inter
        if slope is None:
            del ds.RescaleSlope, ds.RescaleIntercept

    return edit


def replace(folder, change, only="005"):
    "Change the bytes of one file of a series."
    f = folder / f"{only}.dcm"
    f.write_bytes(change(f.read_bytes()))
    return folder


def without(*keys):
    def edit(ds, k):
        for key in keys:
            del ds[key]

    return edit


def at_slice(k, **values):
    return lambda ds, i: tags(**values)(ds, i) if i == k else None


def moved(share):
    "An edit that moves one slice by a share of the step."
    return lambda ds, k: k == 5 and setattr(ds, "ImagePositionPatient", [-65, -45, MM * (5 + share - 5.5)])


REFUSED = dict(
    two_slices=(dict(hu=body()[:2]), "its largest one has 2 slices"),
    one_slice=(dict(hu=body()[:1]), "its largest one has 1 slice"),
    one_row=(dict(hu=body()[:, :1]), r"12 slices of \(14, 1\)"),
    one_column=(dict(hu=body()[:, :, :1]), r"12 slices of \(1, 10\)"),
    no_positions=(dict(edit=without("ImagePositionPatient")), "lack position"),
    mr_called_ct=(dict(edit=tags(SOPClassUID=MR)), "its modality is MR Image Storage"),
    mr=(dict(edit=tags(SOPClassUID=MR, Modality="MR")), r"its modality is MR\)"),
    one_slice_of_mr=(dict(edit=at_slice(4, Modality="MR")), "different modality"),
    two_patients=(dict(edit=at_slice(4, PatientID="T1")), "different patients"),
    one_slice_turned=(dict(edit=at_slice(4, ImageOrientationPatient=[-1, 0, 0, 0, -1, 0])), "different orientation"),
    one_slice_finer=(dict(edit=at_slice(4, PixelSpacing=[5, 5])), "different spacing"),
    no_right_angle=(dict(edit=tags(ImageOrientationPatient=[1, 0, 0, 0.5, 1, 0])), "not at right angles"),
    slope_0=(dict(edit=tags(RescaleSlope=0)), "Rescale Slope of 0"),
    another_unit=(dict(edit=tags(RescaleType="Z_EFF")), "type Z_EFF"),
    two_scales=(dict(edit=table(inter=-1024, slope=1)), "Modality LUT gives 24 to"),
    colour=(dict(edit=tags(SamplesPerPixel=3)), "3 values"),
    bits_12=(dict(edit=tags(BitsAllocated=12)), "12 bits per pixel"),
    high_bit=(dict(edit=lambda ds, k: (overlay(ds, k), tags(HighBit=15)(ds, k))), "High Bit"),
    moved_by_half=(dict(edit=moved(0.5)), "lacks a slice between"),
    moved_by_a_third=(dict(edit=moved(0.3)), "lacks a slice between"),
    moved_by_a_tenth=(dict(edit=moved(-0.1)), "lacks a slice between"),
)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_says_why(tmp_path, kind):
    how, word = REFUSED[kind]
    with pytest.raises(UserError, match=word) as e:
        read(series(tmp_path / "scan", **how))
    assert "scan" in str(e.value) and "NOBODY" not in str(e.value)


def test_a_modality_table_alone_counts(tmp_path):
    "Without slope and intercept; a table cannot hold negative numbers, so it is refused as what it is."
    with pytest.raises(UserError, match="values from 24 to 2224, which are not Hounsfield units"):
        read(series(tmp_path / "scan", edit=table()))


def test_padding_does_not_hide_a_missing_intercept(tmp_path):
    def edit(ds, k):
        frame(4095)(ds, k)
        ds.RescaleIntercept = 0

    with pytest.raises(UserError, match="not Hounsfield units"):
        read(series(tmp_path / "scan", edit=edit))


def test_several_frames_without_places(tmp_path):
    with pytest.raises(UserError, match="several frames without a position"):
        read(enhanced(tmp_path / "a", edit=lambda ds: ds.__delattr__("PerFrameFunctionalGroupsSequence")))
    with pytest.raises(UserError, match="several frames without a position"):
        read(enhanced(tmp_path / "b", positions=False))


@pytest.mark.parametrize("only", ["000", "005", "011"])
@pytest.mark.parametrize("n", [-1, -100, 700, 300, 140, 0])
def test_a_damaged_slice_is_named(tmp_path, only, n):
    folder = replace(series(tmp_path / "scan"), lambda b: b[:n], only)
    with pytest.raises(UserError, match=f"{only}.dcm"):
        read(folder)


def test_a_library_never_raises_through(tmp_path):
    """Garbage in numbers of the header, an unknown compression, a compressed slice cut short: a sentence that names
    the file."""
    a = series(tmp_path / "a")
    replace(a, lambda b: b.replace(b"-1024.0 ", b"-1,024.0"))
    b = replace(compressed(tmp_path / "b", "JPEG2000"), lambda b: b[:-60])
    c = series(tmp_path / "c", edit=lambda ds, k: setattr(ds["PixelData"], "is_undefined_length", False))
    for f in c.iterdir():
        ds = pydicom.dcmread(f)
        ds.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2KLossless
        ds.PixelData = pydicom.encaps.encapsulate([b"no such stream here"])
        ds["PixelData"].is_undefined_length = True
        ds.save_as(f)
    d = series(tmp_path / "d", edit=at_slice(3, BitsStored=99))
    for folder, name in ((a, "005.dcm"), (b, "005.dcm"), (c, "000.dcm"), (d, "003.dcm")):
        with pytest.raises(UserError, match=name):
            read(folder)


def test_hidden_files_and_files_that_are_no_images(tmp_path):
    folder = series(tmp_path / "scan")
    (folder / "._000.dcm").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(4056))
    (folder / ".DS_Store").write_bytes(bytes(3) + b"Bud1")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX/._001.dcm").write_bytes(b"\x00\x05\x16\x07")
    (folder / ".trash").mkdir()
    shutil.copy(folder / "003.dcm", folder / ".trash/003.dcm")
    (folder / "readme.txt").write_text("hello")
    struct_set = pydicom.Dataset()
    struct_set.SOPClassUID, struct_set.Modality = "1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT"
    struct_set.SOPInstanceUID, struct_set.StructureSetLabel = pydicom.uid.generate_uid(), "lungs"
    struct_set.save_as(folder / "rs.dcm", implicit_vr=True, little_endian=True)
    directory = pydicom.Dataset()
    directory.file_meta = pydicom.dataset.FileMetaDataset()
    directory.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    directory.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    directory.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    directory.FileSetID, directory.DirectoryRecordSequence = "CD", []
    directory.save_as(folder / "DICOMDIR", enforce_file_format=True)
    np.testing.assert_array_equal(read(folder), body())


def test_files_without_preamble_or_suffix(tmp_path):
    folder = series(tmp_path / "scan", syntax=pydicom.uid.ImplicitVRLittleEndian)
    for f in list(folder.iterdir()):
        ds = pydicom.dcmread(f)
        del ds.file_meta, f
        pydicom.dcmwrite(folder / f"IM{ds.InstanceNumber:04d}", ds, implicit_vr=True, little_endian=True)
    for f in folder.glob("*.dcm"):
        f.unlink()
    np.testing.assert_array_equal(read(folder), body())


def test_one_series_in_several_folders(tmp_path):
    "By file count, one folder per slice, given apart, with a slice in two of them: one case."
    for name, where in (
        ("half", lambda k: "AB"[k > 5]),
        ("each", lambda k: f"{k:02d}"),
        ("few", lambda k: "AB"[k > 9]),
    ):
        folder = series(tmp_path / name)
        for k, f in enumerate(sorted(folder.glob("*.dcm"))):
            (folder / where(k)).mkdir(exist_ok=True)
            f.rename(folder / where(k) / f.name)
        np.testing.assert_array_equal(read(folder), body())
        (scan,) = find_scans(sorted(folder.iterdir()))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(scan.read())[::-1], body())
    shutil.copy(tmp_path / "half/A/005.dcm", tmp_path / "half/B/another.dcm")
    np.testing.assert_array_equal(read(tmp_path / "half"), body())
    (tmp_path / "half/B/008.dcm").unlink()
    with pytest.raises(UserError, match="lacks a slice"):
        read(tmp_path / "half")


def test_a_copy_with_other_pixels_is_no_copy(tmp_path):
    folder = series(tmp_path / "scan")
    ds = pydicom.dcmread(folder / "004.dcm")
    shutil.copy(folder / "004.dcm", folder / "copy.dcm")
    np.testing.assert_array_equal(read(folder), body())
    cells(ds, lambda a: a + 1)
    ds.save_as(folder / "copy.dcm")
    with pytest.raises(UserError, match="two slices at the same place .*004.dcm.*copy.dcm"):
        read(folder)


NAMES = {
    "Nobody Test": ("NOBODY^TEST", ""),
    "Müßig Özgür": ("Müßig^Özgür", "ISO_IR 100"),
    "Иванов Пётр": ("Иванов^Пётр", "ISO_IR 144"),
    "王小东": ("Wang^XiaoDong=王^小东", "GB18030"),
    "O\u0302zgu\u0308r": ("Ôzgür^É", "ISO_IR 192"),
    "Li Bo": ("Li^Bo", ""),
}


@pytest.mark.parametrize("folder", NAMES)
def test_the_name_of_a_dicom_folder_is_kept_nowhere(tmp_path, folder, capfd):
    name, charset = NAMES[folder]

    def who(ds, k):
        if charset:
            ds.SpecificCharacterSet = charset
        ds.PatientName = name

    series(tmp_path / "in" / folder / "CT chest", edit=who)
    main([str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--size", "16", "--mm", "12", "--pictures"])
    printed = capfd.readouterr().out
    (case,) = json.loads((tmp_path / "out/drrs/manifest.json").read_text())["cases"]
    assert case.startswith("scan_")
    kept = [p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")]
    for word in (folder, folder.split()[0], "CT chest", json.dumps(folder)[1:-1]):
        assert word not in printed
        assert not any(word in k for k in kept)
        for p in (tmp_path / "out").rglob("*"):
            by_chance = len(word.encode()) < 4  # two bytes stand in every compressed picture
            assert by_chance or p.is_dir() or word.encode() not in p.read_bytes(), p
    main([str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    assert "0 cases written, 1 kept" in capfd.readouterr().out


def test_keep_names_keeps_them(tmp_path):
    series(tmp_path / "in/LIDC-0001/a")
    series(tmp_path / "in/LIDC-0001/b")
    scans = find_scans([tmp_path / "in"], names=True)
    assert [(s.case, s.source) for s in scans] == [("LIDC-0001", "LIDC-0001"), ("LIDC-0001__2", "LIDC-0001")]
    main([str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--size", "16", "--mm", "12", "--keep_names"])
    assert set(json.loads((tmp_path / "out/drrs/manifest.json").read_text())["cases"]) == {"LIDC-0001", "LIDC-0001__2"}


# NIfTI: the fields of the header, against nibabel


def nifti(path, hu=None, sform=1, qform=1, matrix=None, other=None, fields=None, cls=None, dtype=np.int16, change=None):
    "A NIfTI file of the body; `fields` are written over its header, `change` works on its bytes."
    hu = (body() if hu is None else hu).transpose(2, 1, 0)
    affine = np.diag([-MM, -MM, MM, 1])
    affine[:3, 3] = 65, 45, -55
    affine = affine if matrix is None else matrix @ affine
    img = (cls or nib.Nifti1Image)(hu.astype(dtype), None, dtype=dtype)
    img.set_sform(affine if sform else None, sform)
    img.set_qform((affine if other is None else other @ affine) if qform else None, qform)
    img.header.set_xyzt_units("mm")
    nib.save(img, path)
    raw = bytearray(path.read_bytes())
    for at, code, *values in fields or ():
        struct.pack_into(code, raw, at, *values)
    path.write_bytes(change(bytes(raw)) if change else bytes(raw))
    return path


def by_nibabel(path):
    "(z to the head, y, x to the left) HU as nibabel reads a file."
    img = nib.load(path)
    turn = nib.orientations.ornt_transform(nib.io_orientation(img.affine), nib.orientations.axcodes2ornt("LPS"))
    hu = nib.orientations.apply_orientation(img.get_fdata(), turn)
    return hu.reshape(hu.shape[:3]).transpose(2, 1, 0)


def swapped(data):
    "A big-endian copy by nibabel."
    img = nib.Nifti1Image.from_bytes(data)
    header = img.header.as_byteswapped(">")
    return nib.Nifti1Image(np.asarray(img.dataobj), img.affine, header).to_bytes()


TILT = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2), [0, 0, 0])
NIFTI = dict(
    plain=dict(),
    slope_0_with_an_intercept=dict(fields=[(112, "<2f", 0, -1024)]),
    slope_nan=dict(fields=[(112, "<2f", np.nan, -1024)]),
    slope_inf=dict(fields=[(112, "<2f", np.inf, -1024)]),
    slope_nan_twice=dict(fields=[(112, "<2f", np.nan, np.nan)]),
    slope_and_intercept=dict(hu=body() + 1024, fields=[(112, "<2f", 1, -1024)], dtype=np.uint16),
    slope_of_a_half=dict(hu=(body() + 1024) * 2, fields=[(112, "<2f", 0.5, -1024)]),
    slope_below_0=dict(hu=-body(), fields=[(112, "<2f", -1, 0)]),
    cal_min_and_max=dict(fields=[(124, "<2f", 500, -500)]),
    global_min_and_max=dict(fields=[(140, "<2i", 5, 6)]),
    intent=dict(fields=[(68, "<h", 1002), (56, "<3f", 1, 2, 3)]),
    bitpix=dict(fields=[(72, "<h", 64)]),
    dimensions_behind_the_last=dict(fields=[(48, "<4h", 500, 0, -7, 500)]),
    five_dimensions_of_one=dict(fields=[(40, "<8h", 5, 14, 10, 12, 1, 1, 7, 7)]),
    time_step=dict(fields=[(92, "<f", -1)]),
    units_unknown=dict(fields=[(123, "<B", 0)]),
    units_of_time=dict(fields=[(123, "<B", 2 + 16)]),
    qfac_0=dict(sform=0, fields=[(76, "<f", 0)]),
    qfac_minus_1=dict(sform=0, matrix=np.diag([1, 1, -1, 1])),
    pixdim_without_a_qform=dict(qform=0, fields=[(80, "<3f", 10, 10, 15)]),
    qfac_without_a_qform=dict(qform=0, fields=[(76, "<f", -1)]),
    quaternion_without_a_code=dict(qform=0, fields=[(256, "<3f", 1, 1, 1)]),
    matrix_without_a_code=dict(sform=0, fields=[(280, "<12f", *range(12))]),
    sform_alone=dict(qform=0, matrix=TILT),
    qform_alone=dict(sform=0, matrix=TILT),
    another_origin=dict(other=nib.affines.from_matvec(np.eye(3), [1, 2, 3])),
    rounded=dict(other=nib.affines.from_matvec(nib.eulerangles.euler2mat(0.001), [0, 0, 0])),
    left_handed=dict(matrix=np.diag([-1, 1, 1, 1])),
    an_extension=dict(cls=lambda *a, **k: extended(*a, **k)),
    nifti_2=dict(cls=nib.Nifti2Image),
    big_endian=dict(change=swapped),
    float64=dict(dtype=np.float64),
    int64=dict(dtype=np.int64),
    int32=dict(dtype=np.int32),
    trailing_zeros=dict(change=lambda b: b + bytes(999)),
    trailing_nan=dict(dtype=np.float32, change=lambda b: b + struct.pack("<f", np.nan) * 7),
)


def extended(*args, **kwargs):
    img = nib.Nifti1Image(*args, **kwargs)
    img.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment" * 99))
    return img


@pytest.mark.parametrize("kind", NIFTI)
def test_nifti_is_read_as_nibabel_reads_it(tmp_path, kind):
    path = nifti(tmp_path / "ct.nii", **NIFTI[kind])
    got = read(path)
    np.testing.assert_allclose(got, by_nibabel(path), atol=1e-3)
    assert np.allclose(got, body()) or kind == "left_handed" or kind == "qfac_minus_1"
    affine = nib.load(path).affine
    img = read_image(path)
    lps = np.array(img.GetDirection()).reshape(3, 3) * img.GetSpacing()
    np.testing.assert_allclose(np.diag([-1, -1, 1]) @ lps, affine[:3, :3], atol=2e-3)
    np.testing.assert_allclose(np.array(img.GetOrigin()) * (-1, -1, 1), affine[:3, 3], atol=1e-2)


def test_nifti_units_are_obeyed(tmp_path):
    "nibabel leaves the unit to its user; the standard states it for pixdim and for both affines."
    for code, factor in ((1, 1e-3), (3, 1e3)):
        scale = np.diag([factor, factor, factor, 1])
        for form in (dict(), dict(sform=0), dict(qform=0)):
            path = nifti(tmp_path / "ct.nii", matrix=scale, fields=[(123, "<B", code)], **form)
            np.testing.assert_allclose(read_image(path).GetSpacing(), MM, rtol=1e-4)
            np.testing.assert_array_equal(read(path), body())


def test_compressed_nifti(tmp_path):
    "By what it is, not by its name; bytes behind the compressed ones do not count, a wrong sum does."
    raw = nifti(tmp_path / "ct.nii").read_bytes()
    for name, data in (("a.nii.gz", raw), ("b.nii.gz", gzip.compress(raw)), ("c.nii", gzip.compress(raw))):
        (tmp_path / name).write_bytes(data)
        np.testing.assert_array_equal(read(tmp_path / name), body())
    (tmp_path / "d.nii.gz").write_bytes(gzip.compress(raw) + b"left over from a copy")
    np.testing.assert_array_equal(read(tmp_path / "d.nii.gz"), body())
    packed = bytearray(gzip.compress(raw))
    packed[-8] ^= 1
    (tmp_path / "e.nii.gz").write_bytes(packed)
    with pytest.raises(UserError, match="e.nii.gz cannot be read to its end .CRC check failed"):
        read(tmp_path / "e.nii.gz")


MIRROR, DOUBLE = np.diag([-1, 1, 1, 1]), np.diag([2, 2, 2, 1])
CONTRADICTIONS = dict(
    mirrored=(dict(other=MIRROR), "its sform states axes to L, P, S .*its qform axes to R, P, S"),
    mirrored_codes=(dict(other=MIRROR, sform=2, qform=4), "--affine sform or --affine qform"),
    twice_as_large=(dict(other=DOUBLE), "10 x 10 x 10 mm, its qform .*20 x 20 x 20 mm"),
    turned=(dict(other=TILT), "turned by 11 degrees"),
    one_axis=(dict(other=np.diag([1, 1, 1.5, 1])), "10 x 10 x 15 mm"),
    no_number=(dict(fields=[(256, "<3f", np.nan, 0, 0)]), "its qform numbers that are NaN"),
)


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_two_affines_that_differ(tmp_path, kind):
    how, word = CONTRADICTIONS[kind]
    path = nifti(tmp_path / "ct.nii", **how)
    with pytest.raises(UserError, match=f"ct.nii contradicts itself: .*{word}"):
        read(path)
    np.testing.assert_array_equal(read(path, affine="sform"), body())
    if kind == "mirrored":
        np.testing.assert_array_equal(read(path, affine="qform"), body()[:, :, ::-1])
    if kind == "twice_as_large":
        assert read_image(path, "qform").GetSpacing() == pytest.approx((20, 20, 20))
    if kind == "no_number":
        with pytest.raises(UserError):
            read(path, affine="qform")


def test_the_choice_of_an_affine_is_part_of_a_case(tmp_path, capfd):
    path = nifti(tmp_path / "ct.nii", other=MIRROR)
    go = lambda *more: main([str(path), "--out", str(tmp_path / "o"), "--size", "16", "--mm", "10", *more])
    with pytest.raises(SystemExit):
        go()
    assert not (tmp_path / "o").exists() and "--affine" in capfd.readouterr().err
    go("--affine", "qform")
    go("--affine", "qform")
    assert "0 cases written, 1 kept" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        go("--affine", "sform")
    assert "--overwrite" in capfd.readouterr().err


NOT_READ = dict(
    colours=([(70, "<2h", 128, 24)], "type 128"),
    colours_with_a_slope=([(70, "<2h", 128, 24), (112, "<2f", 1, -1024)], "type 128"),
    complex=([(70, "<2h", 32, 64)], "type 32"),
    bits=([(70, "<2h", 1, 1)], "type 1"),
    pair=([(344, "<4s", b"ni1")], "another file"),
    analyze=([(344, "<4s", b"")], "Analyze"),
    dim_0=([(40, "<h", 0)], "0 dimensions"),
    dim_8=([(40, "<h", 8)], "8 dimensions"),
    no_voxels=([(42, "<h", 0)], "damaged"),
    flat=([(40, "<4h", 2, 14, 120, 1)], "2 dimensions"),
    axis_of_one=([(42, "<3h", 14, 120, 1)], "at least 4"),
    offset_0=([(108, "<f", 0)], "begin at byte 0"),
    offset_nan=([(108, "<f", np.nan)], "begin at byte nan"),
    intercept_nan=([(112, "<2f", 1, np.nan)], "scl_inter"),
    header_of_another_size=([(0, "<i", 347)], "does not begin as a NIfTI"),
    sheared=([(252, "<2h", 0, 1), (284, "<f", 5)], "sheared"),
    flat_matrix=([(252, "<2h", 0, 1), (280, "<12f", *[0] * 12), (80, "<3f", 0, 0, 0)], "0 x 0 x 0 mm"),
)


@pytest.mark.parametrize("kind", NOT_READ)
def test_nifti_that_is_refused(tmp_path, kind):
    fields, word = NOT_READ[kind]
    with pytest.raises(UserError, match=f"ct.nii .*{word}"):
        read(nifti(tmp_path / "ct.nii", fields=fields))


def nrrd(path, space="left-posterior-superior", more=""):
    "An NRRD file by hand."
    head = (
        f"NRRD0004\ntype: short\ndimension: 3\nsizes: 14 10 12\nspace: {space}\n{more}endian: little\nencoding: raw\n"
        f"space directions: ({MM},0,0) (0,{MM},0) (0,0,{MM})\nspace origin: (0,0,0)\n\n"
    )
    path.write_bytes(head.encode() + body().astype("<i2").tobytes())
    return path


def test_nrrd_spaces_and_units(tmp_path):
    np.testing.assert_array_equal(read(nrrd(tmp_path / "a.nrrd")), body())
    np.testing.assert_array_equal(read(nrrd(tmp_path / "a.nrrd", "LPS", 'space units: "mm" "mm" "mm"\n')), body())
    np.testing.assert_array_equal(read(nrrd(tmp_path / "a.nrrd", "right-anterior-superior")), body()[:, ::-1, ::-1])
    for space in ("scanner-xyz", "3D-right-handed", "right-posterior-superior"):
        with pytest.raises(UserError, match=f"a.nrrd .*{space if 'r-' not in space else ''}"):
            read(nrrd(tmp_path / "a.nrrd", space))
    with pytest.raises(UserError, match="not in mm"):
        read(nrrd(tmp_path / "a.nrrd", more='space units: "cm" "cm" "cm"\n'))


@pytest.mark.parametrize(
    "line", ["DistanceUnits = cm", "ElementToIntensityFunctionSlope = 2", "ElementToIntensityFunctionOffset = -1024"]
)
def test_metaimage_units_and_scale(tmp_path, line):
    img = sitk.GetImageFromArray(body())
    sitk.WriteImage(img, str(tmp_path / "a.mha"))
    raw = (tmp_path / "a.mha").read_bytes()
    np.testing.assert_array_equal(read(tmp_path / "a.mha"), body())
    (tmp_path / "a.mha").write_bytes(raw.replace(b"ElementType", line.encode() + b"\nElementType", 1))
    with pytest.raises(UserError, match=f"a.mha states {line}, which is not read"):
        read(tmp_path / "a.mha")


def test_a_new_series_of_a_patient_stays_with_that_patient(tmp_path):
    "In any order of the folders the first name is kept, new series get the next number."
    out = tmp_path / "out"
    for new in ("b", "a", "c"):
        series(tmp_path / "in/somebody" / new, body() + np.int16(ord(new)))
        main([str(tmp_path / "in"), "--out", str(out), "--size", "16", "--mm", "12"])
    cases = json.loads((out / "drrs/manifest.json").read_text())["cases"]
    first = min(cases, key=len)
    assert set(cases) == {first, f"{first}__2", f"{first}__3"}


def test_one_enhanced_file_and_one_slice(tmp_path):
    inside = body() > -900
    got = read(enhanced(tmp_path / "scan") / "all.dcm")
    np.testing.assert_allclose(got[inside], body()[inside], atol=1e-3)
    with pytest.raises(UserError, match="give the folder"):
        read(series(tmp_path / "slices") / "003.dcm")


def test_every_reader_of_a_volume_obeys_the_header(tmp_path):
    "The viewer's reader too: a slope of 0 is no scaling, two affines that differ are refused."
    from diffx2ct.volumes import read_volume

    volume, mm = read_volume(nifti(tmp_path / "a.nii", fields=[(112, "<2f", 0, -1024)]))
    np.testing.assert_array_equal(volume[::-1], body())
    assert mm == pytest.approx(MM)
    with pytest.raises(UserError, match="contradicts itself"):
        read_volume(nifti(tmp_path / "b.nii", other=MIRROR))
