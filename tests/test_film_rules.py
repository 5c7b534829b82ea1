"Rules of simulated films, each by a small case worked out by hand."

import math

import numpy as np
import pytest
import torch

from diffx2ct.drr import Projector, geometry
from diffx2ct.radiograph import (
    CT_KEV,
    ENERGIES_KEV,
    FilmSettings,
    add_noise,
    attenuation,
    collimation,
    film,
    local_contrast,
    move_patient,
    open_field,
    random_settings,
    scatter,
    tissue_integrals,
)

N = 32
SQUARE = Projector(geometry("parallel", 320), N, 320 / N, N)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    "Numbers of a normal distribution, the same each time."
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_light_of_the_open_beam():
    field = open_field((5, 5), 10.0, heel=0.5)
    assert field[4, 2] > field[2, 2] > field[0, 2] and field[2, 2] == 1
    full = open_field((101, 101), 4.0, heel=0.5)[:, 50]
    assert (full[-1] / full[0]).item() == pytest.approx(1.5, rel=0.02)  # lower edge over upper edge, minus one: 0.5
    flat = open_field((3, 3), 100.0, heel=0.0, sdd_mm=100.0)
    assert flat[1, 2].item() == pytest.approx(2**-1.5)  # inverse square, and cosine of the angle of incidence


def test_scatter_is_none_in_air_and_grows_with_thickness():
    slab = lambda mm: torch.full((8, 8), math.exp(-0.02 * mm))
    for mm in (0, 100, 200, 300):
        torch.testing.assert_close(scatter(slab(mm), 0.8, 2.0), 0.8 * slab(mm) * mm / 200, rtol=1e-4, atol=1e-6)


def test_bone_and_water_attenuate_alike_at_the_energy_of_a_ct():
    at = [
        np.interp(math.log(CT_KEV), np.log(ENERGIES_KEV), attenuation(what).log().numpy()) for what in ("water", "bone")
    ]
    assert at[0] == pytest.approx(at[1], abs=1e-4)


def test_noise_follows_the_light_and_the_readout():
    for level in (1.0, 0.02):
        noise = add_noise(torch.full((200, 200), level), 2e4, 3.0, torch.Generator().manual_seed(0)).std().item()
        assert noise == pytest.approx(math.sqrt(2e4 * level + 9) / 2e4, rel=0.03)


@pytest.mark.parametrize("edge, where", [("top", np.s_[:3]), ("bottom", np.s_[-3:]), ("left", 0), ("right", 0)])
def test_each_edge_is_collimated_at_its_side(edge, where):
    open_ = collimation((20, 20), 1.0, FilmSettings(**{f"{edge}_mm": 3.0}))
    shut = {"left": open_[:, :3], "right": open_[:, -3:]}.get(edge, open_[where])
    assert not shut.any() and open_.sum() == 20 * 17


def test_what_belongs_to_a_machine_is_that_of_the_other_film():
    for seed in range(20):
        first = random_settings(np.random.default_rng(seed))
        second = random_settings(np.random.default_rng(seed + 100), first)
        for name, f in FilmSettings.model_fields.items():
            if f.json_schema_extra and not f.json_schema_extra["exposure"]:
                assert getattr(first, name) == getattr(second, name), name
        assert first.photons != second.photons


def test_latitude_is_the_share_of_coarse_contrast_that_is_left():
    ramp = torch.zeros(64, 64)
    ramp[:, 32:] = 1
    kept = local_contrast(ramp, 0.0, 4.0, 0.5)
    assert (kept[32, -1] - kept[32, 0]).item() == pytest.approx(0.5, abs=0.02)


def test_the_window_is_measured_inside_the_collimator():
    "A film keeps its grey values where a part of it without contrast is shut."
    t = torch.linspace(0, 300, 40).expand(40, 40)
    t = torch.cat([t, torch.full((40, 40), 900.0)])  # the lower half is far denser
    s = dict(scatter=0, heel=0, blur_mm=0, photons=1e9, electronic=0, detail=0, latitude=1, slope=0, bars=0, bits=16)
    got = film(t, 0 * t, 1.0, FilmSettings(**s, bottom_mm=40))
    assert got[20].max() > 0.9 and got[20].min() < 0.1 and not got[-1].any()


def test_a_patient_who_moves_is_another_one_in_the_lateral_view():
    now, later = drawn(2, 1, N, N, N).abs().unbind(0)
    got = tissue_integrals(now[None], SQUARE, lateral=later[None])
    one, other = (tissue_integrals(v[None], SQUARE) for v in (now, later))
    for g, a, b in zip(got, one, other):
        torch.testing.assert_close(g, torch.stack([a[:, 0], b[:, 1]], 1))


def test_a_breath_moves_the_lower_end_and_leaves_the_upper_one():
    rows = torch.arange(N).float()[:, None, None].expand(1, 1, N, N, N)
    shift = (move_patient(rows, breath=0.2) - rows)[0, 0, :, N // 2, N // 2].abs()
    assert shift[1] < 0.2 and shift[-8] > 2 * shift[8] > 0.5
