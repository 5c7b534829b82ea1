"""Letters, cross-hair, samples, signs and colours are found again in the pixels. No browser, no
model."""

import base64
import io
import json
import re

import matplotlib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image, ImageDraw, ImageFont

from diffx2ct.commands import SHARP_NOTE
from diffx2ct.data import CAUTION, COLOUR_MAPS, GENERATED, WINDOWS, Case, Layer
from diffx2ct.drawing import (
    MARGIN,
    PLANE_COLOURS,
    VOLUME_KINDS,
    draw_slice,
    layer,
    method_label,
    method_note,
    patient_position,
    scale_bar,
    slice_box,
)
from diffx2ct.report import report_figure, save_report
from diffx2ct.viewer import POINTER_AT_REST, Viewer, value_at, view
from diffx2ct.volumes import case_volumes, layers_of, name_samples, read_volumes

SIDES = {"axial": "RLAP", "coronal": "RLHF", "sagittal": "APHF"}  # at left, right, top, bottom
AXES = {"axial": (1, 2), "coronal": (0, 2), "sagittal": (0, 1)}  # rows and columns of each picture
SHAPE = (8, 12, 16)
PIXELS = 200


def pixels(png: bytes) -> np.ndarray:  # (rows, columns, 3)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def volume(value: float = 0.0, shape=(8, 8, 8)) -> np.ndarray:
    return np.full(shape, value, np.float32)


def words(fig) -> list[str]:
    return [t.get_text() for t in fig.findobj(matplotlib.text.Text) if t.get_text()]


def images(fig) -> dict:
    "The pictures of a report by their titles."
    return {a.get_title(loc="left"): a.images[0] for a in fig.axes if a.images and a.get_title(loc="left")}


@pytest.mark.parametrize("plane", SIDES)
def test_each_letter_stands_at_its_side(plane):
    "Every letter is drawn alone and looked for at each side: it matches at its own and nowhere else."
    picture = pixels(draw_slice(layer("truth", volume(-2000)), plane, (4, 4, 4), PIXELS, cross=False)).max(-1)
    margin = MARGIN
    spots = (margin / 2, PIXELS / 2), (PIXELS - margin / 2, PIXELS / 2), (PIXELS / 2, margin / 2)
    spots = (*spots, (PIXELS / 2, PIXELS - margin / 2))
    found = []
    for x, y in spots:
        there = picture[int(y) - 9 : int(y) + 9, int(x) - 9 : int(x) + 9] / 230
        apart = {}
        for letter in "RLAPHF":
            alone = Image.new("L", (PIXELS, PIXELS))
            ImageDraw.Draw(alone).text((x, y), letter, fill=255, font=ImageFont.load_default(15), anchor="mm")
            expected = np.asarray(alone)[int(y) - 9 : int(y) + 9, int(x) - 9 : int(x) + 9] / 255
            apart[letter] = np.abs(there - expected).mean()
        found.append(min(apart, key=apart.get))
    assert "".join(found) == SIDES[plane]


@pytest.mark.parametrize("plane", SIDES)
def test_the_cross_hair_crosses_at_row_and_column_in_the_colours_of_the_other_planes(plane):
    at = (2, 9, 5)
    axis = list(SIDES).index(plane)
    top, left, height, width = slice_box(SHAPE, axis, PIXELS)
    picture = pixels(draw_slice(layer("truth", volume(-2000, SHAPE)), plane, at, PIXELS))
    rows, columns = AXES[plane]
    ink = lambda k: (np.array(matplotlib.colors.to_rgb(PLANE_COLOURS[list(SIDES)[k]])) * 255).round()
    across = np.flatnonzero((np.abs(picture - ink(rows)).max(-1) < 2).sum(1) > width / 2)
    down = np.flatnonzero((np.abs(picture - ink(columns)).max(-1) < 2).sum(0) > height / 2)
    assert [list(across), list(down)] == [
        [top + int((at[rows] + 0.5) * height / SHAPE[rows])],
        [left + int((at[columns] + 0.5) * width / SHAPE[columns])],
    ]


