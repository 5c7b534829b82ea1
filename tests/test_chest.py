"The geometry of chest films from a scan to a volume: prepared, trained and read again, its sides kept on the way."

import json
import random
import shutil
from dataclasses import asdict

import pytest
import SimpleITK as sitk
import torch
from conftest import run_cmd
from safetensors import safe_open

from diffx2ct.basics import UserError
from diffx2ct.batches import phantom_config
from diffx2ct.cases import make_phantoms, open_data
from diffx2ct.checkpoint import FORMAT, load_model, save_model
from diffx2ct.config import explain, load_config
from diffx2ct.data import density, read_manifest
from diffx2ct.drr import CHEST_CUBE_MM, Geometry, Projector, SidedGeometry, geometry
from diffx2ct.evaluate import open_cases
from diffx2ct.phantom import phantom
from diffx2ct.reconstruct import reconstruct
from diffx2ct.scans import as_image
from diffx2ct.study import compared_settings
from diffx2ct.two_images import check_same_geometry

N, CUBE = 16, CHEST_CUBE_MM
CHEST = SidedGeometry("cone", 1608.0, 1800.0, 430.0, "pa", "left")
FOUR = dict(kind="cone", sad_mm=541, sdd_mm=949, panel_mm=500)  # what manifests and checkpoints held before
TINY = [
    f"DATA.TARGET_VOLUME_SIZE={N}",
    f"DATA.TARGET_DRR_SIZE={N}",
    "DATA.PHANTOMS=4",
    f"TRAINING.PATCH_SIZE={N}",
    "MODEL.UNET.NUM_CHANNELS=[8, 16]",
    "MODEL.UNET.ATTENTION_LEVELS=[false, true]",
    "MODEL.UNET.CROSS_ATTENTION_LEVELS=[false, true]",
    "MODEL.CONDITIONING_ENCODER.NUM_CHANNELS=8",
    "TRAINING.COARSE_EPOCHS=[]",
    "TRAINING.LOSS_PHASE_EPOCHS=[1, 0]",
    "TRAINING.PHANTOM_EPOCHS=1",
    "VALIDATION_SPLIT=0.34",
    "EPOCHS=1",
]
MINE = ["DATA.PT_DATA_DIR=mine/volumes", "DATA.DRR_DIR=mine/drrs"]
PHANTOMS = ["TRAINING.PHANTOM_EPOCHS=0"]


def go(cwd, *args, code=0):
    "Run a command that must end with `code`; its output, or its one sentence."
    p = run_cmd(args, cwd=cwd)
    assert p.returncode == code and "Traceback" not in p.stderr, (p.returncode, p.stdout, p.stderr)
    if code == 2:
        assert p.stderr.startswith("diffx2ct: ") and p.stderr.count("\n") == 1, p.stderr
    return p.stderr if code else p.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Three scans prepared with --geometry chest, and a model trained on them, on phantoms first."
    here = tmp_path_factory.mktemp("chest")
    (here / "scans").mkdir()
    for seed in range(3):
        sitk.WriteImage(as_image(phantom(seed, 32, 10.0)[0], 10.0), str(here / f"scans/p{seed}.nii.gz"))
    said = go(here, "diffx2ct_prepare", "scans", "--out", "mine", "--size", N, "--geometry", "chest")
    assert "voxels of 24 mm" in said and "chest geometry" in said
    sets = (x for s in [*TINY, *MINE, "DATA.GEOMETRY=chest"] for x in ("--set", s))
    go(here, "diffx2ct_train", "--no_search", "--study_name", "chest", *sets)
    return here


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def model(inside):
    return load_model("checkpoints/chest/single")


def with_geometry(source, target, g):
    "A copy of a folder of cases whose manifest has another geometry."
    shutil.copytree(source, target)
    path = target / "drrs/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"geometry": g}))
    return target


@pytest.mark.slow
def test_prepare_keeps_the_sides(inside):
    m = read_manifest("mine/drrs")
    assert m["mm"] == CUBE / N and m["geometry"] == asdict(CHEST) and len(m["geometry"]) == 6
    volume = torch.load("mine/volumes/p0.pt", weights_only=True).float()[None, None]
    views = torch.cat([torch.load(f"mine/drrs/p0/{v}.pt", weights_only=True).float() for v in ("AP", "LAT")])
    of = lambda g: Projector(g, N, CUBE / N, N)(density(volume, tuple(m["hu_window"]))).flatten()
    torch.testing.assert_close(views.flatten(), of(CHEST), rtol=2e-3, atol=0.5)
    other = of(Geometry("cone", 1608.0, 1800.0, 430.0))  # the source in front: not the same frontal view
    assert (of(CHEST) - other)[: N * N].abs().max() > 5 and torch.equal(of(CHEST)[N * N :], other[N * N :])


