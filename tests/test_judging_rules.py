"""Rules of reconstruction, of evaluation and of uncertainty, each by a small case worked out by hand; the models are
untrained."""

import json
import math
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from test_uncertainty import TINY

import diffx2ct.evaluate as evaluation
import diffx2ct.visualize as viewer
from diffx2ct.basics import UserError
from diffx2ct.checkpoint import describe, load_model, save_model, write_with_checksum
from diffx2ct.commands import SHARP_NOTE, visualize_options
from diffx2ct.config import load_config
from diffx2ct.data import Case, density, save_case, to_hu, to_unit, write_manifest
from diffx2ct.diffusion import build_denoiser
from diffx2ct.drr import geometry
from diffx2ct.evaluate import check_same_data, evaluate, mean_intervals, score_volume, trained_on
from diffx2ct.metrics import bootstrap, metrics
from diffx2ct.phantom import phantom
from diffx2ct.uncertainty import (
    CALIBRATION_FILE,
    CONFIDENCE_LEVELS,
    MIN_DEVIATION_HU,
    VOXEL_CLASSES,
    calibration_settings,
    conformal_factors,
    file_digest,
    gaussian_factors,
    half_width,
    load_calibration,
    ood_report,
    rotate_patient,
    score_limits,
    z_score,
)

