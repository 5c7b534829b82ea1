"The search, resuming, killing, W&B and looking at the result, with the real commands at 16^3."

import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
import SimpleITK as sitk
from conftest import ROOT, run_cmd, start_cmd
from PIL import Image
from safetensors import safe_open

from diffx2ct.phantom import phantom
from diffx2ct.volumes import save_nifti

optuna.logging.set_verbosity(optuna.logging.ERROR)
TINY = """
EPOCHS: 6
VALIDATION_SPLIT: 0.34
DATA: {TARGET_VOLUME_SIZE: 16, TARGET_DRR_SIZE: 16, PHANTOMS: 6}
MODEL:
  EMA_DECAY: 0.8
  UNET: {NUM_CHANNELS: [16, 24], ATTENTION_LEVELS: [false, true], CROSS_ATTENTION_LEVELS: [false, true]}
  CONDITIONING_ENCODER: {NUM_CHANNELS: 16}
TRAINING: {PATCH_SIZE: 16, LOSS_PHASE_EPOCHS: [2, 1], AMP: "off", WARMUP_STEPS: 2}
OPTUNA:
  N_TRIALS: 2
  PRUNER: none
  RETRAIN_FACTOR: 1.5
  PARAMS:
    TRAINING.LEARNING_RATE: {low: 0.0003, high: 0.003, log: true}
    TRAINING.ENCODER: {choices: [resnet, convnext]}
"""


def go(cwd: Path, *args, command="diffx2ct_train", code=0, **env) -> str:
    "Run a command that must end with `code`; return its stdout, or stderr where it failed."
    p = run_cmd([command, *args], cwd=cwd, **env)
    assert p.returncode == code and "Traceback" not in p.stderr, (p.returncode, p.stdout, p.stderr)
    return p.stderr if code else p.stdout


def train(cwd: Path, *args, **how) -> str:
    return go(cwd, "--config", "tiny.yml", *args, **how)


def start(cwd: Path, *args, **env: str) -> subprocess.Popen:
    "Start training in a separate process group, as a terminal does."
    return start_cmd(["diffx2ct_train", "--config", "tiny.yml", *args], cwd, **env)


HOOK = """
import fnmatch, os, signal
real, done = os.replace, []

def replace(old, new, **how):
    real(old, new, **how)
    if not done and fnmatch.fnmatch(str(new), {pattern!r}):
        done.append(new)
        {act}

os.replace = replace
"""
MINUTES = 600  # s: no test waits longer for a process, and none needs it


def at_file(folder: Path, pattern: str, act: str) -> dict[str, str]:
    """Variables with which a command acts as soon as it has put a file of that pattern into its place, however busy
    we are."""
    hook = folder / f"hook{len(list(folder.glob('hook*')))}"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK.format(pattern=f"*{pattern}", act=act))
    return {"PYTHONPATH": str(hook)}


def signal_at_file(folder: Path, pattern: str, number: int) -> dict[str, str]:
    "Variables with which a command's process group gets a signal at that moment, as from a terminal."
    return at_file(folder, pattern, f"os.killpg(os.getpgrp(), {int(number)})")


def trials(cwd: Path, name: str) -> list:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{cwd}/{name}.db").trials


def states(cwd: Path, name: str) -> list[str]:
    return [t.state.name for t in trials(cwd, name)]


def tensors(folder: Path) -> dict:
    """Tensor -> hash, of the best model in a finished trial's folder, and its history: losses, norms, thresholds,
    values."""
    with safe_open(folder / "best.safetensors", "np") as f:
        out = {k: hashlib.sha256(f.get_tensor(k).tobytes()).hexdigest() for k in f.keys()}
    history = json.loads((folder / "history.json").read_text())
    assert history["losses"] and history["norms"] and history["values"]
    return out | history


def good_picture(path: Path, least=(300, 200)):
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width >= least[0] and image.height >= least[1], (path, image.size)
        assert np.asarray(image.convert("L")).std() > 5, path


