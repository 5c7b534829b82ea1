"""Shared by all tests: run the installed commands in a clean environment, find the CT folder, skip what this machine
cannot do."""

import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent  # where the installed commands lie

# Nothing is read from or written to the home folder, nothing is sent, one thread each (run_tests.sh sets the same).
_scratch = tempfile.TemporaryDirectory(prefix="diffx2ct-tests-")
if not os.environ.get("HOME", "").startswith(tempfile.gettempdir()):
    for name in (
        "HOME",
        "IPYTHONDIR",
        "MPLCONFIGDIR",
        "WANDB_DIR",
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTER_RUNTIME_DIR",
    ):
        os.environ[name] = str(Path(_scratch.name, name))
        Path(os.environ[name]).mkdir()
for name, value in {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}.items():
    os.environ.setdefault(name, value)


def command(
    args: list,  # a command and its arguments; an installed command by its name, such as `diffx2ct_train`
    env: dict[str, str | None],  # variables set for this command; None takes one away
) -> dict:
    "Arguments of `subprocess` for a command without standard input."
    args = [str(a) for a in args]
    if (BIN / args[0]).exists():
        args[0] = str(BIN / args[0])
    merged = {k: v for k, v in (os.environ | env).items() if v is not None}
    return dict(args=args, env=merged, stdin=subprocess.DEVNULL, encoding="utf-8", errors="replace")


def run_cmd(
    args: list,  # as for `command`
    cwd: Path | str | None = None,  # working folder
    timeout: float = 300,  # seconds
    **env: str | None,  # variables set for this command; None takes one away
) -> subprocess.CompletedProcess:
    "Run a command without standard input; `.returncode`, `.stdout` and `.stderr` of the result are what it did."
    return subprocess.run(**command(args, env), cwd=cwd, capture_output=True, timeout=timeout)


def start_cmd(
    args: list,  # as for `command`
    cwd: Path | str | None = None,  # working folder
    **env: str | None,  # variables set for this command; None takes one away
) -> subprocess.Popen:
    "Start a command in a separate process group, as a terminal does; its output goes to pipes."
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(**command(args, env), **pipes, cwd=cwd, start_new_session=True)


PATIENCE = 300  # seconds: a bound for a busy machine, not a measure


@contextmanager
def served(
    args: list,  # a command and its arguments
    probe: str,  # an address that the server answers once it is up
    log: Path,  # its stdout and stderr
    env: dict[str, str],  # all variables of the server
) -> Iterator[None]:
    "Run a server until the block ends; the block begins when the server answers."
    with open(log, "w") as out:
        server = subprocess.Popen(args, env=env, stdout=out, stderr=subprocess.STDOUT)
    end = time.monotonic() + PATIENCE
    try:
        while True:
            try:
                urllib.request.urlopen(probe, timeout=2).close()
                break
            except urllib.error.HTTPError:
                break  # it answers
            except OSError:
                if server.poll() is not None or time.monotonic() > end:
                    pytest.fail(f"the server did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.1)
        yield
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def write_slices(
    image,  # SimpleITK image of HU
    folder: Path,  # made if it does not exist
    name: Callable[[int], str],  # slice -> name of its file
    tags: dict[str, str],  # DICOM tags of all slices, such as 0020|000e; modality CT if it is not among them
    skip: Iterable[int] = (),  # slices that are left out
) -> None:
    "Write a volume as a DICOM series, one file per slice."
    import SimpleITK as sitk

    folder.mkdir(parents=True, exist_ok=True)
    turn = "\\".join(f"{image.GetDirection()[i]:g}" for i in (0, 3, 6, 1, 4, 7))
    for k in set(range(image.GetDepth())) - set(skip):
        s = sitk.JoinSeries([image[:, :, k]])
        s.SetSpacing(image.GetSpacing())
        own = {
            "0008|0060": "CT",
            "0020|0032": "\\".join(f"{v:.6g}" for v in image.TransformIndexToPhysicalPoint((0, 0, k))),
            "0020|0037": turn,
            "0020|0013": str(k + 1),
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        for key, value in (own | tags).items():
            s.SetMetaData(key, value)
        w = sitk.ImageFileWriter()
        w.KeepOriginalImageUIDOn()
        w.SetFileName(str(folder / name(k)))
        w.Execute(s)


def real_data(name: str, what: str) -> Path:
    "A folder of real data: `$DIFFX2CT_<NAME>_DIR`, or `../shared/<name>` next to the project; else the test skips."
    variable = f"DIFFX2CT_{name.upper()}_DIR"
    path = Path(os.environ.get(variable) or ROOT.parent / "shared" / name)
    if not path.is_dir():
        pytest.skip(f"no real {what}: {path} is not a folder (set {variable})")
    return path


@pytest.fixture(scope="session")
def ct_dir() -> Path:
    "A folder with real CT scans."
    return real_data("ct", "CT scans")


@pytest.fixture(scope="session")
def xray_dir() -> Path:
    "A folder with real film pairs."
    return real_data("xray", "film pairs")


def pytest_collection_modifyitems(items):
    "Tests marked cuda are skipped where there is no GPU."
    marked = [i for i in items if i.get_closest_marker("cuda")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for i in marked:
            i.add_marker(pytest.mark.skip(reason="no GPU"))