@pytest.mark.parametrize("plane", SIDES)
def test_a_bright_voxel_is_drawn_where_it_lies(plane):
    at = (1, 9, 14)  # towards the head, the back and the left
    hu = volume(-1000, SHAPE)
    hu[at] = 1500
    axis = list(SIDES).index(plane)
    picture = pixels(draw_slice(layer("truth", hu), plane, at, PIXELS, cross=False, smooth=False)).sum(-1)
    top, left, height, width = slice_box(SHAPE, axis, PIXELS)
    bright = picture[top : top + height, left : left + width] > 600
    middle = (np.argwhere(bright).mean(0) + 0.5) / bright.shape * [SHAPE[k] for k in AXES[plane]]
    assert middle == pytest.approx([at[k] + 0.5 for k in AXES[plane]], abs=0.1)


def several(count: int = 3) -> Viewer:
    "A viewer whose samples are 100, 200, ... HU, its estimate 50 and its truth 20 HU."
    samples = [volume(100.0 * k) for k in range(1, count + 1)]
    volumes = {"truth": volume(20), "generated": volume(50), "samples": samples}
    return view(volumes, pixels=100)


@pytest.mark.parametrize("chosen, hu", [(0, 50), (1, 100), (2, 200), (3, 300), (1, 100)])
def test_the_slider_shows_the_sample_that_it_names(chosen, hu):
    viewer = several()
    viewer.sample.value = chosen
    assert viewer.sample.label == ("estimate" if chosen == 0 else f"sample {chosen} of 3")
    cells = re.findall(r"<td>(?:<b>)?([^<]*)", viewer.read())
    head, row = cells[: 3 + len(viewer.layers)], cells[3 + len(viewer.layers) : 2 * (3 + len(viewer.layers))]
    said = dict(zip(head[3:], row[3:]))
    assert {k: said[k] for k in ("truth", "generated", "difference")} == {
        "truth": "20 HU",
        "generated": f"{hu} HU",
        "difference": f"+{hu - 20} HU",
    }
    viewer.show.value, viewer.cross.value = "generated", False
    viewer.levels.value = (0, 400)
    level = pixels(viewer.images["axial"].value)[50, 50]
    assert level == pytest.approx([hu / 400 * 255] * 3, abs=3)


def test_samples_are_numbered_from_one_in_their_order():
    many = torch.stack([torch.full((1, 2, 2, 2), k / 4) for k in range(3)])
    made = name_samples(many, (0.0, 400.0))
    assert {n: float(v.mean()) for n, v in made.items()} == {"sample_1": 0, "sample_2": 100, "sample_3": 200}
    layers, drawn = layers_of(read_volumes(made)[0], (-1000, 1000))
    assert [float(v.mean()) for v in drawn] == [0, 100, 200]
    assert {v.name: float(v[:].mean()) for v in layers} == {"generated": 100, "spread": 100}


@pytest.mark.parametrize("name", WINDOWS)
def test_each_preset_lights_up_and_draws_its_window(name):
    viewer = several()
    viewer.preset.value = name
    low, high = WINDOWS[name]
    assert (viewer.preset.value, viewer.levels.value) == (name, (low, high))
    assert viewer.layers["truth"].limits == (low, high)
    viewer.levels.value = (low - 1e-7, high + 1e-7)  # what a browser makes of the ends
    assert viewer.preset.value == name
    viewer.levels.value = (low - 5, high)
    assert viewer.preset.value is None
    assert view(volume(), window=name, pixels=100).preset.value == name  # at the start as well


def test_compared_with_each_layer_and_with_nothing():
    viewer = several()
    viewer.levels.value, viewer.cross.value = (0, 100), False
    assert (viewer.other.value, viewer.other.label, viewer.other.index) == ("", "nothing", 0)
    for name in viewer.layers:
        viewer.other.value = name
        assert [i.layout.display for i in viewer.images2.values()] == [None] * 3
        expected = draw_slice(viewer.layers[name], "coronal", viewer.at, 100, cross=False)
        assert viewer.images2["coronal"].value == expected
        assert viewer.images["coronal"].value == draw_slice(viewer.layers["truth"], "coronal", viewer.at, 100, False)
        assert ">truth<" in viewer.bar.value and f">{viewer.layers[name].label}<" in viewer.bar.value
    viewer.other.value = ""
    assert viewer.other.label == "nothing" and viewer.images2["axial"].layout.display == "none"
    assert viewer.bar.value.count("white-space") == 1