def good_volume(path: Path, mm: float) -> np.ndarray:
    "A volume as SimpleITK reads it: patient axes right, centred, HU."
    image = sitk.ReadImage(str(path))
    assert image.GetSpacing() == pytest.approx((mm,) * 3)
    assert image.GetDirection() == pytest.approx((1, 0, 0, 0, 1, 0, 0, 0, -1))  # slices run from head to feet
    assert image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]) == pytest.approx(
        (0, 0, 0), abs=1e-3
    )
    hu = sitk.GetArrayFromImage(image)
    assert -1100 < hu.min() < -800 and 0 < hu.max() < 1600
    return hu


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    "Make the files that the scripts need, in a folder with a space in its name."
    root = tmp_path_factory.mktemp("home").resolve() / "a project"
    for name in ("docker", "diffx2ct"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_training.sh", "run_visualize.sh", "requirements.txt", "pyproject.toml", "config.yml"):
        shutil.copy(ROOT / name, root)
    (root / "tiny.yml").write_text(TINY)
    return root


def script(root: Path, name: str, *args, **how) -> str:
    "A script of the project, called from elsewhere."
    return go(root.parent, *args, command=root / name, DIFFX2CT_PYTHON=sys.executable, PYTHONPATH=str(root), **how)


@pytest.fixture(scope="module")
def searched(project) -> tuple[Path, str]:
    "A search of two trials from nothing."
    assert not (project / "data").exists()
    return project, script(project, "run_training.sh", "--config", "tiny.yml", "--study_name", "s")


@pytest.fixture
def here(tmp_path, searched) -> Path:
    "A working folder with the settings and, to be quick, the phantoms that the search has made."
    (tmp_path / "tiny.yml").write_text(TINY)
    shutil.copytree(searched[0] / "data", tmp_path / "data")
    return tmp_path


@pytest.mark.slow
def test_a_search_from_nothing(searched):
    root, said = searched
    best = max(trials(root, "s"), key=lambda t: t.value)
    assert (
        states(root, "s") == ["COMPLETE"] * 2
        and len({t.params["TRAINING.LEARNING_RATE"] for t in trials(root, "s")}) == 2
    )
    assert (
        "data: 4 training and 2 validation cases at 16^3" in said
        and f"best trial {best.number}: {best.value:.2f} dB" in said
    )
    assert (
        f"TRAINING.LEARNING_RATE = {best.params['TRAINING.LEARNING_RATE']:.4g}" in said
        and "TRAINING.ENCODER = " in said
    )
    for words in ("mean training volume ", "consistent mean ", f"this model {best.value:.2f} dB"):
        assert words in said
    for n in range(2):
        names = {p.name for p in (root / f"checkpoints/s/trial_{n}").iterdir()}
        assert names >= {"best.safetensors", "history.json", "gradients.png", "checksums.sha256"}
        assert not [name for name in names if name.startswith(("model_", "training_"))]  # nothing to resume
        link = root / f"checkpoints/trial_{n}"
        assert (
            link.is_symlink()
            and link.resolve() == root / f"checkpoints/s/trial_{n}"
            and not os.readlink(link).startswith("/")
        )
    assert os.readlink(root / "checkpoints/best") == f"s/trial_{best.number}"
    pictures = list((root / f"checkpoints/trial_{best.number}/visualizations").glob("*_mpr.png"))
    assert len(pictures) == 2 and not (root / "wandb").exists()
    for path in pictures:
        good_picture(path)
    for name in ("validation", "history", "importances"):
        good_picture(root / f"checkpoints/s/{name}.png")


@pytest.mark.slow
def test_the_same_command_resumes_and_more_trials_add_to_it(searched):
    root, before = searched[0], tensors(searched[0] / "checkpoints/s/trial_0")
    made = {p: p.stat().st_mtime_ns for p in root.rglob("*.safetensors")}
    said = train(root, "--study_name", "s")
    assert (
        "resuming study s: 2 of 2 trials there" in said
        and "raise --n_trials" in said
        and states(root, "s") == ["COMPLETE"] * 2
    )
    assert made == {p: p.stat().st_mtime_ns for p in root.rglob("*.safetensors")}
    assert "resuming study s: 2 of 3 trials there" in train(root, "--study_name", "s", "--n_trials", "3")
    assert states(root, "s") == ["COMPLETE"] * 3 and tensors(root / "checkpoints/s/trial_0") == before


@pytest.mark.slow
def test_retrain_best(searched):
    root = searched[0]
    said = train(root, "--study_name", "s", "--retrain_best", "--n_trials", "2")
    assert "best validation PSNR" in said and "pictures: checkpoints/s/best/visualizations" in said
    assert (root / "checkpoints/s/best/model_000018.safetensors").exists()  # 1.5 times 6 epochs of 2 steps
    trial, again = (max(t.value for t in trials(root, "s")), float(re.search(r"PSNR (\S+) dB", said)[1]))
    leads = Path(os.readlink(root / "checkpoints/best"))
    assert leads.parent.name == "s" and leads.name.startswith("trial_" if trial > again + 0.01 else "best")
    assert ("checkpoints/best leads there" in said) == (leads.name != "best")


def links(root: Path) -> dict[str, str]:
    return {p.name: os.readlink(p) for p in (root / "checkpoints").iterdir() if p.is_symlink()}


@pytest.mark.slow
def test_links_are_of_one_study_and_best_always_leads_to_its_best(searched):
    root, before = searched[0], links(searched[0])
    assert {Path(target).parts[0] for target in before.values()} == {"s"} and len(before) == 4  # three trials and best
    train(root, "--no_search", "--study_name", "once", "--set", "EPOCHS=1")
    assert links(root) == {"single": "once/single", "best": "once/single"}
    pruned = ["--study_name", "none", "--n_trials", "1", "--set", "TRAINING.LEARNING_RATE=1e30"]
    assert "no trial completed" in train(root, *pruned, "--set", "OPTUNA.PARAMS={}")
    assert links(root) == {"trial_0": "none/trial_0"}  # no best there
    said = train(root, "--study_name", "s")
    assert links(root) == before and "best trial" in said
    go(root, "--checkpoint_dir", "checkpoints/best", "--samples", "0", command="diffx2ct_visualize")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sets, words",
    [
        (["EPOCHS=7"], "EPOCHS=6, not 7"),
        (["MODEL.EMA_DECAY=0.9"], "MODEL.EMA_DECAY=0.8, not 0.9"),
        (["MODEL.UNET.NUM_CHANNELS=[8, 8]"], "MODEL.UNET.NUM_CHANNELS=[16, 24], not [8, 8]"),
        (["DATA.PHANTOMS=7"], "DATA.PHANTOMS=6, not 7"),
        (["DATA.GEOMETRY=x2ct"], "geometry of DATA.DRR_DIR=parallel"),
        (["SEED=1"], "SEED=0, not 1"),
        (["VALIDATION_SPLIT=0.5"], "VALIDATION_SPLIT=0.34, not 0.5"),
        (["BATCH_SIZE=4"], "BATCH_SIZE times TRAINING.GRADIENT_ACCUMULATION_STEPS=2, not 4"),
        (["TRAINING.LOSS_PHASE_EPOCHS=[3, 1]"], "TRAINING.LOSS_PHASE_EPOCHS=[2, 1], not [3, 1]"),
        (["OPTUNA.PARAMS={TRAINING.LEARNING_RATE: {low: 0.0003, high: 0.003}}"], "with log: true"),
        (["OPTUNA.PARAMS={TRAINING.ENCODER: {choices: [resnet]}}"], "choices"),
        (["OPTUNA.PARAMS={TRAINING.LEARNING_RATE: {choices: [0.001]}}"], "a range of real numbers"),
    ],
)
def test_a_study_goes_on_only_with_what_its_trials_were_made_with(searched, sets, words):
    root, n = searched[0], len(trials(searched[0], "s"))
    more = [x for item in sets for x in ("--set", item)]
    said = train(root, "--study_name", "s", "--n_trials", "9", *more, code=2)
    assert words in said and "study s" in said and "another --study_name" in said, said
    assert said.count("diffx2ct:") == 1 and "Traceback" not in said  # next to a bar where phantoms are made
    assert len(trials(root, "s")) == n and states(root, "s") == ["COMPLETE"] * n


