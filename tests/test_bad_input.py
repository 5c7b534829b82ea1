"Everything a user can get wrong, through the real commands: exit code 2, one sentence, nothing written."

import hashlib
import json
import os
import pickle
import shutil
import sqlite3
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import BIN, run_cmd
from safetensors.torch import save_file

from diffx2ct.basics import save_tensor
from diffx2ct.data import save_case, write_manifest

TINY = """
EPOCHS: 1
DATA: {TARGET_VOLUME_SIZE: 16, TARGET_DRR_SIZE: 16, PT_DATA_DIR: volumes, DRR_DIR: drrs}
MODEL:
  UNET: {NUM_CHANNELS: [8, 16], ATTENTION_LEVELS: [false, true], CROSS_ATTENTION_LEVELS: [false, true]}
  CONDITIONING_ENCODER: {NUM_CHANNELS: 8}
TRAINING: {PATCH_SIZE: 16}
"""
TRAIN, ALONE, LOOK = (
    ["diffx2ct_train", "--config", "tiny.yml"],
    ["diffx2ct_train", "--config", "tiny.yml", "--no_search", "--study_name", "s"],
    ["diffx2ct_visualize", "--checkpoint_dir", "checkpoints/s/single"],
)
CASE, MODEL = "volumes/p2.pt", "checkpoints/s/single/best.safetensors"


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def sets(*items):
    return [x for item in items for x in ("--set", item)]


def tensor(path, value):
    return lambda here: save_tensor(value, here / path)


def text(path, words):
    return lambda here: (here / path).write_text(words)


def cut(path, share=0.5):
    return lambda here: (here / path).write_bytes(
        (here / path).read_bytes()[: int((here / path).stat().st_size * share)]
    )


def gone(path):
    return lambda here: shutil.rmtree(here / path) if (here / path).is_dir() else (here / path).unlink()


def empty(path):
    return lambda here: [p.unlink() for p in (here / path).glob("*.*")]


def code(path):
    return lambda here: (here / path).write_bytes(pickle.dumps(Evil(), protocol=2))


def believed(change):
    return lambda here: (
        change(here),
        (here / MODEL).with_name("checksums.sha256").unlink(),
    )  # as after a copy without checksums


def foreign_db(here):
    sqlite3.connect(here / "s.db").executescript(
        "create table recipes (id int); insert into recipes values (1)"
    ).connection.close()


def manifest(**change):
    return lambda here: (here / "drrs/manifest.json").write_text(
        json.dumps(json.loads((here / "drrs/manifest.json").read_text()) | change)
    )


def nothing(here):
    pass


def nan():
    v = torch.rand(16, 16, 16)
    v[3, 4, 5] = torch.nan
    return v


