"Killed searches and shared studies, in the small form of benchmarks/kills."

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_cmd


def lose_nothing(tmp_path, part: str, *args) -> dict:
    got = run_cmd(
        [sys.executable, ROOT / "benchmarks" / "kills" / "run.py", "--only", part, *args, "--out", tmp_path],
        cwd=tmp_path,
        timeout=600,
    )
    assert got.returncode == 0 and "Traceback" not in got.stderr, (got.stdout, got.stderr)
    return json.loads((tmp_path / f"{part}.json").read_text())


@pytest.mark.slow
def test_killed_at_drawn_moments_and_equal_to_the_bit(tmp_path):
    runs = lose_nothing(tmp_path, "kills", "--kills", "5")["runs"]
    assert sum(len(r["kills"]) for r in runs) == 5 and not any(r["differs"] for r in runs)


@pytest.mark.slow
def test_four_workers_on_one_sqlite_study(tmp_path):
    r = lose_nothing(tmp_path, "workers", "--trials", "12")
    assert r["states"] == {"COMPLETE": 12} and len(r["by_worker"]) > 1


@pytest.mark.slow
def test_the_server_of_a_study_is_restarted(tmp_path):
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("no PostgreSQL server (Debian: apt-get install postgresql)")
    assert lose_nothing(tmp_path, "server", "--trials", "12")["states"] == {"COMPLETE": 12}


@pytest.mark.slow
def test_a_killed_workers_trial_is_taken_up_by_another(tmp_path):
    assert lose_nothing(tmp_path, "taken", "--workers", "2")["went_on_from_a_checkpoint"]


@pytest.mark.slow
def test_a_lost_machines_values_are_tried_again_by_another(tmp_path):
    r = lose_nothing(tmp_path, "away")
    assert r["why"] == "no heartbeat for 5 s" and r["same_values"] and r["states"] == ["FAIL", "COMPLETE", "COMPLETE"]