@pytest.mark.slow
def test_a_study_goes_on_where_only_paths_machines_and_sampling_differ(searched):
    root = searched[0]
    moved = root / "moved"
    shutil.copytree(next((root / "data").glob("phantoms_16*parallel*")), moved)
    (moved / "volumes/phantom0006.pt").unlink(missing_ok=True)  # a refused command may have made a seventh
    shutil.rmtree(moved / "drrs/phantom0006", ignore_errors=True)
    said = train(root, "--study_name", "s", *sum((["--set", s] for s in ("DIFFUSION.STEPS=3", "NUM_WORKERS=1")), []))
    assert "best trial" in said
    own = ["DATA.PT_DATA_DIR=moved/volumes", "DATA.DRR_DIR=moved/drrs"]
    assert "best trial" in train(root, "--study_name", "s", *sum((["--set", s] for s in own), []))


@pytest.mark.slow
def test_nothing_is_on_stderr_but_progress_bars(here):
    "W&B as a user has it who has never logged in, or a key in the netrc file: no warning of a library."
    env = dict.fromkeys(("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "PYTHONWARNINGS")) | {"HOME": str(here / "home")}
    (here / "home").mkdir()
    args = ["--config", "tiny.yml", "--study_name", "loud", "--n_trials", "1", "--set", "EPOCHS=2"]
    for command in (
        ["diffx2ct_train", *args],
        ["diffx2ct_train", *args, "--retrain_best"],
        ["diffx2ct_visualize", "--checkpoint_dir", "checkpoints/best", "--samples", "2"],
    ):
        p = run_cmd(command, cwd=here, **env)
        assert p.returncode == 0, p.stderr
        lines = [line for line in re.split(r"[\r\n]+", p.stderr) if line.strip()]
        assert not [line for line in lines if not re.match(r"[\w ,]+: +\d+%\|", line)], p.stderr
        assert "\x1b" not in p.stdout + p.stderr and "arning" not in p.stdout
    assert len(list(here.glob("wandb/offline-run-*"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "lines, found", [("", False), ("machine elsewhere.org login a password b\n", False), (None, True)]
)
def test_a_login_of_wandb_is_found_without_a_word(tmp_path, lines, found):
    code = (
        "from diffx2ct.reporting import has_wandb_login; import wandb; print(wandb.setup().settings.base_url, "
        "has_wandb_login())"
    )
    env = {"HOME": str(tmp_path), "WANDB_API_KEY": None, "WANDB_MODE": None, "NETRC": None}
    if lines is None:
        lines = "machine api.example.org\n  login user\n  password 0123456789012345678901234567890123456789\n"
        env["WANDB_BASE_URL"] = "https://api.example.org"
    (tmp_path / ".netrc").write_text(lines)
    (tmp_path / ".netrc").chmod(0o600)
    p = run_cmd([sys.executable, "-c", code], cwd=tmp_path, **env)
    assert p.returncode == 0 and p.stderr == "" and p.stdout.split()[-1] == str(found), (p.stdout, p.stderr)
    env["WANDB_API_KEY"] = "0123456789012345678901234567890123456789"
    assert run_cmd([sys.executable, "-c", code], cwd=tmp_path, **env).stdout.split()[-1] == "True"


@pytest.mark.slow
def test_kill_9_in_mid_trial_leaves_no_trace(here, searched):
    hook = at_file(here, "/trial_0/model_*", "os.kill(os.getpid(), signal.SIGKILL)")
    p = start(here, "--study_name", "s", "--n_trials", "1", **hook)
    p.communicate(timeout=MINUTES)
    (killed,) = trials(here, "s")
    assert p.returncode == -signal.SIGKILL and killed.state.name == "RUNNING"
    assert not list(here.glob("checkpoints/s/trial_0/model_000012*"))  # it had not finished
    said = train(here, "--study_name", "s", "--n_trials", "1")
    assert "1 of 1 trials there, 1 of them unfinished" in said and "trial 0: going on from step" in said
    (again,) = trials(here, "s")
    reference = trials(searched[0], "s")[0]
    assert (
        again.state.name == "COMPLETE"
        and again.params == killed.params == reference.params
        and again.value == reference.value
    )
    assert tensors(here / "checkpoints/s/trial_0") == tensors(searched[0] / "checkpoints/s/trial_0")
    assert not list(here.rglob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_and_goes_on(here, searched, number):
    how = [
        "--study_name",
        "s",
        "--n_trials",
        "1",
        "--set",
        "TRAINING.CHECKPOINT_FREQ=6",
        *(["--set", "NUM_WORKERS=2"] if number == signal.SIGINT else []),
    ]
    # After the second epoch; no checkpoint is due before the last. Ctrl-C reaches the reading processes as well.
    p = start(here, *how, **signal_at_file(here, "/trial_0/best.safetensors", number))
    said = p.communicate(timeout=MINUTES)[1]
    assert (
        p.returncode == 130
        and "Traceback" not in said
        and said.splitlines()[-1] == "diffx2ct: stopped; the same command goes on from here"
    ), said
    assert list(here.glob("checkpoints/s/trial_0/model_*")) and states(here, "s") == ["RUNNING"]
    assert "going on from step" in train(here, *how) and states(here, "s") == ["COMPLETE"]
    assert tensors(here / "checkpoints/s/trial_0") == tensors(
        searched[0] / "checkpoints/s/trial_0"
    )  # whoever reads the crops


@pytest.mark.slow
def test_two_processes_share_a_study(here):
    both = [start(here, "--study_name", "s", "--n_trials", "3", "--set", "EPOCHS=3") for _ in range(2)]
    said = [p.communicate(timeout=MINUTES) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert states(here, "s") == ["COMPLETE"] * 3
    begun = [
        line.split("trial ")[1].split(":")[0]
        for _, err in said
        for line in err.replace("\r", "\n").splitlines()
        if "trial " in line and " 0/6 " in line
    ]
    assert (
        sorted(set(begun)) == ["0", "1", "2"]
        and len({t.params["TRAINING.LEARNING_RATE"] for t in trials(here, "s")}) == 3
    )
    assert all(not ({f"trial {n}:" in err for _, err in said} == {True}) for n in range(3))  # each by one of them


@pytest.mark.slow
def test_a_trial_that_diverges_is_pruned_and_the_search_goes_on(here):
    said = train(
        here,
        "--study_name",
        "wild",
        "--n_trials",
        "3",
        "--set",
        "EPOCHS=1",
        "--set",
        "OPTUNA.PARAMS={TRAINING.LEARNING_RATE: {choices: [0.001, 1.0e+30]}}",
        "--set",
        "TRAINING.LEARNING_RATE=1.0e+30",
        "--set",
        "SEED=1",
    )
    found = trials(here, "wild")
    pruned = [t for t in found if t.params["TRAINING.LEARNING_RATE"] == "1e+30"]
    assert len(found) == 3 and len(pruned) < 3 and found[0] in pruned, [
        t.params for t in found
    ]  # the first one diverges
    for t in found:
        assert t.state.name == ("PRUNED" if t in pruned else "COMPLETE")
        assert (t.value is None and "nan" in t.user_attrs["pruned"]) if t in pruned else np.isfinite(t.value)
    assert f"{len(pruned)} pruned" in said and "best trial" in said
    with sqlite3.connect(here / "wild.db") as db:
        assert all(np.isfinite(v) for (v,) in db.execute("select value from trial_values"))


@pytest.mark.slow
def test_weights_that_are_lost_in_the_last_step_are_seen(here):
    said = train(
        here,
        "--study_name",
        "wild",
        "--n_trials",
        "1",
        "--set",
        "EPOCHS=1",
        "--set",
        "BATCH_SIZE=4",
        "--set",
        "TRAINING.LEARNING_RATE=1e30",
        "--set",
        "OPTUNA.PARAMS={}",
    )
    assert "no trial completed" in said and trials(here, "wild")[0].user_attrs["pruned"] == "the validation PSNR is nan"
    assert "diverged" in train(
        here, "--no_search", "--study_name", "once", "--set", "TRAINING.LEARNING_RATE=1e30", code=2
    )


def records(path: Path) -> list:
    "Read the records of a W&B run file: blocks of 32 KiB hold records (checksum, length, kind) of protocol buffers."
    from wandb.proto import wandb_internal_pb2 as pb

    raw, at, part, found = path.read_bytes(), 7, b"", []
    while at + 7 < len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        part += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(pb.Record.FromString(part))
            part = b""
    return found


def rows_of(path: Path) -> list[dict]:
    "The logged rows; nested keys with a dot."
    return [
        {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
        for r in records(path)
        if r.WhichOneof("record_type") == "history"
    ]


@pytest.mark.slow
def test_cone_beams_small_patches_and_wandb_offline_without_a_key(tmp_path):
    (tmp_path / "tiny.yml").write_text(TINY)
    sets = [
        "EPOCHS=2",
        "DATA.GEOMETRY=x2ct",
        "TRAINING.PATCH_SIZE=8",
        "TRAINING.FLIP_AXES=[H]",
        "TRAINING.GRADIENT_ACCUMULATION_STEPS=2",
        "DIFFUSION.STEPS=2",
        "PROJECT_NAME=mine",
    ]
    none = dict.fromkeys(("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"))
    said = train(
        tmp_path,
        "--no_search",
        "--study_name",
        "cone",
        *(x for s in sets for x in ("--set", s)),
        HOME=str(tmp_path / "home"),
        **none,
    )
    assert "cone beams" in said and "best validation PSNR" in said and not (tmp_path / "cone.db").exists()
    (run,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    *rows, end = rows_of(run)
    assert end["_step"] == 3 and "val/cases._type" in end
    assert run.name.startswith("run-cone-single-single-") and b"mine" in run.read_bytes()
    assert (
        [r["_step"] for r in rows] == [1, 2]
        and all(np.isfinite(r["train/loss"]) and r["train/grad_norm"] > 0 for r in rows)
        and rows[-1]["val/MPR._type"] == "images/separated"
    )
    assert f"this model {rows[-1]['val/psnr']:.2f} dB" in said
    drawn = list(run.parent.glob("files/media/images/**/*.png"))
    assert len(drawn) == 2
    for picture in drawn:
        good_picture(picture)
    shutil.rmtree(tmp_path / "wandb")
    go(
        tmp_path,
        "--checkpoint_dir",
        "checkpoints/cone/single",
        "--samples",
        "2",
        "--out",
        "seen",
        command="diffx2ct_visualize",
        WANDB_MODE="disabled",
    )
    good_volume(tmp_path / "seen/generated.nii.gz", 20.0)
    coverage = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "seen/coverage.nii.gz")))
    assert set(np.unique(coverage)) == {0, 1, 2} and not (tmp_path / "wandb").exists()  # a cone misses corners


@pytest.mark.slow
def test_run_visualize_writes_beside_the_checkpoint(searched):
    root = searched[0]
    said = script(root, "run_visualize.sh", "--checkpoint_dir", "checkpoints/trial_0")
    out = root / "checkpoints/s/trial_0/visualizations"
    assert {p.name for p in out.iterdir()} >= {
        "generated.nii.gz",
        "truth.nii.gz",
        "difference.nii.gz",
        "coverage.nii.gz",
        "spread.nii.gz",
        *(f"sample_{k}.nii.gz" for k in (1, 2, 3, 4)),
        "mpr.png",
        "report.png",
        "metrics.json",
    }
    good_picture(out / "mpr.png", (400, 300))
    good_picture(out / "report.png", (900, 600))
    generated, truth = (good_volume(out / f"{n}.nii.gz", 20.0) for n in ("generated", "truth"))
    metrics = json.loads((out / "metrics.json").read_text())
    mse = ((generated - truth.astype(float)) ** 2).mean()
    assert generated.shape == (16, 16, 16) and metrics["protocol"] == "unit"
    assert (
        metrics["psnr"] == pytest.approx(10 * np.log10(2524**2 / mse), abs=0.01)
        and f"psnr {metrics['psnr']:.4g}" in said
    )
    first = hashlib.sha256((out / "generated.nii.gz").read_bytes()).digest()
    script(root, "run_visualize.sh", "--checkpoint_dir", "checkpoints/trial_0", "--samples", "0")
    assert hashlib.sha256((out / "generated.nii.gz").read_bytes()).digest() == first
    assert {p.name.split(".")[0] for p in out.glob("*.nii.gz")} == {
        "generated",
        "truth",
        "difference",
        "coverage",
        "path_density",
    }  # nothing of the run before


@pytest.mark.slow
def test_own_scans_from_file_to_picture(tmp_path):
    for i in range(6):
        save_nifti(phantom(i, 32, 10.0)[0], 10.0, tmp_path / f"scans/p{i}.nii.gz")
    go(tmp_path, "scans", "--out", "mine", "--size", "16", "--centre", "volume", command="diffx2ct_prepare")
    (tmp_path / "tiny.yml").write_text(TINY)
    said = train(
        tmp_path,
        "--no_search",
        "--study_name",
        "own",
        "--set",
        "EPOCHS=2",
        "--set",
        "DATA.PT_DATA_DIR=mine/volumes",
        "--set",
        "DATA.DRR_DIR=mine/drrs",
        "--set",
        "DATA.VALIDATION_CASES=[p1, p4]",
    )
    assert (
        "4 training and 2 validation cases at 16^3, 20 mm, parallel beams\n" in said
        and not (tmp_path / "data").exists()
    )
    assert sorted(p.name for p in (tmp_path / "checkpoints/own/single/visualizations").iterdir()) == [
        "p1_mpr.png",
        "p4_mpr.png",
    ]
    go(
        tmp_path,
        "--checkpoint_dir",
        "checkpoints/own/single",
        "--case",
        "p4",
        "--samples",
        "2",
        command="diffx2ct_visualize",
    )
    truth = good_volume(tmp_path / "checkpoints/own/single/visualizations/truth.nii.gz", 20.0)
    scan = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "scans/p4.nii.gz"))).astype(float)
    assert (
        np.corrcoef(truth.ravel(), scan.clip(-1024, 1500).reshape(16, 2, 16, 2, 16, 2).mean((1, 3, 5)).ravel())[0, 1]
        > 0.95
    )  # not mirrored, not turned


@pytest.mark.slow
def test_real_chests_from_file_to_picture(tmp_path, ct_dir):
    go(
        tmp_path,
        ct_dir / "lidc_idri_0001.nii.gz",
        ct_dir / "lung_dx_a0001_dicom",
        "--out",
        "chests",
        "--size",
        "32",
        "--keep_names",
        command="diffx2ct_prepare",
    )
    (tmp_path / "tiny.yml").write_text(TINY.replace("SIZE: 16", "SIZE: 32"))
    sets = [
        "EPOCHS=2",
        "DATA.PT_DATA_DIR=chests/volumes",
        "DATA.DRR_DIR=chests/drrs",
        "DATA.VALIDATION_CASES=[lung_dx_a0001_dicom]",
    ]
    said = train(tmp_path, "--no_search", "--study_name", "real", *(x for s in sets for x in ("--set", s)))
    assert "1 training and 1 validation cases at 32^3, 10 mm" in said
    go(tmp_path, "--checkpoint_dir", "checkpoints/real/single", "--samples", "2", command="diffx2ct_visualize")
    out = tmp_path / "checkpoints/real/single/visualizations"
    generated, truth = (good_volume(out / f"{n}.nii.gz", 10.0) for n in ("generated", "truth"))
    assert (
        json.loads((out / "metrics.json").read_text())["psnr"] > 12
        and np.corrcoef(generated.ravel(), truth.ravel())[0, 1] > 0.7
    )
