"What is written in several places agrees."
import configparser
import re
import tomllib

import diffx2ct
import yaml
from conftest import ROOT
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    "The pinned packages of a requirements file, names in one spelling."
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and line[0] != "#"]
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in (line.split("==") for line in lines)}


def test_pins_satisfy_the_declared_dependencies():
    extras = PROJECT["optional-dependencies"]
    for name, declared in (("requirements.txt", PROJECT["dependencies"]), ("requirements-dev.txt", extras["postgresql"] + extras["test"][1:] + extras["docs"])):
        for requirement in map(Requirement, declared): assert pins(name)[requirement.name.lower()] in requirement.specifier, requirement

def test_torch_comes_first_and_no_cuda_package_is_pinned():
    assert next(iter(pins("requirements.txt"))) == "torch"
    assert not [p for p in pins("requirements.txt") if p.startswith(("nvidia", "cuda", "triton"))]
    assert not pins("requirements.txt").keys() & pins("requirements-dev.txt").keys()

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

def test_every_setting_is_read_by_some_chapter():
    from diffx2ct.data import Config, LossWeights, Section

    def leaves(section):
        for key, value in section:
            if isinstance(value, LossWeights): continue  # read as a whole, by name, in phase_weights
            if isinstance(value, Section): yield from leaves(value)
            else: yield key

    code = "\n".join(p.read_text() for p in (ROOT / "diffx2ct").glob("*.py"))
    assert not [key for key in leaves(Config()) if not re.search(rf"\.{key}\b", code)]
