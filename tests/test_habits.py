"Habits of the project: a notebook that was only run again is unchanged for git, and README stays short."

import json
import subprocess
import sys

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


def clean(text: str) -> str:
    "A notebook through the git filter."
    how = dict(input=text, capture_output=True, text=True, encoding="utf-8", check=True)
    return subprocess.run([sys.executable, ROOT / ".ci/clean_notebook"], **how).stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_filter_leaves_a_committed_notebook_as_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert clean(text) == text


def test_a_second_run_changes_nothing_for_git():
    book = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))
    cell = next(c for c in book["cells"] if c["cell_type"] == "code")
    shown = dict(output_type="stream", name="stdout", text=["<f at >\n"])
    cell["outputs"] = [shown]
    once = json.dumps(book)
    cell["execution_count"], cell["metadata"]["execution"] = 7, {"iopub.execute_input": "2026-01-01"}
    bar = dict(output_type="stream", name="stderr", text=["50%|█████     | 1/2"])
    cell["outputs"] = [bar, shown | {"text": ["<f at 0x7f12>\n"]}]
    shown["text"] = ["<f>\n"]
    book["metadata"]["language_info"] = {"version": "3.11.9"}
    again = json.loads(clean(json.dumps(book)))
    assert again["cells"][book["cells"].index(cell)]["outputs"] == [shown]
    cell["outputs"] = [shown]
    assert clean(once.replace("<f at >", "<f>")) == clean(json.dumps(book))


def test_readme_is_short_and_begins_with_its_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 700
    first = "\n".join(text.splitlines()[:30])  # one screen
    for part in ("diffx2ct_reconstruct frontal.png lateral.png --out ct.nii.gz", "./run_training.sh --study_name"):
        assert part in first, part
    assert "ot for clinical use" in first
    for link in ("nbs/howto/schedule.md", "nbs/02a_diffusion.ipynb", "nbs/images/hero.png", "CONTRIBUTING.md"):
        assert f"({link})" in text and (ROOT / link).is_file(), link


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_line_is_longer_than_120(path):
    "Strings included, which the formatter leaves alone."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for c in cells:
        if c["cell_type"] == "code":
            assert [x for x in "".join(c["source"]).split("\n") if len(x) > 120] == [], c["id"]


def test_no_line_of_a_script_is_longer_than_120():
    for path in [*ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob(".ci/*"), *ROOT.glob("*.yml")]:
        if path.is_file():
            assert [x for x in path.read_text(encoding="utf-8").split("\n") if len(x) > 120] == [], path
