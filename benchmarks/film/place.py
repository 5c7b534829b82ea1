"""What the place of two films on the detector costs, which the program has to find from the pictures alone.

python benchmarks/film/place.py --ct ../shared/ct --phantoms 5

Films of the whole detector, and films of which up to 10 % or 25 % are cut off at each edge, are made of phantoms and
chests (random settings of chapter 00g, twice the model's resolution) and go through the steps of `diffx2ct_reconstruct`
with and without the size of a pixel. `true` is the same with the films where they were made. `likeness alone` is
placement without regard to the size of the detector, as before version 0.4 (chapter 01b with all costs 0).
Error: of the line integrals, relative. PSNR: protocol `unit`, method `expected`. Patients that the model was trained on
are fit for this comparison only, not for a verdict on the model."""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import command_line, one_thread, save, table

CUTS = {"whole": 0.0, "up to 10 % cut off": 0.1, "up to 25 % cut off": 0.25}
COSTS = ("SCALE_COST", "BEYOND_COST", "CENTRE_COST")


def cut(film, most: float, rng):  # (n, n), largest share of each edge -> what is left, and its place
    "Cut a film of the whole detector at all four edges."
    from diffx2ct.align import Placement

    rows, columns = film.shape
    top, bottom = (int(rows * rng.uniform(0, most)) for _ in range(2))
    left, right = (int(columns * rng.uniform(0, most)) for _ in range(2))
    place = Placement(1 - (top + bottom) / rows, (top - bottom) / 2 / rows, (left - right) / 2 / columns)
    return film[top : rows - bottom, left : columns - right].clone(), place


def films_of(x, A, window, seed: int):  # (1, D, H, W) at twice the model's resolution -> (2, h, w)
    "Films with random settings, without collimation."
    import numpy as np
    import torch

    from diffx2ct.data import density
    from diffx2ct.drr import Projector
    from diffx2ct.radiograph import film_pair, random_settings, tissue_integrals

    size, open_field = x.shape[-1], dict(top_mm=0, bottom_mm=0, left_mm=0, right_mm=0, tilt=0)
    fine, rng = Projector(A.geometry, size, A.size * A.mm / size, 2 * size), np.random.default_rng([seed, 11])
    first = random_settings(rng, **open_field)
    second = random_settings(rng, first, **open_field)
    water, bone = (v[0] for v in tissue_integrals(density(x[None].float(), window), fine, first.bone_from_hu))
    return film_pair(water, bone, fine, (first, second), torch.Generator().manual_seed(seed))


def case_rows(model, name: str, x, films, seed: int) -> list[dict]:
    "All rows of one patient."
    from dataclasses import replace
    from unittest.mock import patch

    import numpy as np
    import torch.nn.functional as F

    import diffx2ct.align as align
    from diffx2ct.calibrate import relative_error
    from diffx2ct.data import density
    from diffx2ct.metrics import psnr
    from diffx2ct.reconstruct import reconstruct, run_settings
    from diffx2ct.two_images import FilmOptions, View, find_films, views_of_films

    net, c = model.denoiser, model.config.DIFFUSION.model_copy(update=dict(CONSISTENCY="soft"))
    truth, wish = F.avg_pool3d(x.float(), 2), FilmOptions(facing="left", bone="bright", keep_order=True)
    y, rows = net.A(density(truth[None], net.window))[0], []
    for k, (kind, most) in enumerate(CUTS.items()):
        rng = np.random.default_rng([seed, k])
        parts, places = zip(*(cut(film, most, rng) for film in films))
        for known in (True, False):
            row = {"case": name, "film": kind, "pixel size": "known" if known else "not known"}
            views = View("frontal", parts[0]), View("lateral", parts[1])
            for view in views if known else ():
                view.measured(net.A.geometry.panel_mm / films.shape[-1])
            found = find_films(net, views, model.calibrator, model.calibrator_header, wish)
            with patch.multiple(align, **dict.fromkeys(COSTS, 0.0)):
                alike = find_films(net, views, model.calibrator, model.calibrator_header, wish)
            ways = {"true": replace(found, places=places), "found": found, "likeness alone": alike}
            for way, placed in ways.items():
                made = views_of_films(net, placed, wish)[0]
                volume = reconstruct(net, made, "expected", c, **run_settings(model.config)).float()
                row |= {f"error, {way}": relative_error(made[None], y[None]).item()}
                row |= {f"PSNR, {way}": psnr(volume.cpu(), truth)}
            rows.append(row)
            print(*(f"{v:.3f}" if isinstance(v, float) else v for v in row.values()), flush=True)
    return rows


