"""Values that a run logs to W&B, read back from the offline file, and those it must not log: keys, passwords, the
header of a DICOM file."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import BIN, run_cmd
from test_prepare import image, patient, write_dicom
from test_training import TINY, good_picture, records, rows_of

KEY, PASSWORD = "0123456789abcdef" * 2 + "01234567", "s3cret-Passw0rd"
HEADER = ("DOE^JANE", "JANE", "Jane", "MRN12345", "20010203", "1.2.826")
EPOCHS = 6

pytestmark = pytest.mark.slow


def runs(here: Path) -> list[Path]:
    return sorted(here.glob("wandb/offline-run-*/*.wandb"))


def leaks(here: Path, words: tuple[str, ...], but: tuple[Path, ...] = ()) -> list[tuple[Path, str]]:
    "Files, and names of files, that hold one of the words."
    files = [p for p in here.rglob("*") if p.is_file() and not any(p.is_relative_to(b) for b in but)]
    return [(p, w) for p in files for w in words if w.encode() in p.read_bytes() or w in str(p.relative_to(here))]


def variables(here: Path) -> dict:
    "W&B offline, everything it writes in one folder, and a key that must not be found again."
    (here / "home").mkdir(exist_ok=True)
    places = dict.fromkeys(
        (
            "WANDB_DIR",
            "WANDB_CACHE_DIR",
            "WANDB_DATA_DIR",
            "WANDB_CONFIG_DIR",
            "XDG_CACHE_HOME",
            "XDG_CONFIG_HOME",
            "XDG_DATA_HOME",
        )
    )
    return places | dict(HOME=str(here / "home"), WANDB_MODE="offline", WANDB_API_KEY=KEY)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    "Three DICOM patients, prepared, trained on (stopped by SIGTERM, killed, ended), and looked at."
    here = tmp_path_factory.mktemp("reporting")
    for n in range(3):
        write_dicom(
            image(patient() + n),
            here / ("scans/p1", "scans/p2", "scans/Doe, Jane")[n],
            uid=f"1.2.826.0.1.3680043.2.1125.{n + 10}",
        )
    (here / "tiny.yml").write_text(TINY)
    env, out = variables(here), []

    def go(*args):
        p = run_cmd(args, cwd=here, timeout=900, **env)
        assert p.returncode == 0, p.stderr
        out.append(p.stdout + p.stderr)

    go("diffx2ct_prepare", "scans", "--out", "mine", "--size", "16", "--mm", "20", "--pictures")
    sets = [
        "DATA.PT_DATA_DIR=mine/volumes",
        "DATA.DRR_DIR=mine/drrs",
        "DATA.CUBE_MM=320",
        f"EPOCHS={EPOCHS}",
        "TRAINING.COARSE_EPOCHS=[2]",
        "TRAINING.VISUALIZATION_FREQ=2",
        f"OPTUNA.STORAGE=postgresql://ann:{PASSWORD}@localhost/x",
    ]
    train = [
        "diffx2ct_train",
        "--config",
        "tiny.yml",
        "--study_name",
        "s",
        "--no_search",
        *(x for s in sets for x in ("--set", s)),
    ]
    for number, at in ((signal.SIGTERM, 4), (signal.SIGKILL, 6)):
        p = subprocess.Popen(
            [BIN / train[0], *train[1:]],
            cwd=here,
            env={k: v for k, v in (os.environ | env).items() if v is not None},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        logged, until = here / "checkpoints/s/single/logged", time.monotonic() + 600
        while not logged.exists() or logged.stat().st_size < at:
            assert p.poll() is None and time.monotonic() < until, p.communicate()
            time.sleep(0.02)
        p.send_signal(number)
        out.append(p.communicate()[0])
        assert p.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL), out[-1]
    go(*train)
    go("diffx2ct_visualize", "--checkpoint_dir", "checkpoints/s/single", "--samples", "2", "--cases", "1")
    go("diffx2ct_evaluate", "--checkpoint_dir", "checkpoints/s/single", "--methods", "mean", "expected")
    (here / "terminal.txt").write_text("".join(out), encoding="utf-8")
    return here


def test_every_step_is_told_once_across_a_stop_and_a_kill(here):
    """Two coarse steps, then one an epoch; what W&B has not yet written when it is killed with the run may be lost,
    nothing else."""
    files = [f for f in runs(here) if "single-single" in f.name]
    assert len(files) == 3 and len({f.name for f in files}) == 1  # the same run goes on
    *rows, end = [r for f in files for r in rows_of(f)]
    steps = [r["_step"] for r in rows]
    last_before_kill = rows_of(files[1])[-1]["_step"] if rows_of(files[1]) else rows_of(files[0])[-1]["_step"]
    total = max(steps)
    assert steps == sorted(set(steps))  # in order, none twice
    assert "val/cases._type" in end and end["_step"] == total + 1
    missing = set(range(1, total + 1)) - set(steps)
    assert missing <= {last_before_kill + 1, last_before_kill + 2}, missing
    for r in rows:
        before = "coarse/" if r["_step"] <= 2 else ""
        assert {
            before + k
            for k in (
                *(f"train/{k}" for k in ("loss", "grad_norm", "threshold", "lr", "voxels_per_second")),
                "epoch",
                "memory/process",
            )
        } <= r.keys()
        assert any(f"{before}train/{k}" in r for k in ("L1", "L2"))


def test_pictures_of_the_same_cases_a_table_and_the_model(here):
    files = [f for f in runs(here) if "single-single" in f.name]
    rows, found = [r for f in files for r in rows_of(f)], [x for f in files for x in records(f)]
    drawn = [r["val/MPR.captions"] for r in rows if "val/MPR.captions" in r]
    assert len(drawn) >= 2 and all(names == drawn[0] for names in drawn)  # one key, the same cases
    for picture in files[0].parents[1].glob("*/files/media/images/val/MPR*.png"):
        good_picture(picture)
    assert rows[-1]["val/cases._type"] == "table-file"
    (path,) = files[-1].parent.glob("files/media/table/val/cases*.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["case", "psnr of consistent_mean", "psnr", "ssim", "mae_hu", "mae_hu_body"]
    case, *figures = table["data"][0]
    assert len(table["data"]) == 1 and drawn[0] == [case] and all(f > 0 for f in figures)
    (model,) = [x.artifact for x in found if x.WhichOneof("record_type") == "artifact" and x.artifact.type == "model"]
    (entry,) = model.manifest.contents
    assert entry.ref == (here / "checkpoints/s/single/best.safetensors").as_uri() and json.loads(model.metadata)[
        "metrics"
    ]["psnr"] == pytest.approx(table["data"][0][2], abs=0.01)
    (run,) = [x.run for x in records(files[-1]) if x.WhichOneof("record_type") == "run"][:1]
    settings = {c.key: json.loads(c.value_json) for c in run.config.update}
    assert (run.run_group, run.job_type, settings["EPOCHS"], settings["OPTUNA"]["STORAGE"]) == (
        "s",
        "single",
        EPOCHS,
        "postgresql://***localhost/x",
    )
    assert settings["git_commit"].startswith("version ") or len(settings["git_commit"].split("-")[0]) == 40


def test_an_evaluation_is_a_job_of_the_study_and_the_way_to_send_runs_is_said(here):
    said = (here / "terminal.txt").read_text(encoding="utf-8")
    assert said.count("W&B is offline: runs are kept in wandb; to send them: wandb sync wandb/offline-run-*") == 5
    (file,) = (f for f in runs(here) if "-evaluate" in f.name)
    (run,) = [x.run for x in records(file) if x.WhichOneof("record_type") == "run"][:1]
    (row,) = rows_of(file)
    assert (run.run_group, run.job_type) == ("s", "evaluate") and row["val/expected/psnr"] > 0


def test_no_key_and_no_password_in_anything_that_was_written(here):
    assert leaks(here, (KEY, PASSWORD)) == []
    assert len([p for p in here.rglob("*") if p.is_file()]) > 60 and list(
        here.glob("home/**/*.log")
    )  # W&B's own logs are among them


def test_nothing_of_the_dicom_header_in_anything_that_was_written(here):
    assert leaks(here, HEADER, but=(here / "scans",)) == []
