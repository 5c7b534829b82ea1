"Films: alignment of real pairs, and the benchmark rehearsed on synthetic scans and films."

import json
import sys

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import ROOT, run_cmd
from drawn_films import hand, lumbar_spine, on_light_box
from PIL import Image

from diffx2ct.align import film_mask, recognise
from diffx2ct.calibrate import Calibrator, CalibratorConfig, save_calibrator
from diffx2ct.data import density, to_unit
from diffx2ct.drr import Projector, geometry
from diffx2ct.phantom import phantom
from diffx2ct.radiograph import FilmSettings, film_pair, tissue_integrals
from diffx2ct.two_images import MIN_MARGINS, FilmOptions, View, identify_films, recognition_warnings

WINDOW, N, CUBE = (-1024.0, 1500.0), 64, 384.0
FACES_LEFT = {0, 3, 4, 5, 6, 7}  # of the twelve real pairs, judged by eye


@pytest.fixture(scope="session")
def reference() -> torch.Tensor:
    "Mean views of eight phantoms, (2, P, P)."
    A = Projector(geometry("chest", CUBE), N, CUBE / N, N)
    views = [A(density(to_unit(phantom(k, N, CUBE / N)[0], WINDOW)[None, None], WINDOW))[0] for k in range(8)]
    return torch.stack(views).mean(0)


@pytest.mark.slow
def test_real_pairs_are_recognised(xray_dir, reference):
    "Facing as judged by eye, nothing exchanged, nothing inverted; one that is called a guess may be wrong."
    right = 0
    for k in range(12):
        names = [xray_dir / f"pair{k:02d}_{view}.jpg" for view in ("frontal", "lateral")]
        films = [torch.from_numpy(np.asarray(Image.open(n).convert("L")).astype(np.float32)) for n in names]
        masks = [film_mask(f) for f in films]
        assert all(m.float().mean() > 0.85 for m in masks), k  # masks leave the patient alone
        found = recognise(films, masks, reference)
        assert not found.exchanged and found.inverted == (False, False), k
        agrees = found.mirrored == (k not in FACES_LEFT)
        assert agrees or found.margins["mirrored"] < MIN_MARGINS["mirrored"], k  # a wrong answer is called a guess
        right += agrees
    assert right >= 11, right


def box(film: torch.Tensor) -> torch.Tensor:
    "A film photographed on a light box."
    return on_light_box(torch.nn.functional.interpolate(film[None, None], (256, 256), mode="area")[0, 0])


NOT_CHESTS = {  # what is drawn: (frontal and lateral film, words of the warning)
    "hands": (lambda films: (hand(), hand(0.1).flip(1)), "does not look like the AP view"),
    "a lumbar spine": (lambda films: (lumbar_spine(), lumbar_spine(side=True)), "does not look like the AP view"),
    "noise": (lambda films: torch.rand(2, 256, 256, generator=torch.Generator().manual_seed(0)), "the LAT view"),
    "films on a light box": (lambda films: [box(f) for f in films], "look like the same view"),
    "films turned by 90 degrees": (lambda films: [f.T.flip(0) for f in films], "does not look like"),
}


def identify(pair, A, reference):
    "Views and what was found about them."
    views, _, found = identify_films(tuple(View(n, f * 255) for n, f in zip(("one", "two"), pair)), A, reference)
    return views, found


