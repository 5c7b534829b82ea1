"The model of the package: a stand-in of 16^3 voxels takes its place, and the real one is looked at where it is there."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_cmd

from diffx2ct import checkpoint
from diffx2ct.basics import UserError
from diffx2ct.calibrate import Calibrator, CalibratorConfig, save_calibrator
from diffx2ct.checkpoint import describe, load_model, model_file, save_model, save_shipped
from diffx2ct.commands import QUICK_MODEL, SHIPPED_MODELS
from diffx2ct.config import load_config
from diffx2ct.diffusion import build_denoiser
from diffx2ct.drr import geometry

sys.path.insert(0, str(ROOT / "benchmarks"))
TINY = ["DATA.TARGET_VOLUME_SIZE=16", "DATA.TARGET_DRR_SIZE=16", "TRAINING.PATCH_SIZE=16", "MODEL.SCALE=0.25"]
REAL = ROOT / "diffx2ct" / "weights"


def stand_in(folder: Path, *sets: str) -> Path:
    "A trained-looking checkpoint folder."
    c = load_config(sets=[*TINY, "DATA.PT_DATA_DIR=/somebody/volumes", "DATA.DRR_DIR=/somebody/drrs", *sets])
    torch.manual_seed(0)
    net = build_denoiser(c, geometry("parallel", 320), 20.0)
    net.mean.fill_(0.3)
    net.scales.fill_(0.05)
    cases = dict(train=["a", "b"], valid=["c"])
    save_model(folder / "best.safetensors", net, describe(net, c, step=7, cases=cases))
    save_calibrator(Calibrator((8, 8)), folder / "calibrator.safetensors", net.A, CalibratorConfig(CHANNELS=[8, 8]))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    "A folder of models as the package has one, with `chest` in it."
    top = tmp_path_factory.mktemp("weights")
    save_shipped(stand_in(top / "source"), top / "shipped" / "chest")
    return top / "shipped"


def test_the_shipped_form_names_no_folder_and_loses_next_to_nothing(weights):
    text = (weights / "chest" / "best.safetensors").read_bytes()
    assert b"/somebody" not in text and b'"train": [' in text.replace(b'\\"', b'"')
    there, here = (load_model(p) for p in (weights.parent / "source", weights / "chest"))
    assert here.calibrator is not None and here.meta["cases"] == there.meta["cases"]
    assert here.config.DATA.PT_DATA_DIR is None
    for (k, a), b in zip(there.denoiser.state_dict().items(), here.denoiser.state_dict().values()):
        assert b.dtype == a.dtype and torch.allclose(a, b, rtol=1e-3, atol=1e-4), k
    assert set(p.name for p in (weights / "chest").iterdir()) == {
        "best.safetensors",
        "calibrator.safetensors",
        "checksums.sha256",
    }


def test_a_byte_of_a_shipped_file_that_differs_is_noticed(weights, tmp_path):
    for name in ("best.safetensors", "calibrator.safetensors"):
        copy = tmp_path / name
        copy.mkdir()
        for p in (weights / "chest").iterdir():
            (copy / p.name).write_bytes(p.read_bytes())
        data = bytearray((copy / name).read_bytes())
        data[-5] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(UserError, match="damaged"):
            load_model(copy)


def test_a_folder_of_the_name_goes_first_and_that_is_said(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFX2CT_WEIGHTS", str(weights))
    monkeypatch.chdir(tmp_path)
    assert model_file("chest") == weights / "chest" / "best.safetensors" and capsys.readouterr().err == ""
    own = stand_in(tmp_path / "chest")
    assert model_file("chest").resolve() == (own / "best.safetensors").resolve()
    assert f"using the folder {own}" in capsys.readouterr().err


@pytest.mark.slow
def test_absent_it_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFX2CT_WEIGHTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="the model chest is not part of this installation"):
        model_file("chest")
    for name in ("diffx2ct_visualize", "diffx2ct_app"):
        p = run_cmd(
            [name, *(["--port", "18866"] if name.endswith("app") else [])], cwd=tmp_path, DIFFX2CT_WEIGHTS=str(tmp_path)
        )
        assert p.returncode == 2 and len(p.stderr.strip().splitlines()) == 1, p.stderr