# name: (what is done to a folder with good data and a good checkpoint, the command, words of the sentence)
BAD = {
    "data folder missing": (gone("volumes"), TRAIN, "DATA.PT_DATA_DIR volumes is not a folder"),
    "data folder empty": (empty("volumes"), TRAIN, "DATA.PT_DATA_DIR volumes holds no .pt file"),
    "one view missing": (gone("drrs/p2/LAT.pt"), TRAIN, "drrs/p2/LAT.pt does not exist"),
    "volume truncated": (cut(CASE), TRAIN, "volumes/p2.pt cannot be read: it is truncated"),
    "volume is a pickle with code": (
        code(CASE),
        TRAIN,
        "volumes/p2.pt cannot be read: it holds more than a tensor, perhaps code",
    ),
    "volume is a zip with code": (
        lambda here: torch.save(Evil(), here / CASE),
        ALONE,
        "volumes/p2.pt cannot be read: it holds more than a tensor, perhaps code",
    ),
    "wrong rank": (tensor(CASE, torch.rand(16, 16)), TRAIN, "volumes/p2.pt has shape (16, 16); 3 axes"),
    "NaN inside": (tensor(CASE, nan()), TRAIN, "volumes/p2.pt holds NaN"),
    "another size": (tensor(CASE, torch.rand(8, 8, 8)), TRAIN, "DATA.TARGET_VOLUME_SIZE"),
    "Hounsfield units": (tensor(CASE, torch.rand(16, 16, 16) * 900), TRAIN, "not in [0, 1]"),
    "manifest of another size": (manifest(size=32), TRAIN, "DATA.TARGET_VOLUME_SIZE=32"),
    "unknown validation case": (nothing, [*TRAIN, *sets("DATA.VALIDATION_CASES=[p9]")], "'p9'"),
    "settings with a tab": (
        text("tiny.yml", "EPOCHS: 1\nDATA:\n\tPHANTOMS: 2\n"),
        TRAIN,
        "tiny.yml is not valid YAML at line 3, column 1: found character a tab",
    ),
    "unknown key": (text("tiny.yml", "TRAINING: {LERNING_RATE: 1}"), TRAIN, "TRAINING.LERNING_RATE is not a known key"),
    "key spelt almost right": (nothing, [*TRAIN, *sets("EPOCH=1")], "EPOCH is not a known key; did you mean EPOCHS?"),
    "key of another section": (
        text("tiny.yml", "DATA: {LEARNING_RATE: 1}"),
        TRAIN,
        "DATA.LEARNING_RATE is not a known key; did you mean TRAINING.LEARNING_RATE?",
    ),
    "no trials": (nothing, [*TRAIN, "--n_trials", "0"], "--n_trials is 0; give 1 or more"),
    "no processes": (nothing, [*TRAIN, "--nproc_per_node", "0"], "--nproc_per_node is 0; give 1 or more"),
    "unknown key explained": (
        nothing,
        [*TRAIN, "--explain", "LERNING_RATE"],
        "--explain LERNING_RATE: there is no such key; the nearest is TRAINING.LEARNING_RATE",
    ),
    "text for a number": (nothing, [*TRAIN, *sets("EPOCHS=many")], "EPOCHS is 'many'"),
    "patch larger than volume": (
        nothing,
        [*TRAIN, *sets("TRAINING.PATCH_SIZE=32")],
        "TRAINING.PATCH_SIZE (32) is larger than DATA.TARGET_VOLUME_SIZE (16)",
    ),
    "ratios all zero": (
        nothing,
        [*TRAIN, *sets("TRAINING.LOSS_WEIGHTS={L1: 0, SSIM: 0, FOURIER: 0, PROJECTION: 0}")],
        "TRAINING.LOSS_WEIGHTS are all zero",
    ),
    "range upside down": (
        nothing,
        [*TRAIN, *sets("OPTUNA.PARAMS={TRAINING.LEARNING_RATE: {low: 1, high: 0.1}}")],
        "low 1 is above high 0.1",
    ),
    "choice the key cannot take": (
        nothing,
        [*TRAIN, *sets("OPTUNA.PARAMS={TRAINING.PATCH_SIZE: {choices: [8, 32]}}")],
        "OPTUNA.PARAMS.TRAINING.PATCH_SIZE = 32",
    ),
    "profile unknown": (nothing, [*TRAIN, "--profile", "giant"], "no profile 'giant'"),
    "set without a value": (nothing, [*TRAIN, *sets("EPOCHS")], "write KEY=VALUE"),
    "geometry inside the patient": (
        nothing,
        [*TRAIN, *sets("DATA.GEOMETRY={KIND: cone, SAD_MM: 100}", "DATA.PT_DATA_DIR=null", "DATA.DRR_DIR=null")],
        "SAD_MM",
    ),
    "study name with a slash": (nothing, [*TRAIN, "--study_name", "a/b"], "study name 'a/b'"),
    "study is junk": (
        text("s.db", "not a database at all" * 100),
        [*TRAIN, "--study_name", "s"],
        "s.db is not an SQLite database",
    ),
    "study is another database": (
        foreign_db,
        [*TRAIN, "--study_name", "s"],
        "s.db is a database but not an Optuna study",
    ),
    "storage without a server": (nothing, [*TRAIN, *sets("OPTUNA.STORAGE=nonsense://x")], "OPTUNA.STORAGE"),
    "best of no study": (nothing, [*TRAIN, "--study_name", "fresh", "--retrain_best"], "there is no study fresh"),
    "devices that are not there": (
        nothing,
        [*TRAIN, *sets("DEVICES=[cuda:0, cuda:98, cuda:99]")],
        "DEVICES lists cuda:0, cuda:98, cuda:99",
    ),
    "W&B mode unknown": (nothing, ["env", "WANDB_MODE=on", *TRAIN], "WANDB_MODE is 'on'"),
    "checkpoints is a file": (
        lambda here: (gone("checkpoints")(here), text("checkpoints", "x")(here)),
        ALONE,
        "checkpoints/s/single cannot be written",
    ),
    "another model size": (nothing, [*ALONE, *sets("EPOCHS=2", "MODEL.UNET.NUM_CHANNELS=[16, 16]")], "another size"),
    "another batch": (
        nothing,
        [*ALONE, *sets("BATCH_SIZE=4", "EPOCHS=2")],
        "BATCH_SIZE times TRAINING.GRADIENT_ACCUMULATION_STEPS=2, not 4; set it back",
    ),
    "another rate": (
        nothing,
        [*ALONE, *sets("TRAINING.LEARNING_RATE=0.1")],
        "checkpoints/s/single was trained with TRAINING.LEARNING_RATE=0.004, not 0.1",
    ),
    "a case more": (
        lambda here: (
            shutil.copytree(here / "drrs/p2", here / "drrs/p9"),
            shutil.copy(here / CASE, here / "volumes/p9.pt"),
        ),
        ALONE,
        "which are not the present ones",
    ),
    "a study of a name that links have": (nothing, [*TRAIN, "--study_name", "trial_0"], "choose another --study_name"),
    "training state damaged": (
        cut("checkpoints/s/single/training_000002.pt"),
        ALONE,
        "training_000002.pt is damaged: it does not agree with checksums.sha256",
    ),
    "training state with code": (
        believed(code("checkpoints/s/single/training_000002.pt")),
        ALONE,
        "training_000002.pt cannot be read",
    ),
    "no checkpoint": (
        nothing,
        ["diffx2ct_visualize", "--checkpoint_dir", "nowhere"],
        "checkpoint folder nowhere does not exist",
    ),
    "checkpoint empty": (empty("checkpoints/s/single"), LOOK, "holds no model"),
    "checkpoint of another program": (
        believed(lambda here: save_file({"w": torch.ones(2)}, here / MODEL)),
        LOOK,
        "best.safetensors is a safetensors file of another program",
    ),
    "checkpoint damaged": (cut(MODEL), [*LOOK[:-1], MODEL], "best.safetensors is damaged"),
    "checkpoint with code": (believed(code(MODEL)), LOOK, "best.safetensors is damaged"),
    "case unknown": (nothing, [*LOOK, "--case", "nobody"], "nobody"),
    "data has moved away": (gone("volumes"), LOOK, "DATA.PT_DATA_DIR"),
    "view with code": (
        code("drrs/p0/LAT.pt"),
        [*LOOK, "--ap", "drrs/p0/AP.pt", "--lat", "drrs/p0/LAT.pt"],
        "drrs/p0/LAT.pt cannot be read",
    ),
}