QUICK = {"hands", "films on a light box"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NOT_CHESTS])
def test_drawn_pictures_are_not_taken_for_chests(name, reference):
    "The films that are drawn on, or turned, cause no such warning themselves."
    A, s = Projector(geometry("chest", CUBE), N, CUBE / N, 128), FilmSettings()
    rho = density(to_unit(phantom(9, N, CUBE / N)[0], WINDOW)[None, None], WINDOW)
    water, bone = (v[0] for v in tissue_integrals(rho, A))
    films = film_pair(water, bone, A, (s, s), torch.Generator().manual_seed(0))
    make, words = NOT_CHESTS[name]
    warn = lambda pair: " ".join(recognition_warnings(*identify(pair, A, reference), FilmOptions()))
    assert words in warn(make(films)) and words not in warn(films)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A scan, a pair of films and an untrained calibrator."
    folder = tmp_path_factory.mktemp("films")
    hu = phantom(3, N, CUBE / N)[0]
    image = sitk.GetImageFromArray(hu.flip(0).numpy())
    image.SetSpacing([CUBE / N] * 3)
    (folder / "ct").mkdir()
    sitk.WriteImage(image, str(folder / "ct" / "somebody.nii.gz"))
    A = Projector(geometry("chest", CUBE), N, CUBE / N, 128)
    s = FilmSettings()
    water, bone = (v[0] for v in tissue_integrals(density(to_unit(hu, WINDOW)[None, None], WINDOW), A))
    films = film_pair(water, bone, A, (s, s), torch.Generator().manual_seed(0))
    (folder / "xray").mkdir()
    for name, film in zip(("frontal", "lateral"), films):
        Image.fromarray((film * 255).byte().numpy()).save(folder / "xray" / f"pair00_{name}.jpg")
    small = Projector(geometry("chest", CUBE), 32, CUBE / 32, 32)
    c = CalibratorConfig(CHANNELS=[16, 24, 32])
    save_calibrator(Calibrator(c.CHANNELS), folder / "calibrator.safetensors", small, c)
    return folder


def benchmark(*args):
    return run_cmd([sys.executable, ROOT / "benchmarks" / "film" / "run.py", *args])


@pytest.mark.slow
def test_benchmark_fills_its_tables(place):
    got = benchmark(
        *("--ct", place / "ct", "--xray", place / "xray", "--calibrator", place / "calibrator.safetensors"),
        *("--phantoms", "2", "--out", place / "out"),
    )
    assert got.returncode == 0, got.stderr
    result = json.loads((place / "out" / "film.json").read_text())
    rows = {r["row"]: r["error"] for r in result["chests"]["somebody"]}
    assert len(rows) == 7 and rows["line integrals of the 2 mm volume"] < 0.05
    matched = [v for k, v in rows.items() if "quantile" in k]
    assert len(matched) == 3 and min(matched) > 2 * rows["line integrals of the 2 mm volume"]
    (pair,) = result["pairs"]
    assert (pair["faces"], pair["exchanged"], pair["inverted"]) == ("left", False, False)
    assert pair["learned, height fitted"] <= pair["learned"] + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, words", [((), "there is nothing to do"), (("--ct", ".", "--chests", "nobody"), "has no nobody")]
)
def test_benchmark_refuses(args, words):
    got = benchmark(*args, "--phantoms", "1", "--size", "16")
    assert got.returncode == 2 and words in got.stderr and "Traceback" not in got.stderr, got.stderr


def test_line_integrals_give_way_to_physics():
    "A thicker patient is brighter, bone is brighter than as much water (up to 80 mm), and scatter lowers the contrast."
    from diffx2ct.radiograph import primary, scatter, spectrum

    weights, t = spectrum(110, 4), torch.linspace(0, 300, 31)[:, None].expand(31, 31)
    P = primary(t, 0 * t, weights)
    assert (P.diff(dim=0) < 0).all() and (primary(t - t / 3, t / 3, weights)[1:8] < P[1:8]).all()
    I = P + scatter(P, 1.5, 8.0)
    assert (I[0] / I[-1] < 0.8 * P[0] / P[-1]).all()


def test_geometry_of_a_chest_survives_a_copy():
    "Sides stay with the geometry where it is changed, stored and read."
    from dataclasses import asdict, replace

    chest = geometry("chest", CUBE)
    assert geometry(json.loads(json.dumps(asdict(chest))), CUBE) == chest
    assert replace(chest, sad_mm=1610.0).frontal == "pa"
    assert geometry("x2ct", 320) == geometry(asdict(geometry("x2ct", 320)), 320)
