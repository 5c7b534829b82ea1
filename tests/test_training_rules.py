"Rules of the training loop and of the search by numbers, in one process, on networks of a few hundred weights."

import math
import os
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from torch import nn

import diffx2ct.checkpoint as checkpoint
import diffx2ct.resume as resume
import diffx2ct.study as study_of
import diffx2ct.train as train
from diffx2ct.batches import BatchPlan, Crops, batch_plan, downsampled
from diffx2ct.cases import open_data
from diffx2ct.config import load_config
from diffx2ct.diffusion import Diffusion
from diffx2ct.metrics import psnr

optuna.logging.set_verbosity(optuna.logging.ERROR)
TINY = [
    "DATA.TARGET_VOLUME_SIZE=16",
    "DATA.TARGET_DRR_SIZE=16",
    "DATA.PHANTOMS=6",
    "VALIDATION_SPLIT=0.34",
    "MODEL.UNET.NUM_CHANNELS=[8, 16]",
    "MODEL.UNET.ATTENTION_LEVELS=[false, true]",
    "MODEL.UNET.CROSS_ATTENTION_LEVELS=[false, true]",
    "MODEL.CONDITIONING_ENCODER.NUM_CHANNELS=8",
    "TRAINING.PATCH_SIZE=16",
    "TRAINING.AMP=off",
    "TRAINING.AUGMENT.SHARE=0",
    "DEVICES=cpu",
]


def config(*sets: str):
    return load_config(sets=[*TINY, *sets])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rules")