def mouse(viewer, **what):
    viewer.mouse.value = json.dumps(dict(id=1, over=None) | POINTER_AT_REST | what)


@pytest.mark.parametrize("axis", range(3))
def test_the_wheel_and_the_keys_walk_along_their_own_axis(axis):
    viewer = several()
    by = [0, 0, 0]
    by[axis] = 2
    mouse(viewer, by=by)
    assert viewer.at == tuple(4 + b for b in by)
    by[axis] = -1  # totals: three back from there
    mouse(viewer, by=by)
    assert viewer.at == tuple(4 + b for b in by)


def test_a_drag_to_the_right_widens_and_up_lowers_the_window_of_the_picture_it_is_in():
    viewer = several()
    viewer.levels.value = (0, 400)
    mouse(viewer, drag=[0.1, 0, 0])
    low, high = viewer.levels.value
    assert (high - low, (low + high) / 2) == pytest.approx((400 * np.exp(0.2), 200))
    mouse(viewer, drag=[0.1, 0.1, 0])
    assert sum(viewer.levels.value) / 2 < 200  # a lower level is a brighter picture
    viewer.other.value = "difference"
    before = viewer.layers["difference"].limits, viewer.levels.value
    mouse(viewer, drag=[0.2, 0.1, 1])  # in the second row: of the difference, not of the truth
    assert viewer.layers["difference"].limits == pytest.approx(np.multiply(before[0], np.exp(0.2)))
    assert viewer.levels.value == before[1]


def test_the_readout_of_the_mouse_is_of_the_voxel_under_it():
    hu = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    viewer = view(hu, pixels=PIXELS, mm=2.0)
    for axis, plane in enumerate(SIDES):
        point = (6, 2, 13)
        top, left, height, width = slice_box(SHAPE, axis, PIXELS)
        rows, columns = AXES[plane]
        x = (left + (point[columns] + 0.5) * width / SHAPE[columns]) / PIXELS
        y = (top + (point[rows] + 0.5) * height / SHAPE[rows]) / PIXELS
        mouse(viewer, over=[plane, x, y])
        expected = tuple(viewer.at[axis] if k == axis else point[k] for k in range(3))
        assert viewer.over == expected
        row = viewer.readout.value.split("<tr>")[3]
        assert f"voxel {expected}" in row and f"{hu[expected]:.0f} HU" in row
        assert patient_position(expected, SHAPE, 2.0) in row


def test_the_place_of_a_voxel_in_the_patient():
    assert patient_position((0, 0, 0), (5, 5, 5), 10.0) == "R 20.0 mm, A 20.0 mm, H 20.0 mm"
    assert patient_position((3, 4, 4), (5, 5, 5), 10.0) == "L 20.0 mm, P 20.0 mm, F 10.0 mm"


def test_values_in_words():
    beams = [value_at(layer("coverage", volume(k)), (0, 0, 0)) for k in range(3)]
    assert beams == ["no beam: prior only", "one beam", "both beams"]
    assert value_at(layer("path_density", volume(1.25)), (0, 0, 0)) == "1.2 rays"
    difference = layer("difference", volume(120), less=volume(20))
    assert value_at(difference, (0, 0, 0)) == "+100 HU"
    assert value_at(layer("difference", volume(-30)), (0, 0, 0)) == "-30 HU"
    assert value_at(layer("truth", volume(-30)), (0, 0, 0)) == "-30 HU"


