"The benchmarks, rehearsed at 16^3: that they run and fill their tables. What they measure is no matter of tests."

import json
import sys

import pytest
from conftest import ROOT, run_cmd

BENCHMARKS = ROOT / "benchmarks"
RUN = BENCHMARKS / "quality" / "run.py"
TINY = [
    "DATA.TARGET_VOLUME_SIZE=16",
    "DATA.TARGET_DRR_SIZE=16",
    "DATA.PHANTOMS=6",
    "DATA.VALIDATION_CASES=[phantom0004, phantom0005]",
    "TRAINING.PATCH_SIZE=16",
    "MODEL.UNET.NUM_CHANNELS=[16, 24]",
    "MODEL.UNET.ATTENTION_LEVELS=[false, true]",
    "MODEL.UNET.CROSS_ATTENTION_LEVELS=[false, true]",
    "DIFFUSION.STEPS=2",
    "TRAINING.AMP=off",
]


def test_the_list_names_every_row_and_trains_nothing(tmp_path):
    got = run_cmd([sys.executable, RUN, "--list", "--out", tmp_path / "out"], cwd=tmp_path)
    assert got.returncode == 0 and got.stdout.count("\n") == 12 + 11 * 3 + 10 * 3, got.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_a_rehearsal_is_scored_and_not_repeated(tmp_path):
    args = [
        sys.executable,
        RUN,
        "--only",
        "main",
        "phantoms ·",
        "--minutes",
        "0.01",
        "--out",
        tmp_path / "out",
        "--ct",
        tmp_path,
        *(x for s in TINY for x in ("--set", s)),
    ]
    got = run_cmd(args, cwd=tmp_path)
    assert got.returncode == 0, (
        got.stdout,
        got.stderr,
        *(p.read_text() for p in (tmp_path / "data/quality").glob("*.log")),
    )
    results = {r["method"]: r for r in (json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json"))}
    assert set(results) == {"ours", "regression", "original_style"}
    for name, r in results.items():
        assert r["steps"] > 0 and r["cpu_seconds"] < 60 and set(r["cases"]) == {"phantom0004", "phantom0005"}
        assert ("expected" in r["scores"]) == (name != "original_style")
        assert (
            r["scores"]["consistent_mean"]["psnr"][0] > 5 and 1 < r["scores"]["sample (off)"]["psnr"][0] < 40
        )  # noise prediction from a few steps, on its own, is hardly better than noise
        assert name == "original_style" or 5 < r["scores"]["sample"]["psnr"][0] < 40
    table = (tmp_path / "out/table.md").read_text()
    assert (
        "consistent mean" in table and "original style" in table and (tmp_path / "out/curves.png").stat().st_size > 1000
    )
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.json")}
    assert run_cmd(args, cwd=tmp_path).returncode == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.json")}


@pytest.mark.slow
def test_rows_without_their_data_are_left_out(tmp_path):
    got = run_cmd(
        [sys.executable, RUN, "--only", "sarcoma_cone", "--out", tmp_path / "out", "--ct", tmp_path], cwd=tmp_path
    )
    assert got.returncode == 0 and "sts_ct_64.npz is not there" in got.stdout


def rehearse(name, folder, *args):
    "Run a benchmark with its results in a folder."
    got = run_cmd([sys.executable, BENCHMARKS / name / "run.py", *args, "--out", folder / "out"], cwd=folder)
    assert got.returncode == 0, (got.stdout, got.stderr)
    return got


def rows_of(folder, file):
    return json.loads((folder / "out" / file).read_text())["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["speed", "memory", "sampling", "data", "projector"])
def test_help_teaches_and_a_wrong_option_is_one_sentence(name, tmp_path):
    got = run_cmd([sys.executable, BENCHMARKS / name / "run.py", "--help"], cwd=tmp_path)
    assert got.returncode == 0 and f"python benchmarks/{name}/run.py" in got.stdout and "--out" in got.stdout
    wrong = {
        "speed": ["--edge", "17"],
        "memory": ["--only", "nothing"],
        "sampling": ["--checkpoint_dir", "nowhere"],
        "data": ["--repeats", "0"],
        "projector": ["--repeats", "0", "--edge", "16"],
    }[name]
    got = run_cmd([sys.executable, BENCHMARKS / name / "run.py", *wrong, "--out", tmp_path / "out"], cwd=tmp_path)
    assert got.returncode == 2 and "Traceback" not in got.stderr and got.stderr.strip(), got.stderr


@pytest.mark.slow
def test_speed_has_all_rows_in_both_precisions(tmp_path):
    rehearse("speed", tmp_path, "--edge", "16", "--repeats", "1")
    rows = rows_of(tmp_path, "speed.json")
    for precision in ("bf16", "single"):
        assert {"original style", "ours, width 32", "ours, width 32, two blocks a level", "ours, demo as shipped"} <= {
            r["network"] for r in rows if r["precision"] == precision
        }
    assert all(r["evaluation, CPU s"] > 0 and r["step, CPU s"] > 0 for r in rows)
    rows = rows_of(tmp_path, "optimizers.json")
    assert [(r["edge"], r["optimizer"]) for r in rows] == [(e, o) for e in (16, 32) for o in ("adamw", "muon")]
    assert all(0 < r["optimizer alone, CPU s"] < r["step, CPU s"] for r in rows)


@pytest.mark.slow
def test_memory_measures_a_case_once(tmp_path):
    assert "missing volume lidc256 256" in rehearse("memory", tmp_path, "--list").stdout
    for _ in range(2):
        said = rehearse("memory", tmp_path, "--only", "lidc256", "volume", "32")
    assert "| lidc256 32^3 |" in said.stdout and "done" not in said.stderr
    got = json.loads((tmp_path / "out/volume_lidc256_32.json").read_text())
    assert got["edge"] == 32 and 0 < got["saved_bytes"] < got["peak_bytes"] and got["parameters"] > 1e7


@pytest.mark.slow
def test_sampling_scores_every_way_and_goes_on(tmp_path):
    got = run_cmd(
        [
            "diffx2ct_train",
            "--study_name",
            "s",
            "--no_search",
            "--set",
            "EPOCHS=1",
            "--set",
            "TRAINING.COARSE_EPOCHS=[]",
            *(x for s in TINY for x in ("--set", s)),
        ],
        cwd=tmp_path,
    )
    assert got.returncode == 0, got.stderr
    for n in (1, 2):
        said = rehearse("sampling", tmp_path, "--checkpoint_dir", "checkpoints/s/single", "--cases", str(n))
    got = json.loads((tmp_path / "out/sampling.json").read_text())
    assert set(got["cases"]) == {"phantom0004", "phantom0005"} and len(got["rows"]) == 5 and len(got["losses"]) == 3
    assert "8 steps against 50" in said.stdout and "2 cases" in said.stdout


@pytest.mark.slow
def test_data_has_both_tables(tmp_path):
    rehearse("data", tmp_path, "--edge", "32", "--repeats", "1")
    assert [r["ratio"] for r in rows_of(tmp_path, "crops.json")][0] == 1 and len(rows_of(tmp_path, "crops.json")) == 6
    assert {(r["volume"], r["geometry"]) for r in rows_of(tmp_path, "views.json")} == {
        (v, g) for v in ("16^3", "32^3") for g in ("parallel", "x2ct")
    }


@pytest.mark.slow
def test_projector_agrees_with_rays(tmp_path):
    rehearse("projector", tmp_path, "--edge", "16", "--repeats", "1")
    rows = [r for r in rows_of(tmp_path, "projector.json") if r["renderer"] == "ours"]
    assert {r["geometry"] for r in rows} == {"parallel", "x2ct"} and all(r["against rays, %"] < 1.5 for r in rows)