@pytest.mark.slow
def test_prepare_goes_on_with_the_folders_settings(inside):
    before = read_manifest("mine/drrs")
    for more in ([], ["--geometry", "chest"]):
        assert "0 cases written, 3 kept" in go(inside, "diffx2ct_prepare", "scans", "--out", "mine", *more)
        assert read_manifest("mine/drrs") == before
    said = go(inside, "diffx2ct_prepare", "scans", "--out", "mine", "--geometry", "parallel", code=2)
    assert "prepared with geometry cone 1608 1800 430 pa left, not parallel" in said


@pytest.mark.slow
def test_prepare_with_another_cube(inside):
    one = ["scans/p0.nii.gz", "--size", N, "--geometry", "chest"]
    go(inside, "diffx2ct_prepare", *one, "--mm", 20, "--out", "small")
    small = read_manifest("small/drrs")
    assert (small["mm"], small["geometry"]["sad_mm"]) == (20.0, 1630.0)  # 170 mm before the detector
    said = go(inside, "diffx2ct_prepare", *one, "--mm", 120, "--out", "huge", code=2)
    assert "--geometry chest has no room for a cube of 1920 mm (16 voxels of 120 mm)" in said and "--mm" in said
    assert not (inside / "huge/drrs").exists()
    said = " ".join(go(inside, "diffx2ct_prepare", "--help").split())
    assert "384/N for --geometry chest" in said and "in a cube of 384 mm unless --mm gives another size" in said


@pytest.mark.slow
def test_a_checkpoint_keeps_the_sides(model):
    assert model.denoiser.A.geometry == CHEST and model.meta["geometry"] == asdict(CHEST)
    assert load_model(save_model("again.safetensors", model.denoiser, model.meta)).denoiser.A.geometry == CHEST
    views = torch.stack([torch.load(f"mine/drrs/p0/{v}.pt", weights_only=True).float() for v in ("AP", "LAT")])
    views = views.reshape(2, N, N)
    x = reconstruct(model, views)
    assert x.shape == (1, N, N, N) and torch.isfinite(x).all()
    A = model.denoiser.A
    miss = lambda g: (
        (Projector(g, N, A.mm, N)(density(x[None], model.denoiser.window))[0] - views).norm() / views.norm()
    ).item()
    assert miss(CHEST) < 0.05 and miss(Geometry("cone", 1608.0, 1800.0, 430.0)) > 1.2 * miss(CHEST)


@pytest.mark.slow
def test_the_phantoms_before_it_have_the_same_geometry(inside):
    name = "phantoms_16_16_cone-1608-1800-430-pa-left_384mm_-1024_1500"
    assert (inside / "data" / name / "drrs/manifest.json").is_file()  # the training has made it
    c = load_config(sets=[*TINY, *MINE])
    p = phantom_config(c, open_data(c))
    assert geometry(p.DATA.GEOMETRY, p.DATA.CUBE_MM) == CHEST
    assert open_data(p).geometry == CHEST and make_phantoms(p).name == name
    right = load_config(sets=[*TINY, *PHANTOMS, "DATA.GEOMETRY={LATERAL: right}"])
    assert make_phantoms(right).name.startswith("phantoms_16_16_cone-541-949-500-right_")
    assert open_data(right).geometry == SidedGeometry("cone", 541.0, 949.0, 500.0, "ap", "right")
    four = load_config(sets=[*TINY, *PHANTOMS, "DATA.GEOMETRY={KIND: cone}"])  # the name it had before
    assert make_phantoms(four).name == "phantoms_16_16_cone-541-949-500_320mm_-1024_1500"


@pytest.mark.slow
def test_phantoms_by_the_name_of_the_preset(inside):
    c = load_config(sets=[*TINY, *PHANTOMS, "DATA.GEOMETRY=chest", "DATA.CUBE_MM=384"])
    data = open_data(c)
    assert (data.geometry, data.mm) == (CHEST, CUBE / N)
    (folder,) = (inside / "data").glob("*_chest_384mm_*")
    assert read_manifest(folder / "drrs")["geometry"] == asdict(CHEST)


@pytest.mark.slow
def test_old_manifests_and_checkpoints_have_four_numbers(inside, model):
    old = geometry(FOUR, CUBE)
    assert type(old) is Geometry and asdict(old) == FOUR
    folder = with_geometry(inside / "mine", inside / "old", FOUR)
    data = open_data(load_config(sets=[*TINY, "DATA.PT_DATA_DIR=old/volumes", "DATA.DRR_DIR=old/drrs"]))
    assert data.geometry == old and asdict(data.geometry) == FOUR
    go(inside, "diffx2ct_prepare", "scans", "--out", "old")
    assert read_manifest(folder / "drrs")["geometry"] == FOUR
    path = save_model("old.safetensors", model.denoiser, model.meta | {"geometry": FOUR, "format": FORMAT})
    with safe_open(path, "pt") as f:
        assert json.loads(f.metadata()["diffx2ct"])["geometry"] == FOUR
    assert load_model(path).denoiser.A.geometry == old
    c = load_config(sets=[*TINY, *MINE])
    kind = "geometry of DATA.DRR_DIR"
    assert compared_settings(c, data)[kind] == "cone 541 949 500, voxels of 24 mm"  # as studies have stored it
    assert compared_settings(c, open_data(c))[kind] == "cone 1608 1800 430 pa left, voxels of 24 mm"