# `diffx2ct.reconstruct` and `diffx2ct.uncertainty` are verbs
reconstruction, uncertainty = (sys.modules[f"diffx2ct.{name}"] for name in ("reconstruct", "uncertainty"))
WINDOW = (-1024.0, 1500.0)
HU = WINDOW[1] - WINDOW[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "An untrained checkpoint."
    c = load_config(sets=[*TINY, "DATA.AIR_THRESHOLD=-300"])
    net = build_denoiser(c, geometry("parallel", 320), 20.0)
    net.mean.copy_(to_unit(phantom(0, 16)[0], net.window)[None, None])
    folder = tmp_path_factory.mktemp("untrained")
    save_model(folder / "best.safetensors", net, describe(net, c, step=0))
    return load_model(folder)


@pytest.fixture(scope="module")
def case(model):
    volume = to_unit(phantom(1, 16)[0], WINDOW)[None]
    return Case("somebody", volume, model.denoiser.A(density(volume[None], WINDOW))[0])


@pytest.fixture(scope="module")
def prepared(model, tmp_path_factory):
    "A folder of two cases, as diffx2ct_prepare writes it."
    folder, A = tmp_path_factory.mktemp("prepared"), model.denoiser.A
    for k in (2, 3):
        volume = to_unit(phantom(k, 16)[0], WINDOW)
        views = A(density(volume[None, None], WINDOW))[0]
        save_case(f"new{k}", volume, views, folder / "volumes", folder / "drrs")
    write_manifest(folder / "drrs", asdict(A.geometry), 16, A.mm, 16, WINDOW, {"new2": {}, "new3": {}})
    return folder


# Reconstruction


def test_the_expected_volume_is_what_is_made_of_no_noise_at_full_noise(model, case, monkeypatch):
    seen = []
    monkeypatch.setattr(reconstruction, "consistent_denoiser", lambda *a: lambda x, t: (seen.append((x, t)), x)[1])
    reconstruction.reconstruct(model, case.views, "expected", seed=5)
    ((x, t),) = seen
    assert not x.any() and t == 1


def noises(model, case, monkeypatch, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    "Of three samples: the noise each begins with, and what its generator draws first."
    drawn = []

    def sampler(denoise, noise, times, diffusion, generator):
        drawn.append((noise, torch.randn(noise.shape[1:], generator=generator)[None]))
        return noise

    monkeypatch.setitem(reconstruction.SAMPLERS, model.config.DIFFUSION.SAMPLER, sampler)
    reconstruction.reconstruct(model, case.views, "mean_of_k", k=3, seed=seed)
    return drawn


def test_each_sample_begins_with_the_noise_of_its_seed(model, case, monkeypatch):
    starts = [start for start, _ in noises(model, case, monkeypatch, 7)]
    assert all(torch.equal(v, reconstruction.seeded_noise((1, 16, 16, 16), 7 + k)) for k, v in enumerate(starts))


def test_sharp_begins_at_the_expected_volume_with_noise(model, case, monkeypatch):
    "The expected volume is made once; signal and noise at half time are those of the schedule."
    d, net = model.config.DIFFUSION, model.denoiser
    begun = []

    def sampler(denoise, x, times, diffusion, generator):
        begun.append((x, times))
        return x

    monkeypatch.setitem(reconstruction.SAMPLERS, d.SAMPLER, sampler)
    asked = []
    clean = torch.full((1, 1, 16, 16, 16), 0.3)
    monkeypatch.setattr(reconstruction, "consistent_denoiser", lambda *a: lambda x, t: (asked.append((x, t)), clean)[1])
    reconstruction.reconstruct(model, case.views, "sharp", seed=7)
    ((zero, t),), ((x, times),) = asked, begun
    assert t == 1 and not zero.any() and times == pytest.approx(torch.linspace(0.5, 0, d.STEPS + 1).tolist())
    alpha, sigma = (float(v) for v in net.diffusion.alpha_sigma(torch.tensor(0.5)))
    assert torch.allclose(x, alpha * clean + sigma * reconstruction.seeded_noise((1, 16, 16, 16), 7), atol=1e-6)


def test_a_report_of_sharp_says_what_it_is_and_has_true_samples(model, case, tmp_path, monkeypatch):
    pages = {}
    monkeypatch.setattr(viewer, "save_report", lambda folder, volumes, *a, **k: pages.update(k, volumes=volumes))
    a = visualize_options().parse_args("--method sharp --samples 2 --steps 2 --seed 5".split())
    viewer.run_case(model, case, a, tmp_path, (-1000, 600))
    assert pages["method"] == "sharp" and pages["made"].endswith(SHARP_NOTE)
    d = model.config.DIFFUSION.model_copy(update=dict(STEPS=2))
    samples = reconstruction.draw_samples(model, case.views, [5, 6], d)
    for k, x in enumerate(samples, 1):
        assert torch.equal(pages["volumes"][f"sample_{k}"], to_hu(x[0], WINDOW))
    assert not torch.equal(pages["volumes"]["generated"], pages["volumes"]["sample_1"])


def test_fresh_noise_is_not_that_of_the_start(model, case, monkeypatch):
    "A generator of the CPU takes the lower 32 bits of a seed, so an offset of 2**32 would add nothing."
    drawn = noises(model, case, monkeypatch, 7)
    assert not any(torch.equal(start, fresh) for start, _ in drawn for _, fresh in drawn)


# Evaluation


def test_a_second_scan_of_a_trained_patient_is_named():
    model = SimpleNamespace(config=None, meta=dict(cases=dict(train=["p1__1.2.3", "p2"])))
    assert trained_on(["p1__4.5.6", "p2", "p3", "p2__7"], model) == ["p1__4.5.6", "p2", "p2__7"]


def test_means_have_the_interval_of_the_bootstrap():
    values = [20.0, 22.0, 27.0, 21.0, 30.0]
    cases = {str(i): dict(scores=dict(mean=dict.fromkeys(evaluation.METRICS, v))) for i, v in enumerate(values)}
    assert mean_intervals(cases, ["mean"], seed=3)["mean"]["psnr"] == list(bootstrap(values, seed=3))


def test_figures_that_do_not_exist_are_none(model, case):
    empty = score_volume(case.volume, Case("nobody", torch.zeros_like(case.volume), case.views), model.denoiser)
    assert empty["mae_hu_body"] is None and empty["mae_hu"] > 0  # a cube of air has no body
    json.dumps(empty, allow_nan=False)


def test_figures_are_those_of_the_protocol_and_of_the_body_that_are_asked_for(model, case):
    x = model.denoiser.mean[0]
    got = [score_volume(x, case, model.denoiser, protocol, air) for protocol in ("unit", "psct") for air in (-900, 0)]
    for (protocol, air), found in zip(((p, a) for p in ("unit", "psct") for a in (-900, 0)), got):
        wanted = metrics(x[0], case.volume[0], WINDOW, protocol, air)
        assert all(found[k] == pytest.approx(wanted[k]) for k in ("psnr", "ssim", "mae_hu_body")), (protocol, air)
    assert got[0]["psnr"] != got[2]["psnr"] and got[0]["mae_hu_body"] != got[1]["mae_hu_body"]


def test_the_settings_of_an_evaluation_reach_its_parts(model, case, monkeypatch):
    seen = {}

    def reconstruct(net, views, method, c, k, seed, **_):
        seen.update(c=c, k=k, seed=seed)
        return net.mean[0]

    def judge(x, case, net, protocol="unit", air=-500):
        seen.update(protocol=protocol, air=air)
        return dict.fromkeys(evaluation.METRICS, 1.0)

    monkeypatch.setattr(evaluation, "reconstruct", reconstruct)
    monkeypatch.setattr(evaluation, "score_volume", judge)
    result = evaluate(model, [case], ["sample"], "psct", k=3, seed=7, steps=5, consistency="soft")
    c = seen.pop("c")
    assert (c.STEPS, c.CONSISTENCY) == (5, "soft") and seen == dict(k=3, seed=7, protocol="psct", air=-300)
    assert (result["settings"]["steps"], result["settings"]["k"]) == (5, 3)
    evaluate(model, [case], ["sample"])
    assert seen["c"].STEPS == model.config.DIFFUSION.STEPS


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("geometry", dict(kind="cone", sad_mm=541.0, sdd_mm=949.0, panel_mm=500.0), "geometry cone"),
        ("mm", 10.0, "mm 10"),
        ("hu_window", [-1000, 1500], "HU window"),
    ],
)
def test_data_of_another_machine_is_refused(key, value, words, model, monkeypatch, tmp_path):
    known = dict(view_domain="line_integral", size=16, mm=20.0, pixels=16, hu_window=WINDOW, geometry="parallel")
    monkeypatch.setattr(evaluation, "read_manifest", lambda _: known)
    check_same_data(tmp_path, model)
    known[key] = value
    with pytest.raises(UserError, match=words):
        check_same_data(tmp_path, model)


