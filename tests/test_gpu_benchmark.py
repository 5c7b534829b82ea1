"benchmarks/gpu rehearsed on a CPU: every part runs on tiny networks, and what fails is recorded."

import importlib.util
import json
import sys

import pytest
from conftest import ROOT, run_cmd

FOLDER = ROOT / "benchmarks" / "gpu"
PROFILES = {"demo", "few", "nodules", "lidc128", "lidc256"}


def rehearse(folder, *args, device: str = "cpu"):
    got = run_cmd(
        [FOLDER / "run.sh", "--device", device, "--tiny", "--out", folder / "out", *args],
        cwd=folder,
        timeout=1800,
        DIFFX2CT_PYTHON=sys.executable,
    )
    file = folder / "out" / "gpu.json"
    return got, json.loads(file.read_text()) if file.exists() else None


@pytest.fixture(scope="module")
def run():
    "The script as a module."
    spec = importlib.util.spec_from_file_location("gpu_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_part_is_rehearsed(tmp_path, run):
    got, result = rehearse(tmp_path, "--limit", "900")
    parts = result["parts"]
    assert got.returncode == 0 and {p["status"] for p in parts.values()} == {"ok"}, got.stdout
    rows = {name: {r["name"]: r for r in p["rows"]} for name, p in parts.items()}
    assert list(rows) == list(run.PARTS) and not any("error" in r for p in rows.values() for r in p.values())
    assert len(rows["numerics"]) == 10 and all(r["holds"] and r["apart"] == 0 for r in rows["numerics"].values())
    assert set(rows["steps"]) == PROFILES and all(r["step, s"] > 0 for r in rows["steps"].values())
    assert set(rows["volumes"]) == {"lidc128 128^3", "lidc256 256^3"}
    assert [r["window"] for r in rows["sampling"].values()] == [32, 64, 32]
    assert all(r["finite"] and r["evaluations"] == 2 for r in rows["sampling"].values())
    whole, *cut = rows["split"].values()
    assert len(cut) == 3 and all(r["loss apart"] < 1e-3 and "slower than whole, %" in r for r in cut)
    assert rows["compile"]["demo"]["losses"][0] == pytest.approx(rows["steps"]["demo"]["losses"][0], rel=0.02)
    assert result["bars"] == [] and result["tiny"] and result["card"] == {"device": "cpu"}
    assert "| lidc256 |" in got.stdout


@pytest.mark.slow
def test_a_part_out_of_time_is_recorded_and_the_next_one_begins(tmp_path):
    got, result = rehearse(tmp_path, "--only", "numerics", "steps", "--limit", "0.01")
    assert got.returncode == 1 and [p["status"] for p in result["parts"].values()] == ["out of time (0.01 s)"] * 2
    assert all(p["rows"] == [] for p in result["parts"].values()) and "numerics: out of time" in got.stdout


def test_a_row_that_fails_is_recorded_and_the_next_one_begins(run, tmp_path):
    part = run.Part("cpu", True, tmp_path / "rows")
    assert part.row("first", lambda: 1 / 0) is None and part.row("second", lambda: {"seconds": 1.0}) == {"seconds": 1.0}
    first, second = map(json.loads, part.file.read_text().splitlines())
    assert part.failed and first == {"name": "first", "error": "ZeroDivisionError: division by zero"}
    assert second["name"] == "second"


def test_limits_are_under_eight_minutes_and_bars_are_judged(run):
    assert set(run.LIMITS) == set(run.PARTS) and sum(run.LIMITS.values()) <= 460
    row = {"name": "lidc256 256^3 whole", "seconds": 3.0, "peak, GB": 9.0}
    bars = run.bars({"sampling": {"rows": [row]}, "split": {"rows": [{"name": "whole", "error": "no room"}]}})
    assert [(b["bar"], b["met"]) for b in bars] == [(4.0, True), (8.0, False)]


@pytest.mark.slow
def test_a_missing_gpu_is_one_sentence(tmp_path):
    got, result = rehearse(tmp_path, device="cuda:7")
    assert got.returncode == 2 and result is None
    assert got.stderr == "diffx2ct: --device cuda:7 is not on this machine; use cpu, cuda:0 or auto\n"


def test_the_readme_has_the_limits(run):
    text = (FOLDER / "README.md").read_text()
    for name, limit in run.LIMITS.items():
        assert f"| {name} | {limit} |" in text
    assert f"add up to {sum(run.LIMITS.values())} s" in text
    if not (FOLDER / "results" / "gpu.json").exists():
        assert "Not run on a GPU yet" in text
