"""Measure the error of films as line integrals, and its cost. Chests from CT, films of them, calibration,
reconstruction.

python benchmarks/film/run.py --ct ../shared/ct --calibrator calibrator.safetensors --trained_on lidc_idri_0001
python benchmarks/film/run.py --ct ../shared/ct --calibrator calibrator.safetensors --checkpoint_dir checkpoints/chest
python benchmarks/film/run.py --xray ../shared/xray --calibrator calibrator.safetensors   real pairs alone

The films are rendered from 2 mm volumes, with settings outside the ranges that `FilmSettings` is randomised in, and
then scaled down to the model's detector.
With --gvxr there are also films whose primary beam another program has made (see gvxr_primary.py).
Each row gives the mean relative error of the line integrals; with a checkpoint also PSNR and SSIM of the volume
(protocol `unit`, the method `expected`). Cases
that the calibrator was trained on (--trained_on) are averaged in rows of their own. Without a checkpoint, quantile
matching uses the mean views of phantoms.
For real pairs there is no truth: the figure is the difference of the two views' weight per height."""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import command_line, one_thread, save, table

WINDOW = (-1024.0, 1500.0)
FINE, FINE_MM = 192, 2.0  # voxels and edge of the volumes that films are rendered from
BASE = dict(
    heel=0.0, blur_mm=0.7, photons=2e5, electronic=0.0, black=0.0, white=1.0, gamma=1.0, slope=10.0, middle=0.45
)
BEAM = BASE | dict(kvp=80, filter_mm=2.0, bone_from_hu=20, scatter=2.4, scatter_mm=75)
KINDS = {  # every kind has settings that no training film has
    "tone curve only": BASE | dict(filter_mm=300, scatter=0, detail=0, latitude=1),
    "six energies and scatter": BEAM | dict(detail=0, latitude=1),
    "with local contrast": BEAM | dict(detail=2.0, detail_mm=50, latitude=0.55),
}


def read_case(path: Path, edge: float):
    "A scan at 2 mm as a unit volume in the model's cube."
    import diffx2ct.scans as scans
    from diffx2ct.data import to_unit

    size = round(edge / FINE_MM / 8) * 8
    scan = scans.find_scans([path])[0]
    return to_unit(scans.to_cube(scan.read(), size, edge / size)[0], WINDOW)[None]


def films_of(fine, A, kind: str, seed: int):
    "Films of a 2 mm volume on the model's detector, and its line integrals there."
    import torch
    import torch.nn.functional as F

    from diffx2ct.data import density
    from diffx2ct.drr import Projector
    from diffx2ct.radiograph import FilmSettings, film_pair, tissue_integrals

    size = fine.shape[-1]
    P = Projector(A.geometry, size, A.size * A.mm / size, 3 * A.pixels)
    s = FilmSettings(**KINDS[kind])
    water, bone = (v[0] for v in tissue_integrals(density(fine, WINDOW)[None], P, s.bone_from_hu))
    films = film_pair(water, bone, P, (s, s), torch.Generator().manual_seed(seed))
    return F.avg_pool2d(films, 3), F.avg_pool2d(water + bone, 3)


def films_of_primary(path: Path, A, kind: str, seed: int):
    "Films of a primary beam that gvxr_primary.py has made; scatter, noise and processing are those of chapter 00g."
    import numpy as np
    import torch
    import torch.nn.functional as F

    from diffx2ct.radiograph import FilmSettings, add_noise, local_contrast, quantise, scatter, tone

    s, P = FilmSettings(**KINDS[kind]), torch.from_numpy(np.load(path).copy())
    pixel, out = A.geometry.panel_mm / P.shape[-1], []
    for view in P:
        total = view + scatter(view, s.scatter, s.scatter_mm / pixel)
        I = add_noise(total, s.photons, s.electronic, torch.Generator().manual_seed(seed))
        x = local_contrast(-I.log(), s.detail, s.detail_mm / pixel, s.latitude)
        out.append(quantise(tone(x, s), s.bits))
    return F.interpolate(torch.stack(out)[None], (A.pixels,) * 2, mode="area")[0]