def test_an_evaluation_from_its_options_to_its_files(model, prepared, tmp_path, capfd):
    where = ["--checkpoint_dir", str(model.path.parent), "--data", str(prepared)]
    files = [tmp_path / "a.json", tmp_path / "a.png"]
    evaluation.main([*where, "--methods", "mean", "expected", "--json", str(files[0]), "--plot", str(files[1])])
    printed, kept = capfd.readouterr().out, json.loads(files[0].read_text())
    assert list(kept["cases"]) == ["new2", "new3"] and kept["settings"]["methods"] == ["mean", "expected"]
    for name, found in kept["cases"].items():
        row = next(line for line in printed.splitlines() if line.startswith(name))
        assert row.split()[1:] == [f"{found['scores'][m]['psnr']:.2f}" for m in ("mean", "expected")]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    for options, words in ((["--methods", "magic"], "magic is unknown"), (["--cases", "nobody"], "no such case")):
        with pytest.raises(SystemExit, match="2"):
            evaluation.main([*where, *options])
        assert words in capfd.readouterr().err


# Uncertainty


def test_factors_are_the_conformal_ranks():
    z = torch.arange(1.0, 20)  # of 19 distances the 10th, the 16th and the 19th: ceil(20 p)
    assert conformal_factors(z.flip(0), torch.zeros(19, dtype=torch.long))[0].tolist() == [10, 16, 19]


def test_a_kind_has_factors_of_its_own_where_there_are_voxels_enough():
    z, kind = torch.arange(1.0, 801), torch.tensor([1, 2] * 200 + [3] * 201 + [2] * 199)
    q = conformal_factors(z, kind)
    assert q[3, 0] == 501 and q[0].tolist() == [401, 641, 761]  # an empty class takes the factors of all voxels


def test_factors_of_the_normal_distribution_are_two_sided():
    assert gaussian_factors()[0].tolist() == pytest.approx([0.6745, 1.2816, 1.96], abs=1e-3)


