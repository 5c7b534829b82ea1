"The list of planted bugs stays alive: each edit applies exactly once to its module and chapter, and compiles."

import sys

import pytest
from conftest import ROOT, run_cmd

MUTANTS = ROOT / "benchmarks" / "mutants"
sys.path.insert(0, str(MUTANTS))
from mutants import LEFT
from run import CHECKS, mutants, planted


@pytest.mark.parametrize("module", CHECKS)
def test_every_edit_applies_exactly_once(module):
    edits = [m for m in mutants() if m[0] == module]
    assert len({name for _, name, *_ in edits}) == len(edits) > 4
    for _, name, old, new, why, where in edits:
        assert old != new and why, name
        try:
            files = planted(ROOT, where, old, new)
        except ValueError as e:
            pytest.fail(f"{module}: {name}: {e}; mend the edit in benchmarks/mutants/mutants.py")
        for path, text in files.items():
            if path.suffix == ".py":
                compile(text, str(path), "exec")


def test_the_list_is_long_and_complete():
    found = mutants()
    modules = {p.stem for p in (ROOT / "diffx2ct").glob("[!_]*.py")}
    assert len(found) >= 120 and {m for m, *_ in found} == modules == CHECKS.keys()
    assert LEFT.keys() <= {(m, name) for m, name, *_ in found}
    assert all((ROOT / check.split()[0]).exists() for checks in CHECKS.values() for check in checks)


def test_a_text_that_is_gone_or_stands_twice_is_an_error():
    for text in ("no such text", "Tensor"):
        with pytest.raises(ValueError, match="does not stand exactly once"):
            planted(ROOT, "drr", text, "")


def test_the_list_and_the_help(tmp_path):
    got = run_cmd([sys.executable, MUTANTS / "run.py", "--list", "--only", "drr"], cwd=tmp_path)
    assert got.returncode == 0 and "detector inside" in got.stdout and "metrics" not in got.stdout, got.stderr
    assert "--survivors" in run_cmd([sys.executable, MUTANTS / "run.py", "--help"], cwd=tmp_path).stdout
