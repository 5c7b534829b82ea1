"Several processes train one network: losses, weights and checkpoints are those of one."

import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_cmd, start_cmd
from safetensors.torch import load_file
from test_training import MINUTES, TINY, at_file, signal_at_file, start, states

sys.path.append(str(ROOT / "benchmarks"))
from common import postgres

STILL = ["--no_search", "--set", "BATCH_SIZE=4", "--set", "TRAINING.AUGMENT.PHOTONS=10000", "--set", "DEVICES=cpu"]


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "tiny.yml").write_text(TINY)
    return tmp_path


def go(cwd: Path, name: str, n: int, *args, code=0) -> str:
    "A run of `n` processes; what it said."
    p = run_cmd(
        ["diffx2ct_train", "--config", "tiny.yml", "--study_name", name, *STILL, "--nproc_per_node", n, *args], cwd=cwd
    )
    assert p.returncode == code and "Traceback" not in p.stderr, (p.returncode, p.stdout, p.stderr)
    return p.stderr if code else p.stdout


def ended(cwd: Path, name: str) -> tuple[list, dict]:
    "Losses of all steps, and the weights at the end."
    folder = cwd / "checkpoints" / name / "single"
    return torch.load(max(folder.glob("training_*.pt")), weights_only=True)["history"]["losses"], load_file(
        max(folder.glob("model_*.safetensors"))
    )


def alike(a: tuple, b: tuple):
    """Two runs are one: losses to rounding, which grows a little from step to step; weights as a whole, since AdamW
    makes a step of rounding where a gradient is nothing else."""
    assert a[0] == pytest.approx(b[0], rel=1e-4) and len(a[0]) == 6
    assert a[1].keys() == b[1].keys()
    assert (
        sum((v - b[1][k]).square().sum() for k, v in a[1].items()).sqrt()
        < 5e-3 * sum(v.square().sum() for v in b[1].values()).sqrt()
    )


@pytest.mark.slow
def test_as_many_ranks_as_you_like(place):
    """One rank, two with whole networks, three with slices (uneven shares: 2, 1, 1), a coarse stage first; and a run
    that changes between them."""
    coarse = ["--set", "TRAINING.COARSE_EPOCHS=[2]", "--set", "MODEL.UNET.PLANAR_LEVELS=1"]
    said = go(place, "one", 1, *coarse)
    assert "best validation PSNR" in go(place, "two", 2, *coarse) and said.count("data:") == 1
    go(place, "cut", 3, *coarse, "--set", "PARALLEL=fsdp")
    one = ended(place, "one")
    alike(ended(place, "two"), one)
    alike(ended(place, "cut"), one)


@pytest.mark.slow
def test_a_run_changes_its_number_of_ranks(place):
    """Two ranks begin, are stopped by a signal, one goes on and is stopped, three with slices end it: losses of a run
    that was left in peace."""
    go(place, "peace", 1)
    for n, steps in ((2, "[1-9]"), (1, "[3-9]")):  # Ctrl-C in a terminal reaches all of them
        hook = signal_at_file(place, f"/moved/single/model_00000{steps}.safetensors", signal.SIGINT)
        p = start(place, "--study_name", "moved", *STILL, "--nproc_per_node", n, **hook)
        out, err = p.communicate(timeout=MINUTES)
        assert p.returncode == 130 and "Traceback" not in err, (p.returncode, out, err)
    go(place, "moved", 3, "--set", "PARALLEL=fsdp")
    alike(ended(place, "moved"), ended(place, "peace"))


