"Values written in several places agree."

import configparser
import re
import shutil
import sys
import sysconfig
import tomllib
import zipfile

import pytest
import yaml
from conftest import ROOT, run_cmd
from packaging.requirements import Requirement

import diffx2ct

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    "The pinned packages of a requirements file, names in one spelling."
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and line[0] != "#"]
    return {
        re.sub(r"[-_.]+", "-", package).lower(): version for package, version in (line.split("==") for line in lines)
    }


def test_pins_satisfy_the_declared_dependencies():
    extras = PROJECT["optional-dependencies"]
    for name, declared in (
        ("requirements.txt", PROJECT["dependencies"] + extras["app"]),
        ("requirements-dev.txt", extras["postgresql"] + extras["test"][1:] + extras["docs"]),
    ):
        for requirement in map(Requirement, declared):
            assert pins(name)[requirement.name.lower()] in requirement.specifier, requirement


def test_torch_comes_first_and_no_cuda_package_is_pinned():
    assert next(iter(pins("requirements.txt"))) == "torch"
    assert not [p for p in pins("requirements.txt") if p.startswith(("nvidia", "cuda", "triton"))]
    assert not pins("requirements.txt").keys() & pins("requirements-dev.txt").keys()


def test_the_lock_holds_every_pin_with_hashes():
    text = (ROOT / "docker/requirements.lock").read_text()
    parts = dict(zip(*[iter(re.split(r"^# \[(\w+)\]\n", text, flags=re.M)[1:])] * 2))
    assert list(parts) == ["torch", "run", "dev"]
    locked = {part: {} for part in parts}
    for part, blocks in parts.items():
        for block in re.split(r"\n(?=\S)", blocks.strip()):
            name, version, hashes = re.fullmatch(
                r"([\w.-]+)==([\w.]+)(?: ; [^\\]+)?((?: \\\n +--hash=sha256:[0-9a-f]{64})+)", block
            ).groups()  # nothing without a hash, nothing by address
            assert hashes.count("--hash") >= 1 and name not in locked[part]
            locked[part][re.sub(r"[-_.]+", "-", name).lower()] = version
    run, dev = pins("requirements.txt"), pins("requirements-dev.txt")
    assert (locked["torch"] | locked["run"]).items() >= run.items() and locked[
        "dev"
    ].items() == dev.items()  # mend it with .ci/lock.py
    assert "torch" in locked["torch"] and not [p for p in locked["run"] if p.startswith(("nvidia", "cuda-", "triton"))]


def test_one_version():
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M).group(1)
    assert diffx2ct.__version__ == settings["DEFAULT"]["version"] == citation["version"] == newest


def test_every_command_is_a_function_of_the_package():
    for target in PROJECT["scripts"].values():
        module, function = target.split(":")
        assert re.search(rf"^def {function}\(", (ROOT / f"{module.replace('.', '/')}.py").read_text(), re.M), target


@pytest.mark.parametrize("args", [["--help"], ["--no_such_option"]])
@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_help_and_mistakes_load_nothing_heavy(command, args):
    "Help pages and mistakes need no slow imports."
    module, function = PROJECT["scripts"][command].split(":")
    code = f"""
import sys, {module}
heavy = {{"torch", "numpy", "optuna", "wandb", "matplotlib", "diffx2ct.basics"}}
sys.argv = [{command!r}, *{args!r}]
try:
    {module}.{function}()
except SystemExit as e:
    print([e.code, sorted(heavy & sys.modules.keys())])
"""
    p = run_cmd([sys.executable, "-c", code])
    assert p.stdout.endswith(f"[{0 if args == ['--help'] else 2}, []]\n"), p.stderr


