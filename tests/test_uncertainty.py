"The benchmark of uncertainty, rehearsed at 16^3 with an untrained model."

import json
import sys

import pytest
from conftest import ROOT, run_cmd

RUN = ROOT / "benchmarks" / "uncertainty" / "run.py"
TINY = [
    "DATA.TARGET_VOLUME_SIZE=16",
    "DATA.TARGET_DRR_SIZE=16",
    "DATA.PHANTOMS=6",
    "DATA.VALIDATION_CASES=[phantom0002, phantom0003, phantom0004, phantom0005]",
    "TRAINING.PATCH_SIZE=16",
    "MODEL.UNET.NUM_CHANNELS=[16, 24]",
    "MODEL.UNET.ATTENTION_LEVELS=[false, true]",
    "MODEL.UNET.CROSS_ATTENTION_LEVELS=[false, true]",
    "TRAINING.COARSE_EPOCHS=[]",
    "DIFFUSION.STEPS=1",
    "TRAINING.AMP=off",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from diffx2ct.checkpoint import describe, save_model
    from diffx2ct.config import load_config
    from diffx2ct.data import to_unit
    from diffx2ct.diffusion import build_denoiser
    from diffx2ct.drr import geometry
    from diffx2ct.phantom import phantom

    c = load_config(sets=TINY)
    net = build_denoiser(c, geometry("parallel", 320), 20.0)
    net.mean.copy_(to_unit(phantom(0, 16)[0], net.window)[None, None])
    folder = tmp_path_factory.mktemp("untrained")
    save_model(folder / "best.safetensors", net, describe(net, c, step=0))
    return folder


@pytest.mark.slow
def test_bad_options_are_one_sentence(tmp_path, checkpoint):
    for options, words in (
        (["--k", "1"], "--k 1 must be 2 or more"),
        (["--k", "2", "--mean_of", "3"], "--mean_of 3 takes its samples"),
        (["--checkpoint_dir", tmp_path / "none"], "does not exist"),
    ):
        got = run_cmd(
            [sys.executable, RUN, "--checkpoint_dir", checkpoint, "--out", tmp_path / "out", *options], cwd=tmp_path
        )
        assert got.returncode == 2 and words in got.stderr and got.stderr.count("\n") == 1, got.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/demo.json").write_text("{")
    got = run_cmd([sys.executable, RUN, "--checkpoint_dir", checkpoint, "--out", tmp_path / "out"], cwd=tmp_path)
    assert got.returncode == 2 and "demo.json is damaged" in got.stderr and "Traceback" not in got.stderr


@pytest.mark.slow
def test_a_rehearsal_fills_every_table_and_is_not_repeated(tmp_path, checkpoint):
    args = [
        sys.executable,
        RUN,
        "--checkpoint_dir",
        checkpoint,
        "--out",
        tmp_path / "out",
        "--work",
        tmp_path / "work",
        "--k",
        "2",
        "--mean_of",
        "1",
        "--plants",
        "1",
    ]
    listed = run_cmd([*args, "--list", "--only", "spiculated", "24 mm"], cwd=tmp_path).stdout.splitlines()
    none = run_cmd([*args, "--only", "lung", "7 mm"], cwd=tmp_path)
    assert (
        none.returncode == 2 and "no row's name has 'lung' and '7 mm'" in none.stderr and "Traceback" not in none.stderr
    )
    assert len(listed) == 4 and all(
        line.startswith("missing lesion · lung, spiculated · 24 mm · 0 · phantom") for line in listed
    )
    part = run_cmd([*args, "--figure", "calibration"], cwd=tmp_path)
    assert (
        part.returncode == 0
        and "### Calibration: 4 cases, 2 samples" in part.stdout
        and "### Lesions" not in part.stdout
    ), part.stderr
    before = json.loads((tmp_path / "out/demo.json").read_text())["rows"]
    got = run_cmd(args, cwd=tmp_path)
    assert got.returncode == 0 and "rows are missing" not in got.stdout, got.stderr
    kept, tables = (json.loads((tmp_path / "out" / f).read_text()) for f in ("demo.json", "demo_tables.json"))
    assert {k: kept["rows"][k] for k in before} == before  # and what was there was kept
    for text in ("### Calibration", "### Lesions: lung, solid", "### Perturbed views", "### Organ measures"):
        assert text in got.stdout
    for how in ("before", "after"):
        assert all(0 <= v <= 1 for v in tables["calibration"]["levels"]["body"][how])
    for _diameter, methods in tables["lesions"]["lung, solid"].items():
        assert set(methods) == {
            "consistent_mean",
            "expected",
            "expected (off)",
            "sample",
            "mean_of_k",
            "truth",
        } and all(0 <= f["auc"][0] <= 1 for f in methods.values())
    assert (
        max(tables["lesions"]["lung, solid"][d]["truth"]["auc"][0] for d in ("24", "32")) > 0.7
    )  # what was planted is there, even in voxels of 20 mm, as far as four plants can show
    assert tables["lies"]["views exchanged"]["cases"] == 4 and tables["reader"]["expected"]["cases"] == 4
    assert all(
        (tmp_path / "out" / f).stat().st_size > 1000
        for f in ("demo_lesions.png", "demo_lesion.png", "demo_reliability.png", "demo.md")
    )
    bar = (tmp_path / "out/bar.md").read_text()
    assert (
        bar.count("| demo | parallel |") == 6 and "| the filter | 24 |" in bar and "| - |" not in bar
    )  # both sizes, three observers, every method
    other = run_cmd([*args, "--seed", "1"], cwd=tmp_path)
    assert other.returncode == 2 and "other settings (seed differ)" in other.stderr


@pytest.mark.slow
def test_what_is_fitted_goes_with_every_volume(tmp_path, checkpoint):
    import SimpleITK as sitk

    note = lambda name: sitk.ReadImage(str(tmp_path / name)).GetMetaData("descrip")
    fitted = run_cmd(
        [sys.executable, "-m", "diffx2ct.uncertainty", "--checkpoint_dir", checkpoint, "--k", "3"], cwd=tmp_path
    )
    assert (
        fitted.returncode == 0
        and "fitted on 4 cases, 3 samples each" in fitted.stdout
        and "Traceback" not in fitted.stderr
    ), fitted.stderr
    seen = run_cmd(
        ["diffx2ct_visualize", "--checkpoint_dir", checkpoint, "--samples", "3", "--out", tmp_path / "seen"],
        cwd=tmp_path,
    )
    trust = json.loads((tmp_path / "seen/trust.json").read_text())
    assert (
        seen.returncode == 0
        and trust["calibration"] == "calibrated on 4 held-out cases"
        and trust["report"] in seen.stdout
        and trust["beyond"] == []
    ), seen.stderr  # it is one of those the limits are of
    assert note("seen/spread_95.nii.gz").startswith(
        "calibrated on 4 held-out cases; half of the 95 % interval"
    ) and "prior only" in note("seen/coverage.nii.gz")
    AP = next(tmp_path.rglob("phantom0002/AP.pt"))
    made = run_cmd(
        [
            "diffx2ct_reconstruct",
            AP,
            AP.with_name("LAT.pt"),
            "--checkpoint_dir",
            checkpoint,
            "--out",
            "case.nii.gz",
            "--samples",
            "4",
        ],
        cwd=tmp_path,
    )
    assert made.returncode == 0 and note("case_spread_95.nii.gz").startswith(
        "not calibrated: fitted for 2 to 3 samples"
    ), made.stderr
    (checkpoint / "doubt.json").write_text("{}")
    broken = run_cmd(
        ["diffx2ct_reconstruct", AP, AP.with_name("LAT.pt"), "--checkpoint_dir", checkpoint, "--out", "again.nii.gz"],
        cwd=tmp_path,
    )
    (checkpoint / "doubt.json").unlink()
    assert broken.returncode == 0 and json.loads((tmp_path / "again_trust.json").read_text())["report"].startswith(
        "NOT ASSESSED"
    )