@pytest.fixture(autouse=True)
def there(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture
def data(there):
    return open_data(config())


class Fit(nn.Module):
    "A stand-in for `Loss`: three weights, the mean squared distance to the rows of a micro-batch."

    def __init__(self, slope=1.0):
        super().__init__()
        self.w, self.slope = nn.Parameter(torch.zeros(3)), slope

    def forward(self, item, weights):
        return {"L2": self.slope * (self.w - item[2]).square().sum(1).mean()}


def one_step(loss: nn.Module, batches: list, *sets: str, norms: list | None = None, lr=0.25):
    "One plain gradient step on micro-batches of rows; what it logged, and the optimizer."
    c = config(f"TRAINING.GRADIENT_ACCUMULATION_STEPS={len(batches)}", "TRAINING.LOSS_PHASE_EPOCHS=[9, 0]", *sets)
    items = [(BatchPlan(tuple(range(len(rows))), (0, 0, 0), 0), None, rows, None, None) for rows in batches]
    optimizer = torch.optim.SGD(loss.parameters(), lr, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return train.train_step(loss, c, items, 0, optimizer, scaler, [] if norms is None else norms), optimizer


FREE = ["TRAINING.CLIPPING=fixed", "MAX_GRAD_NORM=1e9"]


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_a_batch_in_pieces_is_the_same_step(pieces):
    rows, loss = torch.tensor([[1.0, 2, 3], [3, 2, 1], [5, 5, 5], [-1, 0, 1]]), Fit()
    log, _ = one_step(loss, list(rows.chunk(pieces)), *FREE)
    gradient = -2 * rows.mean(0)
    assert torch.allclose(loss.w, -0.25 * gradient) and log["grad_norm"] == pytest.approx(gradient.norm().item())
    assert log["loss"] == log["L2"] == pytest.approx(rows.square().sum(1).mean().item())


@pytest.mark.parametrize(
    "sets, norms, threshold",
    [
        (["TRAINING.CLIPPING=fixed", "MAX_GRAD_NORM=0.5"], [7.0] * 50, 0.5),
        (["MAX_GRAD_NORM=0.7"], [7.0] * 9, 0.7),  # not enough history
        (["TRAINING.CLIP_PERCENTILE=90"], [float(n) / 100 for n in range(300)], 2.891),
        (["TRAINING.CLIP_PERCENTILE=25"], [float(n) / 100 for n in range(300)], 2.2475),
        (["TRAINING.CLIP_HISTORY=11", "TRAINING.CLIP_PERCENTILE=50"], [float(n) / 100 for n in range(300)], 2.94),
        (["TRAINING.CLIP_PERCENTILE=100"], [9.0] + [2.0] * 100, 2.0),  # the old spike is forgotten
    ],
)
def test_a_gradient_is_cut_to_the_threshold_of_the_steps_before(sets, norms, threshold):
    rows, loss, before = torch.full((2, 3), 50.0), Fit(), list(norms)
    log, _ = one_step(loss, [rows], *sets, norms=norms)
    whole = 100 * math.sqrt(3)
    assert log["threshold"] == pytest.approx(threshold) and log["grad_norm"] == pytest.approx(whole)
    assert loss.w.norm().item() == pytest.approx(0.25 * threshold, rel=1e-4)
    assert norms[:-1] == before and norms[-1] == pytest.approx(whole)  # the norm before it was cut


def test_a_small_gradient_is_left_as_it_is():
    loss = Fit()
    one_step(loss, [torch.full((1, 3), 0.1)], norms=[5.0] * 20)
    assert torch.allclose(loss.w, torch.full((3,), 0.25 * 0.2))


class Root(Fit):
    "A finite loss with an infinite gradient."

    def forward(self, item, weights):
        return {"L2": self.w.sqrt().sum()}


@pytest.mark.parametrize("loss, why", [(Root(), "gradient norm is inf"), (Fit(math.nan), "L2 loss is nan")])
def test_what_is_not_finite_never_reaches_the_weights(loss, why):
    norms = [1.0] * 20
    with pytest.raises(resume.Diverged, match=why):
        one_step(loss, [torch.ones(2, 3)], norms=norms)
    assert torch.equal(loss.w, torch.zeros(3)) and norms == [1.0] * 20


def test_a_step_left_out_changes_neither_weights_nor_averages(data):
    c = config("TRAINING.BAD_STEPS=1")
    r = train.start_training(c, data, Path("bad_step"))
    r.loss = Root()
    weights = [p.clone() for p in (*r.denoiser.parameters(), *r.ema.parameters())]
    item = (BatchPlan((0,), (0, 0, 0), 0), None, torch.ones(1, 3), None, None)
    assert train.run_step(r, c, [item], 0, "x") == {"bad_steps": 1}
    assert all(torch.equal(p, q) for p, q in zip(weights, (*r.denoiser.parameters(), *r.ema.parameters())))
    assert int(r.average.n_averaged) == 0 and r.history["bad"] == [0] and not r.history["losses"]
    with pytest.raises(resume.Diverged):
        train.run_step(r, c, [item], 0, "x")


def an_item(c, data, planted=None):
    d = batch_plan(c, len(data.train), 0)[0]
    _, _, truth, views, _ = Crops(data.train, [d], c, True, data.mm)[0]
    return d, None, truth, views, planted


def test_a_planted_voxel_counts_as_the_settings_say_and_any_other_once(data, monkeypatch):
    c, got = config("TRAINING.AUGMENT.NODULE_WEIGHT=60"), []
    real = train.loss_terms
    monkeypatch.setattr(train, "loss_terms", lambda *a: (got.append(a[-1]), real(*a))[1])
    loss = train.Loss(resume.prepare_run(c, data), c)
    planted = torch.zeros(2, 1, 16, 16, 16)
    planted[0, 0, 3, 4, 5], planted[1, 0, 8, 8, 8] = 1.0, 0.5
    terms = loss(an_item(c, data, planted), {"L2": 1.0})
    assert got[0][0, 0, 3, 4, 5] == 60 and got[0][1, 0, 8, 8, 8] == 30.5 and (got[0] == 1).sum() == 2 * 16**3 - 2
    plain = loss(an_item(c, data), {"L2": 1.0})
    assert got[1] == 1.0 and terms["L2"] != plain["L2"]


@pytest.mark.parametrize("share, least, most", [(1.0, 40, 40), (0.0, 0, 0), (0.75, 22, 38)])
def test_the_share_of_cases_at_full_noise(share, least, most, data, monkeypatch):
    c, times, real = config(f"TRAINING.FULL_NOISE_RATIO={share}"), [], Diffusion.add_noise
    monkeypatch.setattr(
        Diffusion, "add_noise", lambda self, x, e, t: (times.extend(t.tolist()), real(self, x, e, t))[1]
    )
    loss = train.Loss(resume.prepare_run(c, data), c)
    _, *rest = an_item(c, data)
    with torch.no_grad():
        for seed in range(20):
            loss((BatchPlan((0, 1), (0, 0, 0), seed), *rest), {"L2": 1.0})
    assert least <= sum(t == 1 for t in times) <= most and len(times) == 40
    assert all(0 <= t <= 1 for t in times) and len(set(times)) == 1 + sum(t != 1 for t in times) - (not least)


def test_the_means_of_the_training_cases_are_taken_away(data):
    net, given = resume.prepare_run(config(), data), []
    views = torch.stack([data.train[i].views for i in range(len(data.train))])
    volumes = torch.stack([data.train[i].volume for i in range(len(data.train))])
    assert torch.allclose(net.usual, views.mean(0), atol=1e-3) and net.usual.abs().mean() > 1
    assert torch.allclose(net.mean, volumes.mean(0)[None], atol=1e-5) and (net.scales > 0).all()
    net.encoder.register_forward_hook(lambda module, inputs, output: given.append(inputs[0].clone()))
    for v in (net.usual[None], 2 * net.usual[None]):
        net.encode(v)
    assert not given[0].any() and given[1].any()  # the mean view is what an encoder sees as nothing


@pytest.mark.parametrize("warmup", [0, 3])
def test_every_step_has_the_learning_rate_of_the_schedule(warmup, data, monkeypatch):
    c = config("EPOCHS=4", f"TRAINING.WARMUP_STEPS={warmup}", "TRAINING.LEARNING_RATE=0.002")
    rates = []

    def noted(r, *rest):
        of_groups = {group["lr"] for group in r.optimizer.param_groups}  # one rate for matrices and the rest
        assert len(r.optimizer.param_groups) == 2 and len(of_groups) == 1
        rates.extend(of_groups)
        return {}

    monkeypatch.setattr(train, "run_step", noted)
    monkeypatch.setattr(train, "validate", lambda *a: 20.0)
    monkeypatch.setattr(train, "plot_norms", lambda *a: None)
    train.train_stage(c, data, Path(f"rates_{warmup}"), {})
    cosine = [0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * k / (8 - warmup))) for k in range(8 - warmup)]
    want = [0.002 * f for f in [(k + 1) / 3 for k in range(warmup)] + cosine]
    assert rates == pytest.approx(want) and len(set(rates)) >= 7