def test_colours_and_the_caution_follow_the_layer_whatever_its_name():
    below, zero, above = (
        pixels(draw_slice(layer("a", Layer(volume(v), "difference", limits=(-100, 100))), "axial", (4, 4, 4), 100))
        for v in (-80, 0, 80)
    )
    at = 30, 30
    assert below[at][2] > below[at][0] and above[at][0] > above[at][2] and zero[at].max() < 60
    grey = pixels(draw_slice(layer("difference of opinion", volume(80)), "axial", (4, 4, 4), 100))[at]
    assert len(set(grey)) == 1  # HU, for nothing else was stated
    for generated in (False, True):
        bar = scale_bar(layer("anything", Layer(volume(), generated=generated), (-160, 240)))
        assert (GENERATED in bar) == generated
        assert bar.index("-160") < bar.index("linear-gradient") < bar.index("240 HU")
    viewer = view({"truth": volume(), "mine": Layer(volume(), generated=True)}, pixels=100)
    small = {}
    for shown in viewer.layers:
        viewer.show.value = shown
        strip = np.asarray(Image.open(io.BytesIO(viewer.snapshot())).convert("RGB")).astype(int)[-14:]
        small[shown] = np.flatnonzero((strip[..., 0] - strip[..., 2] > 60).any(0)).max()  # amber letters end there
    assert small["mine"] > 1.5 * small["truth"] > 0
    assert set(COLOUR_MAPS) == {v.kind for v in VOLUME_KINDS.values()}


def test_the_caption_of_sharp_denies_that_it_is_a_measure_of_uncertainty():
    volumes = {"truth": volume(), "generated": Layer(volume(), generated=True), "samples": [volume(1), volume(2)]}
    viewer = view(volumes, pixels=100, labels={"generated": method_label("sharp")})
    noted = {}
    for shown, sample in (("truth", 0), ("generated", 0), ("generated", 1)):
        viewer.show.value, viewer.sample.value = shown, sample
        noted[shown, sample] = SHARP_NOTE in viewer.caution.value
    assert noted == {("truth", 0): False, ("generated", 0): True, ("generated", 1): False}
    assert "generated" in SHARP_NOTE and "uncertainty" in SHARP_NOTE and method_note("sample") == ""


def report(**how):
    truth = np.random.default_rng(0).normal(0, 300, (8, 8, 8)).astype(np.float32)
    views = np.full((2, 8, 8), 100.0)
    return report_figure(truth, {"g": truth + 100}, views, reprojected=views + 30, **how), truth


def test_a_difference_is_generated_less_truth_and_red_where_too_dense():
    fig, truth = report()
    drawn = images(fig)
    for plane in SIDES:
        image = drawn[f"g - truth, {plane}"]
        assert np.abs(image.get_array() - 100).max() < 1e-3
        assert image.get_cmap().name == "berlin" and image.norm.vmin == -image.norm.vmax < 0
        red, _, blue, _ = image.cmap(image.norm(image.get_array()))[0, 0]
        assert red > blue
        assert drawn[f"truth, {plane}"].get_cmap().name == "gray"
    for side in ("AP", "LAT"):
        title = next(t for t in drawn if t.startswith(f"{side} difference"))
        assert title == f"{side} difference, rms 30 mm" and (drawn[title].get_array() == 30).all()
        assert (drawn[f"g, re-projected, {side}"].get_array() == 130).all()
    assert (drawn["truth, coronal"].get_array() == truth[:, 4]).all()


def test_the_letters_of_the_report_stand_at_their_sides():
    fig, _ = report(half_width=volume(50))
    wanted = {**{f"truth, {p}": s for p, s in SIDES.items()}, "input, AP": "RLHF", "input, LAT": "APHF"}
    wanted |= {f"half of the 95 % interval, {p}": s for p, s in SIDES.items()}
    for axes in fig.axes:
        if axes.get_title(loc="left") in wanted:
            places = {t.get_text(): t.get_position() for t in axes.texts}
            left, right, top, bottom = (places[s] for s in wanted.pop(axes.get_title(loc="left")))
            assert left[0] < 0.1 and right[0] > 0.9 and top[1] > 0.9 and bottom[1] < 0.1
    assert not wanted


def test_a_table_has_each_figure_under_its_own_volume():
    fig, _ = report(metrics={"g": {"psnr": 21.0, "mae_hu": 5.0}, "h": {"psnr": 33.0, "protocol": "unit"}})
    axes = next(a for a in fig.axes if any("protocol" in t.get_text() for t in a.texts))
    at = {t.get_text(): t.get_position() for t in axes.texts}
    for name, figure, row in (("g", "21", "psnr"), ("h", "33", "psnr"), ("g", "5", "mae hu")):
        assert at[figure][0] == at[name][0] and at[figure][1] == at[row][1]
    assert "metrics, protocol: unit" in at