def test_every_setting_is_read_by_some_chapter():
    from diffx2ct.config import Config, LossWeights, Section

    def leaves(section):
        for key, value in section:
            if isinstance(value, LossWeights):
                continue  # read as a whole, by name, in phase_weights
            if isinstance(value, Section):
                yield from leaves(value)
            else:
                yield key

    code = "\n".join(p.read_text() for p in (ROOT / "diffx2ct").glob("*.py"))
    assert not [key for key in leaves(Config()) if not re.search(rf"\.{key}\b", code)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The bin folder of a new environment with the wheel, made from the source archive, and with this one's packages,
    but not with this checkout."""
    base = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "config.yml"):
        shutil.copy(ROOT / name, base / name)
    shutil.copytree(ROOT / "diffx2ct", base / "diffx2ct", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for args in (
        ["-m", "build", "--no-isolation", "--outdir", base / "dist", base],
        ["-m", "venv", "--without-pip", base / "env"],
    ):
        result = run_cmd([sys.executable, *args], PYTHONPATH=None)
        assert result.returncode == 0, result.stdout + result.stderr
    (site,) = (base / "env/lib").glob("python3*/site-packages")
    (site / "pinned.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = (base / "dist").glob("*.whl")
    result = run_cmd(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            base / "env/bin/python",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--ignore-installed",
            wheel,
        ],
        PYTHONPATH=None,
    )
    assert result.returncode == 0, result.stderr
    return base / "env/bin"


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    "A clone in a folder named as the package, with data/ in it, installed as docker/setup.sh does it; its interpreter."
    tmp_path = tmp_path_factory.mktemp("editable")
    clone = tmp_path / "diffx2ct"
    (clone / "data" / "phantoms").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "config.yml"):
        shutil.copy(ROOT / name, clone / name)
    for name in ("diffx2ct", "docker"):
        shutil.copytree(ROOT / name, clone / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    made = run_cmd([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"])
    assert made.returncode == 0, made.stderr
    (site,) = (tmp_path / "env/lib").glob("python3*/site-packages")
    (site / "pinned.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    python = tmp_path / "env/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--ignore-installed"]
    setup = ["bash", "-c", 'source "$1"; shift; install_project "$@"', "-", clone / "docker" / "setup.sh"]
    done = run_cmd([*setup, *pip], cwd=tmp_path, PYTHONPATH=None)
    assert done.returncode == 0, done.stdout + done.stderr
    return python


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["..", ".", "data", "nbs"])
def test_the_package_is_found_from_every_folder(editable, folder):
    "Also from the folder above the clone, where `diffx2ct` is the clone itself and `diffx2ct.data` its folder of data."
    clone = editable.parents[2] / "diffx2ct"
    (clone / "nbs").mkdir(exist_ok=True)
    code = "from importlib.util import find_spec; print(find_spec('diffx2ct.data').origin)"  # without loading torch
    (clone / folder / "script.py").write_text(code)
    for how in (["script.py"], ["-c", code]):
        p = run_cmd([editable, *how], cwd=clone / folder, PYTHONPATH=None)
        assert p.returncode == 0 and p.stdout == f"{clone / 'diffx2ct' / 'data.py'}\n", (p.stdout, p.stderr)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(installed):
    (wheel,) = (installed.parents[1] / "dist").glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert (
        names
        == {
            str(p.relative_to(ROOT))
            for p in (ROOT / "diffx2ct").rglob("*")
            if p.is_file() and "__pycache__" not in p.parts
        }
        and {"diffx2ct/py.typed", "diffx2ct/config.yml", "diffx2ct/viewer.js", "diffx2ct/page.css"} <= names
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_an_installed_command_helps_from_an_empty_folder(installed, command, tmp_path):
    result = run_cmd([installed / command, "--help"], cwd=tmp_path, PYTHONPATH=None)
    name = {"diffx2ct_doubt": "diffx2ct_uncertainty"}.get(command, command)  # an old name prints the new one
    assert result.returncode == 0 and result.stdout.startswith(f"usage: {name} "), result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_installed_package_knows_its_settings(installed, tmp_path):
    result = run_cmd(
        [installed / "python", "-c", "import diffx2ct; print(diffx2ct.__file__)"], cwd=tmp_path, PYTHONPATH=None
    )
    assert result.stdout.startswith(str(installed.parent))  # and not this checkout
    result = run_cmd(
        [installed / "diffx2ct_train", "--explain", "TRAINING.LEARNING_RATE"], cwd=tmp_path, PYTHONPATH=None
    )
    assert result.returncode == 0 and "peak learning rate" in result.stdout and "default  0.004" in result.stdout, (
        result.stderr
    )
    result = run_cmd(
        [installed / "diffx2ct_train", "--profile", "few", "--explain", "EPOCHS"], cwd=tmp_path, PYTHONPATH=None
    )
    assert result.returncode == 0 and "now      200" in result.stdout, (
        result.stderr
    )  # profiles too, where no config.yml lies
    result = run_cmd([installed / "diffx2ct_train", "--explain", "LERNING_RATE"], cwd=tmp_path, PYTHONPATH=None)
    assert (
        result.returncode == 2
        and result.stderr
        == "diffx2ct: --explain LERNING_RATE: there is no such key; the nearest is TRAINING.LEARNING_RATE\n"
    )
    assert list(tmp_path.iterdir()) == []