def contents(here: Path) -> dict:
    "Path -> hash, or target of a link."
    return {
        str(p.relative_to(here)): os.readlink(p) if p.is_symlink() else hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(here.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    "Four prepared cases and a model trained on them."
    here, rng = tmp_path_factory.mktemp("good"), torch.Generator().manual_seed(0)
    for i in range(4):
        save_case(
            f"p{i}",
            torch.rand(16, 16, 16, generator=rng),
            320 * torch.rand(2, 16, 16, generator=rng),
            here / "volumes",
            here / "drrs",
        )
    write_manifest(
        here / "drrs",
        dict(kind="parallel", sad_mm=541, sdd_mm=949, panel_mm=500),
        16,
        20.0,
        16,
        (-1024, 1500),
        {f"p{i}": {} for i in range(4)},
    )
    (here / "tiny.yml").write_text(TINY)
    p = run_cmd(ALONE, cwd=here)
    assert p.returncode == 0 and (here / "checkpoints/s/single/model_000002.safetensors").exists(), p.stderr
    return here


@pytest.fixture(scope="module")
def answers(good, tmp_path_factory, request) -> dict[str, Future]:
    "The commands of the table are started at once, as many together as there are cores."

    def one(name):
        here = tmp_path_factory.mktemp("bad", numbered=True) / "work"
        shutil.copytree(good, here, symlinks=True)
        BAD[name][0](here)
        before = contents(here)
        p = run_cmd(BAD[name][1], cwd=here)
        return p, before, contents(here), sorted(str(x.relative_to(here)) for x in here.rglob("*") if x.is_dir())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            name: pool.submit(one, name)
            for name in BAD
            if any(i.name.endswith(f"[{name}]") for i in request.session.items)
        }


QUICK = {"volume is a zip with code", "checkpoint of another program"}  # each command takes 5 s to load its packages


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BAD])
def test_is_refused_in_one_sentence(answers, name):
    p, before, after, folders = answers[name].result()
    assert p.returncode == 2 and "Traceback" not in p.stdout + p.stderr, (p.returncode, p.stdout, p.stderr)
    assert p.stderr.startswith("diffx2ct: ") and p.stderr.count("\n") == 1 and BAD[name][2] in p.stderr, p.stderr
    assert after == before and "pwned" not in folders and "wandb" not in folders


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint_whole(good, tmp_path):
    here = tmp_path / "work"
    shutil.copytree(good, here, symlinks=True)
    pair = sorted(here.glob("checkpoints/s/single/*_000002.*"))  # model and training state
    for limit, unchanged in (
        (20, contents(here)),
        (
            min(p.stat().st_size for p in pair) // 1024 - 8,
            {str(p.relative_to(here)): contents(here)[str(p.relative_to(here))] for p in pair},
        ),
    ):
        p = run_cmd(
            ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "-", BIN / ALONE[0], *ALONE[1:], *sets("EPOCHS=2")],
            cwd=here,
        )  # no file may exceed `limit` KB: nearly a full disk
        assert p.returncode == 2 and "Traceback" not in p.stderr, (p.returncode, p.stderr)
        assert (
            p.stderr.splitlines()[-1].startswith("diffx2ct: checkpoints/s/single/")
            and "could not be saved (File too large" in p.stderr
        )
        assert contents(here) | unchanged == contents(here) and {
            x.name for x in here.glob("checkpoints/s/single/*")
        } == {x.name for x in good.glob("checkpoints/s/single/*")}
    assert run_cmd([*LOOK, "--samples", "0"], cwd=here).returncode == 0
    p = run_cmd([*ALONE, *sets("EPOCHS=2")], cwd=here)  # once there is room
    assert p.returncode == 0 and "going on from step 2 of 4" in p.stdout
