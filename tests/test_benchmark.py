"The quality benchmark, rehearsed at 16^3."
import json
import sys

import pytest
from conftest import ROOT, run_cmd

RUN = ROOT / "benchmarks" / "quality" / "run.py"
TINY = ["DATA.TARGET_VOLUME_SIZE=16", "DATA.TARGET_DRR_SIZE=16", "DATA.PHANTOMS=6", "DATA.VALIDATION_CASES=[phantom0004, phantom0005]", "TRAINING.PATCH_SIZE=16", "MODEL.UNET.NUM_CHANNELS=[16, 24]",
        "MODEL.UNET.ATTENTION_LEVELS=[false, true]", "MODEL.UNET.CROSS_ATTENTION_LEVELS=[false, true]", "DIFFUSION.STEPS=2", "TRAINING.AMP=off"]


def test_the_list_names_every_row_and_trains_nothing(tmp_path):
    got = run_cmd([sys.executable, RUN, "--list", "--out", tmp_path / "out"], cwd=tmp_path)
    assert got.returncode == 0 and got.stdout.count("\n") == 13 + 9 * 3 + 1 + 3, got.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_a_rehearsal_is_scored_and_not_repeated(tmp_path):
    args = [sys.executable, RUN, "--only", "main", "phantoms ·", "--minutes", "0.01", "--out", tmp_path / "out", "--ct", tmp_path, *(x for s in TINY for x in ("--set", s))]
    got = run_cmd(args, cwd=tmp_path)
    assert got.returncode == 0, (got.stdout, got.stderr, *(p.read_text() for p in (tmp_path / "data/quality").glob("*.log")))
    results = {r["method"]: r for r in (json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json"))}
    assert set(results) == {"ours", "regression", "single_scale", "original_style"}
    for name, r in results.items():
        assert r["steps"] > 0 and r["cpu_seconds"] < 60 and set(r["cases"]) == {"phantom0004", "phantom0005"}
        assert ("expected" in r["scores"]) == (name != "original_style")
        assert 5 < r["scores"]["sample"]["psnr"][0] < 40
    table = (tmp_path / "out/table.md").read_text()
    assert "consistent mean" in table and "original style" in table and (tmp_path / "out/curves.png").stat().st_size > 1000
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.json")}
    assert run_cmd(args, cwd=tmp_path).returncode == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.json")}


def test_rows_without_their_data_are_left_out(tmp_path):
    got = run_cmd([sys.executable, RUN, "--only", "sarcoma_cone", "--out", tmp_path / "out", "--ct", tmp_path], cwd=tmp_path)
    assert got.returncode == 0 and "sts_ct_64.npz is not there" in got.stdout