def test_only_a_better_network_becomes_the_best_one(data, monkeypatch):
    values, kept = [20.0, 25.0, 22.0, 25.0, 26.0], []
    monkeypatch.setattr(train, "save_model", lambda path, *rest: kept.append((path.name, r.history["best"])))
    r = train.start_training(config(), data, Path("best_of"))
    for epoch, value in enumerate(values, 1):
        monkeypatch.setattr(train, "validate", lambda *a, value=value: value)
        assert train.validate_and_keep_best(r, config(), data, Path("best_of"), epoch, {}) == value
    assert kept == [("best.safetensors", v) for v in (20.0, 25.0, 26.0)]
    assert r.history["values"] == [[e, v] for e, v in enumerate(values, 1)] and r.history["best"] == 26.0
    monkeypatch.setattr(train, "validate", lambda *a: math.nan)
    with pytest.raises(resume.Diverged, match="validation PSNR is nan"):
        train.validate_and_keep_best(r, config(), data, Path("best_of"), 6, {})


def test_the_validation_value_is_the_mean_over_all_held_out_cases(data, monkeypatch):
    monkeypatch.setattr(train, "reconstruct", lambda ema, views, *rest, **more: views.new_full((1, 16, 16, 16), 0.25))
    cases = [data.valid[i] for i in range(len(data.valid))]
    want = [psnr(torch.full((1, 16, 16, 16), 0.25), case.volume) for case in cases]
    assert train.validate(nn.Identity(), data, config()) == pytest.approx(np.mean(want)) and want[0] != want[1]


def searched(monkeypatch, data, pruner: str, reports: list[list[float]]) -> optuna.Study:
    "A study whose trials report what they are given and end with the last of it."
    c, name = config(f"OPTUNA.PRUNER={pruner}", "OPTUNA.STARTUP_TRIALS=1"), f"study_{pruner}"
    study = study_of.open_study(name, c)

    def lead(c, data, folder, meta, report, *rest):
        for epoch, value in enumerate(reports[meta["trial"]], 1):
            report(value, epoch)
        return reports[meta["trial"]][-1]

    monkeypatch.setattr(study_of, "train_as_rank_zero", lead)
    for number in range(len(reports)):
        folder = Path("checkpoints", name, f"trial_{number}")
        folder.mkdir(parents=True)
        study_of.run_trial(study, study.ask(), c, data, folder)
    return study


REPORTS = [[20.0, 24.0, 25.0], [21.0, 26.0, 27.0], [20.5, 10.0, 30.0], [19.0, 18.0]]