@pytest.mark.slow
def test_the_commands_use_it(weights, tmp_path):
    """Without --checkpoint_dir: pictures of a phantom, a CT of two stored views, and a training that begins with its
    weights."""
    env = dict(DIFFX2CT_WEIGHTS=str(weights))
    p = run_cmd(["diffx2ct_visualize", "--samples", "2", "--steps", "1"], cwd=tmp_path, **env)
    assert p.returncode == 0, p.stderr
    assert "phantom_9000, expected: visualizations/mpr.png" in p.stdout
    assert (tmp_path / "visualizations" / "report.png").is_file()
    for name in ("AP", "LAT"):
        torch.save(150 + 50 * torch.rand(16, 16), tmp_path / f"{name}.pt")
    p = run_cmd(["diffx2ct_reconstruct", "AP.pt", "LAT.pt", "--out", "ct.nii.gz"], cwd=tmp_path, **env)
    assert p.returncode == 0 and (tmp_path / "ct.nii.gz").is_file(), p.stderr
    sets = [
        a
        for s in (*TINY, "DATA.PHANTOMS=4", "TRAINING.START_FROM=chest", "EPOCHS=1", "TRAINING.COARSE_EPOCHS=[]")
        for a in ("--set", s)
    ]
    before = sorted(p.name for p in (weights / "chest").iterdir())
    p = run_cmd(["diffx2ct_uncertainty", "--checkpoint_dir", "chest"], cwd=tmp_path, **env)
    assert p.returncode == 2 and p.stderr.count("\n") == 1, p.stderr
    assert "--checkpoint_dir chest is a model of the package" in p.stderr and "--out" in p.stderr
    assert sorted(p.name for p in (weights / "chest").iterdir()) == before
    p = run_cmd(["diffx2ct_train", "--explain", "model"], cwd=tmp_path, **env)
    assert p.returncode == 0 and "has no MODEL_CARD.md; its header has" in p.stdout, p.stderr
    p = run_cmd(["diffx2ct_train", "--explain", "model"], cwd=tmp_path, **env | {"DIFFX2CT_WEIGHTS": str(tmp_path)})
    assert p.returncode == 2 and "the model chest is not part of this installation" in p.stderr, p.stderr
    train = ["diffx2ct_train", "--no_search", "--study_name"]
    p = run_cmd([*train, "large", *sets, "--set", "MODEL.SCALE=0.5"], cwd=tmp_path, **env)
    assert p.returncode == 2 and "another size" in p.stderr and "TRAINING.START_FROM" in p.stderr, p.stderr
    p = run_cmd([*train, "same", *sets], cwd=tmp_path, **env)
    assert p.returncode == 0, p.stderr


def test_the_package_loads_nothing_until_a_verb_is_used():
    code = "import sys, diffx2ct as dx; assert not {'torch', 'numpy', 'pydantic'} & {*sys.modules}; print(*dx.VERBS)"
    p = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert p.returncode == 0 and {"load", "read_films", "card"} <= set(p.stdout.split()), p.stderr


def test_every_verb_is_there_and_says_what_it_takes():
    import inspect

    import diffx2ct as dx
    import diffx2ct.phantom  # a chapter of the same name does not take the verb's place

    for name in dx.VERBS:
        verb = getattr(dx, name)
        assert callable(verb) and verb.__doc__, name
        if name not in ("CT",):
            source = inspect.getsource(verb)
            assert verb.__module__ == "diffx2ct.verbs" and source.count("  # ") >= 1, name
    assert diffx2ct.phantom is dx.phantom and dx.phantom(1).shape == (64, 64, 64)


