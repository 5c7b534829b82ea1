"""`diffx2ct_evaluate` from the outside: a tiny checkpoint that `diffx2ct_train` has written, its own cases and
folders of all kinds."""

import json
import re
import shutil

import pytest
from conftest import run_cmd

from diffx2ct.basics import load_tensor, save_tensor
from diffx2ct.evaluate import main

TINY = [
    "DATA.TARGET_VOLUME_SIZE=16",
    "DATA.TARGET_DRR_SIZE=16",
    "DATA.PHANTOMS=6",
    "TRAINING.PATCH_SIZE=16",
    "MODEL.UNET.NUM_CHANNELS=[16, 24]",
    "MODEL.UNET.ATTENTION_LEVELS=[false, true]",
    "MODEL.UNET.CROSS_ATTENTION_LEVELS=[false, true]",
    "MODEL.CONDITIONING_ENCODER.NUM_CHANNELS=16",
    "TRAINING.COARSE_EPOCHS=[]",
    "EPOCHS=3",
    "VALIDATION_SPLIT=0.34",
    "TRAINING.LOSS_PHASE_EPOCHS=[2, 1]",
    "TRAINING.AMP=bf16",
    "MODEL.EMA_DECAY=0.8",
]
METHODS = ["mean", "consistent_mean", "expected", "sharp", "sample", "mean_of_k"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A working folder with a space in its name, a checkpoint in it and the data it was trained on."
    folder = tmp_path_factory.mktemp("a place")
    made = run_cmd(
        ["diffx2ct_train", "--no_search", "--study_name", "tiny", *(x for s in TINY for x in ("--set", s))], cwd=folder
    )
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def data(place):
    "The folder of all six cases."
    return next((place / "data").iterdir())


def evaluate(place, *args, code=0):
    "Run the command in the working folder; return its stdout and stderr."
    got = run_cmd(["diffx2ct_evaluate", "--checkpoint_dir", "checkpoints/tiny/single", *args], cwd=place)
    assert got.returncode == code and "Traceback" not in got.stderr, (got.returncode, got.stdout, got.stderr)
    if code == 2:
        assert got.stderr.startswith("diffx2ct: ") and got.stderr.count("\n") == 1 and not got.stdout, got.stderr
    return got


def refused(place, capfd, monkeypatch, *args):
    "The one sentence of a refused run, in this process because it is quicker."
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as e:
        main(["--checkpoint_dir", "checkpoints/tiny/single", *map(str, args)])
    out, said = capfd.readouterr()
    assert e.value.code == 2 and said.startswith("diffx2ct: ") and said.count("\n") == 1 and not out, said
    return said


def figures(path):
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def timeless(result):
    return {
        n: {m: {k: v for k, v in s.items() if k != "seconds"} for m, s in c["scores"].items()}
        for n, c in result["cases"].items()
    }


def changed(place, data, name, **keys):
    "A copy of the data whose manifest states something else; a key that is None removes the manifest."
    copy = place / name
    shutil.copytree(data, copy)
    path = copy / "drrs" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.unlink() if None in keys.values() else path.write_text(json.dumps(manifest | keys))
    return copy


@pytest.mark.slow
def test_own_cases_by_all_methods(place):
    got = evaluate(place, "--json", "out/a.json", "--plot", "out/a.png", "--protocol", "psct")
    assert got.stderr == ""
    result = figures(place / "out/a.json")
    s = result["settings"]
    assert (
        s["methods"],
        s["protocol"],
        s["seed"],
        s["k"],
        s["steps"],
        s["mm"],
        s["geometry"]["kind"],
        s["checkpoint"],
        s["trained_on"],
    ) == (METHODS, "psct", 0, 4, 8, 20, "parallel", "single", [])
    assert str(place) not in json.dumps(result)
    lines = got.stdout.splitlines()
    assert (
        lines[0].startswith("protocol psct")
        and "seed 0" in lines[0]
        and "2 cases" in lines[1]
        and "validation" in lines[1]
    )
    for name, case in result["cases"].items():  # what is printed is what is in the file
        assert next(line for line in lines if line.startswith(name)).split()[1:] == [
            f"{case['scores'][m]['psnr']:.2f}" for m in METHODS
        ]
        assert case["consistency"] == "on" and case["contradiction"] < 0.001
    whole = [line for line in lines if line.startswith("PSNR, volume")][1]
    assert [float(v) for v in re.findall(r"(\d+\.\d+) \[", whole)] == [
        round(result["means"][m]["psnr"][0], 2) for m in METHODS
    ]
    for m in METHODS:
        assert result["means"][m]["psnr"][0] == pytest.approx(
            sum(c["scores"][m]["psnr"] for c in result["cases"].values()) / 2
        )
    left = {m: result["means"][m]["residual"][0] for m in METHODS}
    assert left["mean"] > 0.05 and max(left[m] for m in METHODS[1:]) < 0.01
    assert result["means"]["consistent_mean"]["psnr"][0] > result["means"]["mean"]["psnr"][0]
    assert (place / "out/a.png").read_bytes().startswith(b"\x89PNG") and sorted(
        p.name for p in (place / "out").iterdir()
    ) == ["a.json", "a.png"]


@pytest.mark.slow
def test_a_folder_with_cases_it_was_trained_on_the_same_twice(place, data):
    args = ["--data", data, "--methods", "mean", "sample", "--steps", "2", "--seed", "5"]
    first, again = (evaluate(place, *args, "--json", f"{n}.json") for n in ("b1", "b2"))
    a, b = figures(place / "b1.json"), figures(place / "b2.json")
    assert (
        len(a["cases"]) == 6
        and len(a["settings"]["trained_on"]) == 4
        and a["settings"]["steps"] == 2
        and timeless(a) == timeless(b)
    )
    assert (
        first.stderr.startswith("diffx2ct: 4 of 6 cases are of patients this checkpoint was trained on")
        and first.stderr.count("\n") == 1
    )
    name = list(a["cases"])[2]
    evaluate(place, *args[:-1], "6", "--cases", name, "--json", "b3.json")
    other = timeless(figures(place / "b3.json"))
    assert (
        list(other) == [name]
        and other[name]["mean"] == timeless(a)[name]["mean"]
        and other[name]["sample"] != timeless(a)[name]["sample"]
    )


@pytest.mark.slow
def test_views_of_two_patients_are_met_half_way(place, data):
    swapped = place / "swapped"
    shutil.copytree(data, swapped)
    one, two = sorted(p for p in (swapped / "drrs").iterdir() if p.is_dir())[:2]
    shutil.copy(two / "LAT.pt", one / "LAT.pt")
    got = evaluate(place, "--data", swapped, "--methods", "expected", "--cases", one.name, two.name, "--json", "c.json")
    warned = [line for line in got.stderr.splitlines() if "litres" in line]
    assert (
        len(warned) == 1
        and one.name in warned[0]
        and "AP view adds up to" in warned[0]
        and "limit 2%" in warned[0]
        and "soft" in warned[0]
    )
    assert [c["consistency"] for c in figures(place / "c.json")["cases"].values()] == ["soft", "on"]


@pytest.mark.slow
def test_data_that_is_not_the_models(place, data, capfd, monkeypatch):
    cone = dict(kind="cone", sad_mm=541, sdd_mm=949, panel_mm=500)
    for name, keys, words in (
        ("cone", dict(geometry=cone), ("geometry cone 541 949 500", "geometry parallel 0 0 320")),
        ("mm", dict(mm=10), ("mm 10", "mm 20")),
        ("size", dict(size=24), ("size 24", "size 16")),
        ("window", dict(hu_window=[-1000, 1500]), ("HU window -1000 1500", "HU window -1024 1500")),
        ("display", dict(view_domain="display"), ("display images", "line integrals")),
        ("bare", dict(mm=None), ("does not exist", "line integrals")),
    ):
        said = refused(
            place, capfd, monkeypatch, "--data", changed(place, data, name, **keys), "--json", f"{name}.json"
        )
        assert all(w in said for w in (*words, "manifest.json", "checkpoint single")), said
        assert not (place / f"{name}.json").exists()
    assert "geometry cone" in evaluate(place, "--data", "cone", code=2).stderr  # once as a separate process


@pytest.mark.slow
def test_what_it_refuses(place, data, capfd, monkeypatch):
    (place / "empty/volumes").mkdir(parents=True)
    (place / "empty/drrs").mkdir()
    for args, words in (
        (["--data", "empty"], "empty/volumes holds no .pt file"),
        (["--data", "nowhere"], "nowhere/volumes is not a folder"),
        (["--data", data, "--cases", "nobody"], "nobody"),
        (["--methods", "expected", "magic"], "magic"),
        (["--k", "0"], "--k 0"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--plot", "a.gif"], "a.gif"),
        (["--checkpoint_dir", "absent"], "absent does not exist"),
    ):
        assert words in refused(place, capfd, monkeypatch, *args), args
    unknown = run_cmd(["diffx2ct_evaluate", "--checkpoint_dir", "x", "--protocol", "mine"], cwd=place)
    assert unknown.returncode == 2 and "unit" in unknown.stderr and "Traceback" not in unknown.stderr


def test_help_teaches(tmp_path):
    said = run_cmd(["diffx2ct_evaluate", "--help"], cwd=tmp_path).stdout
    assert all(word in said for word in ("examples:", "consistent_mean", "x2ct", "4.29 dB", "--consistency"))


@pytest.mark.slow
def test_display_images_cannot_be_forced(place, data, capfd, monkeypatch):
    shown = changed(place, data, "shown", view_domain="display")
    sets = [*TINY, "EPOCHS=1", f"DATA.PT_DATA_DIR={shown / 'volumes'}", f"DATA.DRR_DIR={shown / 'drrs'}"]
    made = run_cmd(
        ["diffx2ct_train", "--no_search", "--study_name", "shown", *(x for s in sets for x in ("--set", s))], cwd=place
    )
    assert made.returncode == 0 and "only GAMMA is used" in made.stdout, made.stderr
    said = refused(place, capfd, monkeypatch, "--checkpoint_dir", "checkpoints/shown/single", "--consistency", "on")
    assert all(word in said for word in ("--consistency on", "line integrals", "display images"))


@pytest.mark.slow
def test_views_in_another_unit_are_not_forced(place, data):
    wrong = place / "metres"
    shutil.copytree(data, wrong)
    name = sorted(p.name for p in (wrong / "drrs").iterdir() if p.is_dir())[0]
    for view in ("AP", "LAT"):
        save_tensor(
            load_tensor(wrong / "drrs" / name / f"{view}.pt", dims=2) / 1e5, wrong / "drrs" / name / f"{view}.pt"
        )
    got = evaluate(place, "--data", wrong, "--methods", "expected", "--cases", name, "--json", "m.json")
    assert "not in mm of water" in got.stderr and name in got.stderr
    assert figures(place / "m.json")["cases"][name]["consistency"] == "soft"