def test_what_lies_in_no_beam_is_marked_off_in_generated_volumes_only():
    coverage = volume(2)
    coverage[:, :, :2] = 0
    fig, truth = report(coverage=coverage)
    marked = {a.get_title(loc="left") for a in fig.axes if len(a.collections)}
    assert {"g, axial", "g, coronal", "g - truth, axial"} <= marked
    assert not any(t.startswith(("truth", "input")) for t in marked)
    assert any("in no beam: 25.0 %" in w for w in words(fig))
    named = report_figure(None, {"truth": truth}, np.ones((2, 8, 8)), coverage=coverage)  # a title decides nothing
    assert any(len(a.collections) for a in named.axes if a.get_title(loc="left") == "truth, axial")
    assert any(CAUTION.capitalize() in w and GENERATED in w.lower() for w in words(named))


def test_files_of_a_case_have_the_right_sign_and_state_what_is_generated(tmp_path, monkeypatch):
    seen = {}

    def look(volumes, window, views, path, mm):
        seen.update(volumes=volumes, window=window)

    monkeypatch.setattr("diffx2ct.report.show_mpr", look)
    truth = volume(10)
    sample = {"sample_1": truth + 40, "spread_95": volume(7), "coverage": volume(2)}
    trust = dict(report="NOT ASSESSED", calibration="calibrated on 9 held-out cases")
    save_report(
        tmp_path,
        {"truth": truth, "generated": truth + 100} | sample,
        np.ones((2, 8, 8)),
        2.0,
        trust=trust,
        window=(-160, 240),
    )
    facts = {n: (v.kind, v.generated, float(v.values.mean())) for n, v in seen["volumes"].items()}
    assert facts == {
        "truth": ("hu", False, 10),
        "generated": ("hu", True, 110),
        "difference": ("difference", True, 100),
    }
    assert seen["window"] == (-160, 240)
    read = lambda n: sitk.ReadImage(str(tmp_path / f"{n}.nii.gz"))
    assert (sitk.GetArrayFromImage(read("difference")) == 100).all()
    notes = {n: read(n).GetMetaData("descrip").strip() for n in ("truth", "generated", "sample_1", "spread_95")}
    assert notes == {
        "truth": CAUTION,
        "generated": f"{GENERATED}; {CAUTION}",
        "sample_1": f"{GENERATED}; {CAUTION}",
        "spread_95": "calibrated on 9 held-out cases; half of the 95 % interval about the mean",
    }
    (tmp_path / "generated.nii.gz").rename(tmp_path / "renamed.nii.gz")  # the fact is in the file
    assert view(tmp_path / "renamed.nii.gz", pixels=100).layers["renamed"].generated
    viewer = view(tmp_path, pixels=100)
    kinds = {n: (v.kind, v.generated) for n, v in viewer.layers.items()}
    assert kinds["coverage"] == ("coverage", False) and kinds["spread_95"] == ("deviation", True)
    assert kinds["renamed"] == ("hu", True) and kinds["truth"] == ("hu", False)


def test_the_views_of_a_case_are_those_of_the_volume_that_is_shown(monkeypatch):
    compared = lambda x, truth, *how: dict(error=float((x - truth).mean()), how=how)
    monkeypatch.setattr("diffx2ct.volumes.compare", compared)
    shown = torch.full((1, 8, 8, 8), 0.5)
    case = Case("p", torch.zeros(1, 8, 8, 8), torch.zeros(2, 8, 8))
    projector = lambda rho: torch.stack([rho[0, 0].sum(1), rho[0, 0].sum(2)])[None]
    volumes, again, figures = case_volumes(case, shown, {}, projector, (-1000.0, 1000.0))
    assert again.eq(8).all()  # through water; the truth is air
    assert figures == dict(error=0.5, how=((-1000.0, 1000.0), "unit"))
    assert {n: float(v.mean()) for n, v in volumes.items()} == {"generated": 0, "truth": -1000}


def test_the_bundle_carries_the_picture_that_is_shown():
    viewer = several()
    still = viewer.snapshot()
    assert base64.b64decode(viewer._repr_mimebundle_()["image/jpeg"]) == still
    assert Image.open(io.BytesIO(still)).size == (150, 50)
    viewer.other.value = "generated"
    assert Image.open(io.BytesIO(viewer.snapshot())).size == (150, 100)