def mean_views(A, phantoms: int):
    "Mean views of phantoms, where no model is given."
    import torch

    from diffx2ct.data import density, to_unit
    from diffx2ct.phantom import phantom

    many = (A(density(to_unit(phantom(k, A.size, A.mm)[0], WINDOW)[None, None], WINDOW))[0] for k in range(phantoms))
    return torch.stack(list(many)).mean(0)


def volume_scores(net, c, y, truth, soft: bool, method: str = "expected") -> dict:
    "PSNR and SSIM of the volume made of two views."
    from diffx2ct.data import to_hu
    from diffx2ct.measures import lung_volume
    from diffx2ct.metrics import psnr, ssim
    from diffx2ct.reconstruct import reconstruct

    c = c.model_copy(update=dict(CONSISTENCY="soft" if soft else "on"))
    x = reconstruct(net, y, method, c).float().cpu()[0]
    found, true = (lung_volume(to_hu(v, net.window), net.A.mm) for v in (x, truth[0]))
    lungs = 100 * abs(found - true) / true if true else None
    return {"PSNR, dB": psnr(x, truth[0]), "SSIM": ssim(x, truth[0]), "lung volume, error %": lungs}


def angle_rows(truth, A, model) -> list[dict]:
    "Ideal line integrals whose lateral view is turned, and whether weight or consistency notice."
    from diffx2ct.calibrate import mass_difference
    from diffx2ct.consistency import check_views
    from diffx2ct.data import density
    from diffx2ct.radiograph import move_patient

    rows, rho = [], density(truth, WINDOW)[None]
    for turn in (0, 1, 2, 5, 10):
        y = A(rho, density(move_patient(truth[None], turn=turn), WINDOW))[0]
        row = {"row": f"lateral turned by {turn} degrees", "weight": mass_difference(y)}
        row["noticed"] = check_views(y[None], A, WINDOW) is not None
        rows.append(row | volume_scores(model.denoiser, model.config.DIFFUSION, y, truth, True))
    return rows