def test_a_card_has_what_is_known_and_nothing_else(weights, tmp_path):
    from chest.card import card, read_json

    path = weights / "chest" / "best.safetensors"
    plain = card(path, [], {})
    assert "| training cases | 2 |" in plain and "| training steps | 7 |" in plain
    assert "## Measured" not in plain and "## Uncertainty" not in plain and "None" not in plain
    score = dict(
        settings=dict(
            checkpoint="chest",
            methods=["expected", "mean_of_k"],
            k=4,
            protocol="unit",
            consistency="on",
            seed=0,
            steps=8,
            data="test",
            trained_on=[],
        ),
        means=dict(
            expected=dict(psnr=[23.456, 22.0, 24.0], ssim=[None, None, None]), mean_of_k=dict(psnr=[22.0, 21, 23])
        ),
        cases=dict(a={}, b={}),
    )
    own = dict(
        title="Films", columns=["error", "cases"], rows={"with": dict(error="6.1 %", cases=None)}, command="x.py"
    )
    for name, what in (("score", score), ("own", own)):
        (tmp_path / f"{name}.json").write_text(json.dumps(what))
    text = dict(use="Teaching.", limits=["It invents."], licence=None)
    made = card(path, [tmp_path / "score.json", tmp_path / "own.json"], text)
    assert "| PSNR, dB | 23.5 [22.0, 24.0] | 22.0 [21.0, 23.0] |" in made and "SSIM" not in made
    assert "| | expected | mean of 4 |" in made and "| with | 6.1 % |" in made and "cases |\n|---|---|---|" not in made
    assert "## Use" in made and "## Licence" not in made and "- It invents." in made
    for wrong in ("TBD", "?", "<figure>"):
        with pytest.raises(UserError, match="placeholder"):
            card(path, [], dict(use=wrong))
    score["settings"]["trained_on"] = ["a"]
    (tmp_path / "score.json").write_text(json.dumps(score))
    with pytest.raises(UserError, match="trained on"):
        card(path, [tmp_path / "score.json"], {})
    (tmp_path / "score.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "score.json")


@pytest.fixture(params=SHIPPED_MODELS)
def real(request) -> Path:
    folder = REAL / request.param
    if not folder.is_dir():
        pytest.skip(f"the package holds no such model yet: diffx2ct/weights/{request.param} is not there")
    return folder


def test_the_real_models_are_whole_and_described(real):
    import diffx2ct as dx

    names = {p.name for p in real.iterdir()}
    assert {"best.safetensors", "doubt.json", "checksums.sha256", "MODEL_CARD.md"} <= names
    for name in ("best.safetensors", "doubt.json"):
        assert checkpoint.verify_checksum(real / name) is None
    model = dx.load(real)
    assert model.calibrator is not None and model.config.DATA.PT_DATA_DIR is None
    assert dx.card(real).startswith(f"# Model card: {real.name}")
    text = (real / "best.safetensors").read_bytes()[:200_000]
    assert b"/work" not in text and b"/home" not in text
    for words in ("/work", "/home"):
        assert words not in (real / "MODEL_CARD.md").read_text() + (real / "doubt.json").read_text()


def test_the_real_models_are_small_and_share_a_network():
    assert sum(p.stat().st_size for p in REAL.rglob("*") if p.is_file()) < 40_000_000
    if all((REAL / name).is_dir() for name in SHIPPED_MODELS):
        whole, quick = (load_model(REAL / name).denoiser for name in SHIPPED_MODELS)
        assert (whole.A.size, whole.coarse.A.size, quick.A.size) == (128, 64, 64)
        assert all(torch.equal(v, quick.state_dict()[k]) for k, v in whole.coarse.state_dict().items())


@pytest.mark.slow
def test_the_quick_model_beats_its_mean_patient():
    import diffx2ct as dx

    model = dx.load(REAL / QUICK_MODEL)
    truth = dx.phantom(9000, model)
    views = dx.render(truth, model)
    found, mean = (dx.score(dx.reconstruct(model, views, method=m), truth)["psnr"] for m in ("expected", "mean"))
    assert found > mean + 5
