"The pages of nbs/howto: their changes apply, and their checks hold after them."

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from diffx2ct import commands
from diffx2ct.basics import UserError
from diffx2ct.config import load_config

PAGES = sorted((ROOT / "nbs/howto").glob("*.md"))
MODULES = {
    re.search(r"File to edit: \.\./(\S+\.ipynb)", p.read_text())[1]: p.name
    for p in (ROOT / "diffx2ct").glob("[!_]*.py")
}


def blocks(page, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def exported(notebook: str) -> str:
    cells = json.loads((ROOT / notebook).read_text())["cells"]
    return "\n".join("".join(c["source"]) for c in cells if "".join(c["source"]).startswith("#| export"))


def change(diff: str) -> tuple[str, str, str]:  # notebook, text before, text after
    head, *lines = diff.splitlines(keepends=True)
    assert {line[0] for line in lines} <= {" ", "+", "-"}, diff
    old, new = ("".join(line[1:] for line in lines if line[0] != skip) for skip in "+-")
    return head.removeprefix("--- ").strip(), old, new


RUN = """import json, sys, traceback
sys.path.insert(0, ".")
for name, code in json.load(sys.stdin).items():
    try:
        exec(compile(code, name, "exec"), {"__name__": name})
        print("ok", name)
    except BaseException:
        traceback.print_exc()
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> subprocess.CompletedProcess:
    "The checks of all pages in one process, on a copy of the package with the changes of all pages."
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "diffx2ct", folder / "diffx2ct", ignore=shutil.ignore_patterns("__pycache__", "weights"))
    for page in PAGES:
        for notebook, old, new in map(change, blocks(page, "diff")):
            module = folder / "diffx2ct" / MODULES[notebook]
            found = exported(notebook).count(old), module.read_text().count(old)
            assert found == (1, 1), f"{page.name}: not once in {notebook}: {old}"
            module.write_text(module.read_text().replace(old, new))
    checks = json.dumps({p.stem: "".join(blocks(p, "python")) for p in PAGES if blocks(p, "python")})
    return subprocess.run([sys.executable, "-c", RUN], input=checks, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [p.stem for p in PAGES if blocks(p, "python")])
def test_the_change_of_a_page_works(name, changed):
    assert f"ok {name}\n" in changed.stdout, changed.stderr


DOCS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")] + PAGES
OPTIONS = {name.removesuffix("_options"): make for name, make in vars(commands).items() if name.endswith("_options")}
PARSERS = {f"diffx2ct_{name}": make for name, make in OPTIONS.items() if name != "page"}
PARSERS |= {name: commands.train_options for name in ("./run_training.sh", "-m diffx2ct.study")}
PARSERS["./run_visualize.sh"] = commands.visualize_options
CALL = rf"({'|'.join(map(re.escape, PARSERS))})\b([^|`\n]*)"


@pytest.mark.parametrize("page", DOCS, ids=lambda p: p.stem)
def test_what_a_page_names_exists(page):
    "Links, scripts, modules, commands and their options."
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"(?:\./|\.ci/|tests/|benchmarks/)[\w/]+\.(?:sh|py|md)\b", text):
        assert (ROOT / name).exists() or (page.parent / name).exists(), name
    for name in re.findall(r"-m diffx2ct\.(\w+)", text):
        assert '__name__ == "__main__"' in (ROOT / f"diffx2ct/{name}.py").read_text(), name
    for command, words in re.findall(CALL, text):
        known = {*PARSERS[command]()._option_string_actions, "--docker", "--dry_run"}
        assert set(re.findall(r"(?<!\S)--\w+", words)) <= known, (command, words)
    assert set(re.findall(r"\bdiffx2ct_\w+", text)) - {"diffx2ct_doubt"} <= PARSERS.keys()  # an old name


def test_a_check_fails_without_its_change():
    "The settings refuse the new schedule in the package as it is."
    with pytest.raises(UserError, match="DIFFUSION.SCHEDULE is 'smooth'"):
        load_config(sets=["DIFFUSION.SCHEDULE=smooth"])
    assert "DIFFUSION.SCHEDULE=smooth" in (ROOT / "nbs/howto/schedule.md").read_text()