def chest_rows(name, fine, A, panel, reference, calibrator, model, primary: Path | None) -> list[dict]:
    "All rows of one chest."
    import torch.nn.functional as F

    from diffx2ct.calibrate import calibrate_films, match_quantiles, relative_error
    from diffx2ct.data import density

    truth = F.interpolate(fine[None], (A.size,) * 3, mode="area")[0]
    y, rows = A(density(truth, WINDOW)[None])[0], []

    def add(what, views, soft, method="expected"):
        row = {"row": what, "error": None if views is None else relative_error(views[None], y[None]).item()}
        if model:
            net, c = model.denoiser, model.config.DIFFUSION
            row |= volume_scores(net, c, y if views is None else views, truth, soft, method)
        rows.append(row)

    if model:
        add("nothing (mean volume)", None, False, "mean")
        add("ideal line integrals, consistent mean only", y, False, "consistent_mean")
        add("ideal line integrals", y, False)
    pool = lambda v: F.avg_pool2d(v, panel.pixels // A.pixels)
    films = {kind: films_of(fine, panel, kind, k) for k, kind in enumerate(KINDS)}
    add("line integrals of the 2 mm volume", pool(next(iter(films.values()))[1]), False)
    films = {kind: film for kind, (film, _) in films.items()}
    if primary and primary.exists():
        for k, kind in enumerate(list(KINDS)[1:]):
            films[f"gvxr, {kind}"] = films_of_primary(primary, panel, kind, k)
    for kind, film in films.items():
        add(f"{kind}; quantile matching", match_quantiles(pool(film), reference), True)
        if calibrator:
            add(f"{kind}; learned calibration", pool(calibrate_films(calibrator, film)), True)
    print(name, *(f"{r['row']}: {r['error']:.3f}" for r in rows if r["error"] is not None), sep="\n  ", flush=True)
    return rows


def write_densities(paths: dict[str, Path], folder: Path) -> None:
    "Density at 4 mm in the cube of the preset `chest`."
    import numpy as np
    import torch.nn.functional as F

    from diffx2ct.data import density
    from diffx2ct.drr import CHEST_CUBE_MM

    folder.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        rho = density(F.avg_pool3d(read_case(path, CHEST_CUBE_MM).float(), 2), WINDOW)[0].clamp(min=0)
        np.save(folder / f"{name}.npy", rho.numpy())


def averaged(cases: dict[str, list[dict]]) -> list[dict]:
    "Rows with the mean over cases, in an order that reads from nothing to everything."
    first = next(iter(cases.values()))
    mean = lambda k, key: sum(rows[k][key] for rows in cases.values()) / len(cases)
    out = [
        {key: v if key == "row" or v is None else mean(k, key) for key, v in row.items()} for k, row in enumerate(first)
    ]
    return sorted(out, key=lambda r: "learned" in r["row"])


def for_card(rows: list[dict], cases: list[str]) -> dict:
    "A table as benchmarks/chest/card.py reads it."
    digits = {"error of the line integrals": ("error", 3), "PSNR, dB": ("PSNR, dB", 2), "SSIM": ("SSIM", 3)}
    digits["lung volume, error %"] = ("lung volume, error %", 1)
    return dict(
        title=f"Films of another simulator (2 mm volumes, settings outside the training's), {', '.join(cases)}",
        columns=list(digits),
        rows={
            r["row"]: {t: f"{r[key]:.{n}f}" for t, (key, n) in digits.items() if r.get(key) is not None} for r in rows
        },
        note="Protocol unit, method expected.",
        command=command_line("film/run.py"),
    )


def read_film(path: Path):
    "Grey values of a picture."
    import numpy as np
    import torch
    from PIL import Image

    return torch.from_numpy(np.asarray(Image.open(path).convert("L")).astype(np.float32))


def pair_row(folder: Path, name: str, reference, calibrator, pixels: int) -> dict:
    "Recognise a real pair and compute the difference of its weight per height."
    from diffx2ct.align import align_pair, film_mask, place_pair, recognise
    from diffx2ct.calibrate import calibrate_films, mass_difference, match_quantiles

    films = [read_film(folder / f"{name}_{view}.jpg") for view in ("frontal", "lateral")]
    masks = [film_mask(f) for f in films]
    found = recognise(films, masks, reference)
    if found.exchanged:
        films, masks = films[::-1], masks[::-1]
    films = [-f if dark else f for f, dark in zip(films, found.inverted)]
    difference = lambda places, how: mass_difference(how(*(laid := place_pair(films, masks, places, pixels))), laid[1])
    matched = lambda image, seen: match_quantiles(image, reference)
    places = align_pair(films, masks, reference, found.mirrored)
    row = {
        "pair": name,
        "faces": "right" if found.mirrored else "left",
        "margin": found.margins["mirrored"],
        "exchanged": found.exchanged,
        "inverted": any(found.inverted),
        "quantile matching": difference(places, matched),
    }
    if calibrator:
        learned = lambda image, seen: calibrate_films(calibrator, image, seen)
        fitted = align_pair(films, masks, reference, found.mirrored, learned, pixels=pixels)
        row |= {"learned": difference(places, learned), "learned, height fitted": difference(fitted, learned)}
    print(*(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ct", metavar="DIR", help="folder with chest CT (chests by name below)")
    p.add_argument("--xray", metavar="DIR", help="folder with pairNN_frontal.jpg and pairNN_lateral.jpg")
    p.add_argument("--calibrator", metavar="FILE", help="calibration network, .safetensors; default: baselines alone")
    p.add_argument("--checkpoint_dir", metavar="DIR", help="a model, for PSNR and SSIM; default: errors alone")
    p.add_argument("--write_density", metavar="DIR", help="write the densities that gvxr_primary.py reads, and end")
    p.add_argument("--gvxr", metavar="DIR", help="folder with <case>.npy of gvxr_primary.py, for films by that program")
    p.add_argument("--trained_on", nargs="*", default=[], metavar="CASE", help="cases the calibrator was trained on")
    p.add_argument("--chests", nargs="*", metavar="CASE", help="names without suffix; default: all but sts_*")
    p.add_argument("--phantoms", type=int, default=16, help="in the mean views, where no model is given; default: 16")
    p.add_argument("--size", type=int, default=64, help="voxels and pixels without model and calibrator; default: 64")
    p.add_argument(
        "--card", metavar="FILE", help="write the table of the chests here too, for benchmarks/chest/card.py"
    )
    p.add_argument("--out", default=str(HERE / "results"), metavar="DIR", help="default: results/ next to this script")
    a = p.parse_args(argv)
    from diffx2ct.basics import UserError
    from diffx2ct.calibrate import check_detector, load_calibrator
    from diffx2ct.checkpoint import load_model
    from diffx2ct.data import density
    from diffx2ct.drr import CHEST_CUBE_MM, Projector, geometry

    if not (a.ct or a.xray):
        raise UserError("there is nothing to do; name a folder of chests with --ct or of film pairs with --xray")
    model = load_model(a.checkpoint_dir) if a.checkpoint_dir else None
    calibrator, head = load_calibrator(a.calibrator) if a.calibrator else (None, None)
    pixels = head.pixels if head else a.size
    edge = CHEST_CUBE_MM
    A = Projector(geometry(head.geometry if head else "chest", edge), pixels, edge / pixels, pixels)
    if model:
        if head:
            check_detector(head, model.denoiser.A, a.calibrator)
        elif model.calibrator:
            calibrator, pixels = model.calibrator, model.calibrator_header.pixels
        else:
            pixels = model.denoiser.A.pixels
        A, reference = model.denoiser.A, model.denoiser.A(density(model.denoiser.mean, model.denoiser.window))[0]
    else:
        reference = mean_views(A, a.phantoms)
    panel = Projector(A.geometry, A.size, A.mm, pixels)  # that films are made and calibrated on
    result = {"kinds": KINDS, "trained_on": a.trained_on}
    if a.ct:
        paths = [q for q in sorted(Path(a.ct).iterdir()) if not q.name.startswith((".", "sts_", "README"))]
        paths = {q.name.split(".")[0]: q for q in paths}
        chosen = a.chests or list(paths)
        if missing := [c for c in chosen if c not in paths]:
            raise UserError(f"{a.ct} has no {missing[0]}; it has {', '.join(paths)}")
        if a.write_density:
            return write_densities({c: paths[c] for c in chosen}, Path(a.write_density))
        rows = {}
        for c in chosen:
            primary = Path(a.gvxr, f"{c}.npy") if a.gvxr else None
            rows[c] = chest_rows(c, read_case(paths[c], A.size * A.mm), A, panel, reference, calibrator, model, primary)
        result["chests"] = rows
        if a.card:
            save(Path(a.card), for_card(averaged(rows), chosen))
        if model:
            from torch.nn.functional import interpolate

            whole = {
                c: interpolate(read_case(paths[c], A.size * A.mm)[None], (A.size,) * 3, mode="area")[0] for c in chosen
            }
            result["angles"] = {c: angle_rows(v.float(), A, model) for c, v in whole.items()}
            print(f"\nturned lateral views:\n{table(averaged(result['angles']))}")
        for title, names in (
            ("not trained on", [c for c in chosen if c not in a.trained_on]),
            ("trained on", [c for c in chosen if c in a.trained_on]),
        ):
            if names:
                print(
                    f"\n{len(names)} chests the calibrator was {title}:\n{table(averaged({c: rows[c] for c in names}))}"
                )
    if a.xray:
        names = sorted(q.name[: -len("_frontal.jpg")] for q in Path(a.xray).glob("*_frontal.jpg"))
        if not names:
            raise UserError(f"{a.xray} holds no pair of films; name a folder with *_frontal.jpg and *_lateral.jpg")
        pairs = [pair_row(Path(a.xray), n, reference, calibrator, pixels) for n in names]
        result["pairs"] = pairs
        print(f"\n{table(pairs)}")
    save(Path(a.out, "film.json"), result)


if __name__ == "__main__":
    one_thread(main)