def recognised(model, films) -> int:
    "Count the variants of a pair that are recognised, of eight: exchanged, inverted, mirrored or not."
    from itertools import product

    from diffx2ct.align import recognise
    from diffx2ct.two_images import View, mean_views, to_film

    net, right = model.denoiser, 0
    reference = mean_views(net)
    for exchanged, dark, mirrored in product((False, True), repeat=3):
        pair = [films[0], films[1].flip(1) if mirrored else films[1]]
        pair = [1 - v if dark else v for v in pair]
        found = [to_film(View("film", v.clone()), net.A) for v in (pair[::-1] if exchanged else pair)]
        r = recognise([f.grey for f in found], [f.seen for f in found], reference)
        right += (r.exchanged, r.inverted, r.mirrored) == (exchanged, (dark, dark), mirrored)
    return right


def summary(rows: list[dict]) -> list[dict]:
    "Means over patients."
    out = []
    for kind, known in dict.fromkeys((r["film"], r["pixel size"]) for r in rows):
        some = [r for r in rows if (r["film"], r["pixel size"]) == (kind, known)]
        keys = [k for k in some[0] if k.startswith(("error", "PSNR"))]
        out.append({"film": kind, "pixel size": known} | {k: sum(r[k] for r in some) / len(some) for k in keys})
    return out


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint_dir", default="chest64", metavar="DIR", help="a model; default: %(default)s")
    p.add_argument("--ct", metavar="DIR", help="folder with chest CT; default: phantoms alone")
    p.add_argument("--chests", nargs="*", metavar="CASE", help="names without suffix; default: all but sts_*")
    p.add_argument("--phantoms", type=int, default=5, help="phantoms of seeds from 5000; default: %(default)s")
    p.add_argument("--out", default=str(HERE / "results"), metavar="DIR", help="default: results/ next to this script")
    a = p.parse_args(argv)
    import diffx2ct.scans as scans
    from diffx2ct.checkpoint import load_model
    from diffx2ct.data import to_unit
    from diffx2ct.phantom import phantom

    model = load_model(a.checkpoint_dir)
    net = model.denoiser
    size, mm = 2 * net.A.size, net.A.mm / 2
    cases = {}
    for file in sorted(Path(a.ct).iterdir()) if a.ct else ():
        name = file.name.split(".")[0]
        if name in (a.chests or [name]) and not file.name.startswith((".", "sts_", "README")):
            cases[name] = scans.to_cube(scans.find_scans([file])[0].read(), size, mm)[0]
    cases |= {f"phantom {k}": phantom(k, size, mm)[0] for k in range(5000, 5000 + a.phantoms)}
    rows, right = [], {}
    for seed, (name, hu) in enumerate(cases.items()):
        x = to_unit(hu, net.window)[None]
        films = films_of(x, net.A, net.window, seed)
        rows += case_rows(model, name, x, films, seed)
        right[name] = recognised(model, films)
    found = summary(rows)
    result = dict(command=command_line("film/place.py"), summary=found, cases=rows, recognised_of_8=right)
    save(Path(a.out, "place.json"), result)
    print(table(found), f"\nrecognised: {sum(right.values())} of {8 * len(right)} variants of whole films")


if __name__ == "__main__":
    one_thread(main)