def test_a_distance_counts_no_spread_below_the_floor():
    z = z_score(torch.tensor([0.5, 0.5]), torch.tensor([0.4, 0.6]), torch.tensor([0.05, 0.0]), WINDOW)
    torch.testing.assert_close(z, torch.tensor([2, 0.1 * HU / MIN_DEVIATION_HU]))


def test_half_an_interval_is_in_hu():
    w = half_width(torch.tensor([0.0, 0.1]), torch.tensor([1, 2]), torch.tensor([9.0, 2.0, 3.0]), WINDOW)
    torch.testing.assert_close(w, torch.tensor([2 * MIN_DEVIATION_HU, 3 * 0.1 * HU]))


def test_limits_lie_beyond_all_held_out_cases_and_only_what_is_above_counts():
    usual = score_limits([dict(spread=10.0, surprise=9.0), dict(spread=20.0, surprise=3.0)], 1.5)
    assert usual == dict(spread=30.0, surprise=13.5)
    found = dict(spread=31.0, surprise=1.0, unseen=0.0)
    assert ood_report(found, usual)[0] == ["spread"] and ood_report(found | dict(spread=29.0), usual)[0] == []


def test_a_patient_is_turned_about_the_long_axis():
    x = torch.rand(1, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate_patient(x, 90), x.rot90(1, (2, 3)), atol=1e-4, rtol=0)
    blob = torch.zeros(1, 5, 33, 33)
    blob[:, :, 15:18, 26:29] = 1
    at = (rotate_patient(blob, 30)[0, 2] > 0.5).nonzero().float().mean(0) - 16
    assert at.norm().item() == pytest.approx(11, abs=0.5)
    assert abs(math.degrees(math.atan2(at[0], at[1]))) == pytest.approx(30, abs=3)


def test_what_was_fitted_holds_for_its_model_and_settings_only(model):
    c, path = model.config.DIFFUSION, model.path.parent / CALIBRATION_FILE
    q = torch.full((len(VOXEL_CLASSES), len(CONFIDENCE_LEVELS)), 3.0)
    kept = dict(model=file_digest(model.path), factors={2: q.tolist()}, limits=dict(spread=1.0), cases=["a", "b"])
    kept |= calibration_settings(c)
    try:
        write_with_checksum(path, lambda p: p.write_text(json.dumps(kept)))
        found = load_calibration(model, c, 2)
        assert torch.equal(found.factors, q) and found.limits == dict(spread=1.0)
        assert found.text == "calibrated on 2 held-out cases"
        assert load_calibration(model, c, 3).text.startswith("not calibrated")
        write_with_checksum(path, lambda p: p.write_text(json.dumps(kept | dict(model="0" * 64))))
        found = load_calibration(model, c, 2)
        assert torch.equal(found.factors, gaussian_factors()) and found.limits is None
        assert "of another model" in found.text
    finally:
        for file in path.parent.glob(CALIBRATION_FILE + "*"):
            file.unlink()


def test_a_calibration_from_its_options_to_the_report_of_a_volume(model, case, prepared, tmp_path, capfd):
    fitted = tmp_path / "fitted"
    where = ["--checkpoint_dir", str(model.path.parent), "--data", str(prepared), "--k", "2", "--out", str(fitted)]
    uncertainty.main(where)
    assert "fitted on 2 cases, 2 samples each" in capfd.readouterr().out
    c, model = model.config.DIFFUSION, load_model(fitted)
    many = reconstruction.draw_samples(model, case.views, [0, 1], c)
    maps, report = uncertainty.assess(model, case.views, many, c)
    assert report["calibration"] == "calibrated on 2 held-out cases" and "lung volume" in report["report"]
    assert set(report["signs"]) <= set(uncertainty.SCORES) and all(v.shape == (16, 16, 16) for v in maps.values())
    torch.testing.assert_close(maps["mean"], many.mean(0)[0] * HU + WINDOW[0], atol=0.1, rtol=0)
    assert (maps["spread_95"] >= 0).all() and (maps["coverage"] == 2).all()