def test_the_median_pruner_ends_a_trial_that_lags(data, monkeypatch):
    study = searched(monkeypatch, data, "median", REPORTS)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "PRUNED", "PRUNED"]
    assert [sorted(t.intermediate_values) for t in study.trials] == [[1, 2, 3], [1, 2, 3], [1, 2], [1]]
    assert study.trials[2].user_attrs["pruned"] == "10.00 dB after epoch 2, stopped by OPTUNA.PRUNER=median"


def test_without_a_pruner_every_trial_ends(data, monkeypatch):
    study = searched(monkeypatch, data, "none", REPORTS)
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 4
    assert study_of.best_trial(study).number == study.best_trial.number == 2  # 30 dB is the best


def test_a_study_looks_for_the_highest_value():
    kinds = {"median": optuna.pruners.MedianPruner, "hyperband": optuna.pruners.HyperbandPruner}
    for pruner in ("median", "hyperband", "none"):
        study = study_of.open_study(f"way_{pruner}", config(f"OPTUNA.PRUNER={pruner}"))
        assert study.direction == optuna.study.StudyDirection.MAXIMIZE
        assert isinstance(study.pruner, kinds.get(pruner, optuna.pruners.NopPruner))


def test_the_training_state_is_written_before_the_model(data, monkeypatch):
    "The training state is written before its model file, so a kill between the two leaves the earlier pair."
    c, folder, real = config(), Path("pairs"), checkpoint.write_with_checksum
    r, names = train.start_training(c, data, folder), []
    monkeypatch.setattr(
        checkpoint, "write_with_checksum", lambda path, write: (names.append(path.name), real(path, write))[1]
    )
    r.step = 1
    resume.write_checkpoint(r, c, folder, 1, {})
    assert names == ["training_000001.pt", "model_000001.safetensors"]

    def killed(path, write):
        if path.suffix == ".safetensors":
            raise KeyboardInterrupt
        return real(path, write)

    monkeypatch.setattr(checkpoint, "write_with_checksum", killed)
    r.step = 2
    with pytest.raises(KeyboardInterrupt):
        resume.write_checkpoint(r, c, folder, 2, {})
    assert checkpoint.newest_model(folder).name == "model_000001.safetensors"
    assert train.start_training(c, data, folder).step == 1
    assert not os.path.exists(folder / "model_000002.safetensors")


def test_the_memory_of_the_average_grows_up_to_its_decay():
    for steps, kept in ((0, 0.1), (8, 0.5), (10_000, 0.9)):
        ema, now = [torch.ones(3)], [torch.zeros(3)]
        resume.ema_average(0.9)(ema, now, torch.tensor(steps))
        assert torch.allclose(ema[0], torch.full((3,), kept)), steps


def test_the_average_follows_each_step(data, monkeypatch):
    r = train.start_training(config(), data, Path("averaged"))
    monkeypatch.setattr(train, "train_step", lambda *a: dict(loss=1.0, threshold=1.0))
    first, moved = next(r.average.module.parameters()), next(r.denoiser.parameters())
    for _ in range(2):  # the first step of an average is a copy
        moved.data += 1
        before = first.detach().clone()
        train.run_step(r, config(), [], 0, "")
        assert not torch.equal(first, before)


def test_every_epoch_has_an_order_of_its_own():
    c = config("BATCH_SIZE=2", "TRAINING.GRADIENT_ACCUMULATION_STEPS=1")
    epochs = [sum((d.cases for s in range(3) for d in batch_plan(c, 6, 3 * e + s)), ()) for e in range(5)]
    assert all(sorted(order) == list(range(6)) for order in epochs) and len(set(epochs)) > 3


def test_a_crop_of_the_coarse_stage_is_a_crop_of_the_pooled_case(data):
    coarse = downsampled(data).train
    got, whole = coarse.part(0, (1, 2, 3), 4), coarse[0]
    assert torch.allclose(got.volume, whole.volume[:, 1:5, 2:6, 3:7], atol=1e-6)
    assert torch.allclose(got.views, whole.views)


def test_changed_volumes_have_views_of_their_own(data):
    net, c = resume.prepare_run(config(), data), config("TRAINING.AUGMENT.PHOTONS=0")
    stored, changed = data.train[0].views[None], data.train[1].volume[None]
    d = BatchPlan((0,), (0, 0, 0), 5)
    assert torch.allclose(train.render_views(net, stored, changed, d, [0], c), data.train[1].views[None], atol=0.5)
    assert torch.equal(train.render_views(net, stored, None, d, [0], c), stored)