KILL_RANK_1 = """
from pathlib import Path
children = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
rank = lambda pid: b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(bytes(1))
os.kill(next(int(c) for c in children if rank(c)), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_rank_that_dies(place):
    "The others stop with one sentence, the last checkpoint is whole, and the trial of the search can be gone on with."
    # Rank 0 kills rank 1, another child of the same parent, when the first checkpoint is there.
    (place / "kill.py").write_text(KILL_RANK_1)
    hook = at_file(
        place,
        "/trial_0/model_*.safetensors",
        f"exec(open({str(place / 'kill.py')!r}).read(), dict(os=os, signal=signal))",
    )
    search = ["--study_name", "dies", *STILL[1:], "--n_trials", "1", "--nproc_per_node", "2"]
    p = start(place, *search, "--set", "EPOCHS=500", "--set", "TRAINING.VALIDATION_FREQ=100", **hook)
    folder = place / "checkpoints" / "dies" / "trial_0"
    out, err = p.communicate(timeout=MINUTES)
    assert p.returncode == 2 and "Traceback" not in err and "another process has stopped" in err, (
        p.returncode,
        out,
        err,
    )
    assert (
        load_file(max(folder.glob("model_*.safetensors")))
        and torch.load(max(folder.glob("training_*.pt")), weights_only=True)["step"] > 0
    )
    assert states(place, "dies") == ["RUNNING"]


@pytest.mark.slow
def test_bad_input(place):
    "One sentence each."
    assert "BATCH_SIZE 4 cannot be shared by 5 processes" in go(place, "many", 5, code=2)
    assert "PARALLEL" in go(place, "odd", 2, "--set", "PARALLEL=horovod", code=2)
    assert not (place / "checkpoints").exists()


@pytest.mark.slow
def test_ranks_with_other_settings(place):
    "torchrun on two machines with different files is refused, naming the key and both values."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    study = [sys.executable, "-m", "diffx2ct.study", "--config", "tiny.yml", "--study_name", "other", *STILL]
    one = dict(WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run = lambda r: start_cmd([*study, "--set", f"TRAINING.LEARNING_RATE=0.00{r + 1}"], place, RANK=str(r), **one)
    for p in [run(0), run(1)]:
        out, err = p.communicate(timeout=MINUTES)
        assert (
            p.returncode == 2
            and "process 1 has TRAINING.LEARNING_RATE = 0.002, process 0 has 0.001" in err
            and "Traceback" not in err
        ), (out, err)


@pytest.fixture
def database() -> str:
    "URL of a PostgreSQL server of our own, on a socket in a scratch folder."
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("no PostgreSQL server (Debian: apt-get install postgresql)")
    with postgres() as (url, _):
        yield url


def share_a_study(tmp_path: Path, storage: str):
    """Two machines (here two folders) work on one study: every trial is done once, and each folder holds
    its own."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tiny.yml").write_text(TINY)

    def met(name: str) -> dict[str, str]:
        "Each waits at its first checkpoint for the first trial of the other: neither can do everything alone."
        other = str(tmp_path / ("b" if name == "a" else "a") / "checkpoints" / "shared" / "trial_*")
        wait = f"import glob, time; [time.sleep(0.1) for _ in range(10 * {MINUTES}) if not glob.glob({other!r})]"
        return at_file(tmp_path, "/shared/trial_*/model_*.safetensors", wait)

    sets = (f"OPTUNA.STORAGE={storage}", "EPOCHS=4", "DEVICES=cpu")
    search = ["--study_name", "shared", "--n_trials", "6", *(x for s in sets for x in ("--set", s))]
    run = lambda name: start(tmp_path / name, *search, **met(name))
    for p in [run("a"), run("b")]:
        out, err = p.communicate(timeout=MINUTES)
        assert p.returncode == 0 and "Traceback" not in err and "best trial" in out, (out, err)
    there = {
        name: {
            f.name
            for f in (tmp_path / name / "checkpoints" / "shared").glob("trial_*")
            if (f / "best.safetensors").exists()
        }
        for name in ("a", "b")
    }
    assert (
        there["a"] | there["b"] == {f"trial_{k}" for k in range(6)}
        and not there["a"] & there["b"]
        and all(there.values())
    ), there
    assert not list(tmp_path.glob("*/*.db"))


@pytest.mark.slow
def test_two_machines_share_a_study_in_postgresql(tmp_path, database):
    share_a_study(tmp_path, database)


@pytest.mark.slow
def test_two_machines_share_a_study_in_a_journal(tmp_path):
    share_a_study(tmp_path, f"journal:{tmp_path}/study.log")