@pytest.mark.slow
@pytest.mark.parametrize("change", [dict(frontal="ap"), dict(lateral="right"), dict(frontal=None)])
def test_other_sides_are_another_geometry(inside, model, tmp_path, change):
    other = with_geometry(inside / "mine", tmp_path / "other", asdict(CHEST) | change)
    with pytest.raises(UserError, match="has source sides .*, but .* was trained with source sides pa left"):
        open_cases(model, other)
    with pytest.raises(UserError, match="SDD 1800 mm.* was trained with .*SDD 1800 mm, frontal pa; prepare"):
        check_same_geometry(other / "drrs/p0/AP.pt", model)
    open_cases(model, inside / "mine")
    check_same_geometry(inside / "mine/drrs/p0/AP.pt", model)
    same = with_geometry(inside / "mine", tmp_path / "same", asdict(CHEST) | dict(lateral=None))
    open_cases(model, same)  # null is the usual side
    check_same_geometry(same / "drrs/p0/AP.pt", model)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [dict(frontal="back"), dict(lateral=1), dict(sides="pa")])
def test_sides_that_do_not_exist(inside, model, tmp_path, wrong):
    other = with_geometry(inside / "mine", tmp_path / "other", asdict(CHEST) | wrong)
    with pytest.raises(UserError, match="manifest.json is not a manifest of this program"):
        read_manifest(other / "drrs")
    path = save_model(tmp_path / "m.safetensors", model.denoiser, model.meta | {"geometry": asdict(CHEST) | wrong})
    with pytest.raises(UserError, match=f"m.safetensors.*{next(iter(wrong))}"):
        load_model(path)


@pytest.mark.slow
def test_a_checkpoint_whose_cube_holds_the_detector(model, tmp_path):
    near = asdict(CHEST) | dict(sdd_mm=1700.0)
    path = save_model(tmp_path / "near.safetensors", model.denoiser, model.meta | {"geometry": near})
    with pytest.raises(UserError, match="near.safetensors: SAD_MM 1608 and SDD_MM 1700 .* inside the 384 mm cube"):
        load_model(path)


def test_settings(tmp_path):
    for value, frontal, lateral in (
        ("chest", "pa", "left"),
        ("{FRONTAL: pa}", "pa", "left"),
        ("{LATERAL: right}", "ap", "right"),
    ):
        g = geometry(load_config(sets=[f"DATA.GEOMETRY={value}"]).DATA.GEOMETRY, 320)
        assert (g.frontal, g.lateral) == (frontal, lateral)
    assert type(geometry(load_config(sets=["DATA.GEOMETRY={}"]).DATA.GEOMETRY, 320)) is Geometry
    for value, words in {
        "chests": "DATA.GEOMETRY is 'chests'; input should be 'parallel', 'x2ct', 'x2ct_scaled' or 'chest'",
        "{FRONTAL: front}": "DATA.GEOMETRY.FRONTAL is 'front'; input should be 'pa' or 'ap'",
        "{LATERAL: up}": "DATA.GEOMETRY.LATERAL is 'up'; input should be 'left' or 'right'",
        "{SAD_MM: -1}": "DATA.GEOMETRY.SAD_MM is -1; input should be greater than 0",
        "{FRONT: pa}": "DATA.GEOMETRY.FRONT is not a known key; did you mean DATA.GEOMETRY.FRONTAL?",
    }.items():
        with pytest.raises(UserError) as e:
            load_config(sets=[f"DATA.GEOMETRY={value}"])
        assert str(e.value) == f"--set: {words}"
    said = explain("DATA.GEOMETRY.FRONTAL", load_config(sets=["DATA.GEOMETRY={FRONTAL: pa}"]))
    assert "may be   pa | ap or null" in said and "now      pa" in said


def test_a_cube_that_touches_the_detector_may_be_read_again():
    "The edge is computed from voxels, so it may differ in its last digit from the one the geometry was made for."
    rng = random.Random(0)
    for _ in range(5000):
        size, cube = 8 * rng.randint(1, 64), round(rng.uniform(345, 700), rng.randint(1, 3))
        geometry(asdict(geometry("chest", cube)), size * (cube / size))
    with pytest.raises(UserError, match="inside the 385 mm cube"):
        geometry(asdict(CHEST), 385.0)
