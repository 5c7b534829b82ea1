"""Training data of the shipped chest model: phantoms, and every real chest many times among them.

python benchmarks/chest/data.py --ct ../shared/ct --out data/chest --hold_out lidc_idri_0021 lung_dx_a0001_dicom

`--out` gets volumes/ and drrs/ as `diffx2ct_prepare` writes them, in the geometry `chest` (cube 384 mm).
Real chests are copied (as hard links) and deformed towards each other (`--mix`, a file of mix.py), so that each pass
over the cases sees real ones as often as 1 in 5 cases; augmentation changes every copy.
The held-out chests are there once, to be named in DATA.VALIDATION_CASES."""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import one_thread

WINDOW = (-1024.0, 1500.0)


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ct", metavar="DIR", help="folder with real chests; default: phantoms alone")
    p.add_argument("--out", required=True, metavar="DIR", help="folder for volumes/ and drrs/")
    p.add_argument("--size", type=int, default=64, help="voxels and pixels along an edge; default: 64")
    p.add_argument("--phantoms", type=int, default=400, help="number of phantoms for training; default: 400")
    p.add_argument("--valid_phantoms", type=int, default=8, help="further phantoms for validation; default: 8")
    p.add_argument("--first", type=int, default=0, help="seed of the first phantom; default: 0")
    p.add_argument("--copies", type=int, default=4, help="how often each real chest is there; default: 4")
    p.add_argument("--mix", metavar="FILE", help="displacement fields of mix.py, for new patients from the real ones")
    p.add_argument("--mixed", type=int, default=12, help="new patients from each real chest; default: 12")
    p.add_argument("--hold_out", nargs="*", default=[], metavar="CASE", help="real chests for validation, there once")
    p.add_argument("--held_out_only", action="store_true", help="cases for tests: only the chests that are held out")
    a = p.parse_args(argv)
    import numpy as np
    import torch
    from mix import mixed_patient
    from safetensors.torch import load_file
    from tqdm.auto import tqdm

    import diffx2ct.scans as scans
    from diffx2ct.data import density, list_cases, save_case, to_unit, write_manifest
    from diffx2ct.drr import CHEST_CUBE_MM, Projector, geometry
    from diffx2ct.phantom import phantom

    out, mm = Path(a.out), CHEST_CUBE_MM / a.size
    A = Projector(geometry("chest", CHEST_CUBE_MM), a.size, mm, a.size)
    sources = {}

    def add(name: str, x: torch.Tensor, copies: int, source: str) -> None:
        save_case(name, x, A(density(x[None, None], WINDOW))[0], out / "volumes", out / "drrs")
        sources[name] = dict(source=source)
        for k in range(1, copies):
            other = f"{name}_copy{k:02d}"
            for file in (Path("volumes", f"{name}.pt"), Path("drrs", name, "AP.pt"), Path("drrs", name, "LAT.pt")):
                target = out / str(file).replace(name, other)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                os.link(out / file, target)
            sources[other] = dict(source=source)

    for k in tqdm(range(a.first, a.first + a.phantoms + a.valid_phantoms), desc="phantoms"):
        name = f"phantom{k:04d}" if k < a.first + a.phantoms else f"valid{k:04d}"
        if not (out / "volumes" / f"{name}.pt").exists():
            add(name, to_unit(phantom(k, a.size, mm)[0], WINDOW), 1, "procedural phantom")
        sources[name] = dict(source="procedural phantom")
    fields = {}
    if a.mix:  # for training no field to or from a patient that is held out
        apart = set() if a.held_out_only else set(a.hold_out)
        fields = {k: v for k, v in load_file(a.mix).items() if not set(k.split(" to ")) & apart}
    if a.ct:
        for path in sorted(Path(a.ct).iterdir()):
            if path.name.startswith((".", "sts_", "README")):
                continue
            name = path.name.split(".")[0]
            if a.held_out_only and name not in a.hold_out:
                continue
            x = to_unit(scans.to_cube(scans.find_scans([path])[0].read(), a.size, mm)[0], WINDOW)
            add(name, x, 1 if name in a.hold_out else a.copies, f"CT {name}")
            if a.mix and (a.held_out_only or name not in a.hold_out):
                for k in range(a.mixed):
                    rng = np.random.default_rng([k, *name.encode()])
                    new = mixed_patient(name, x[None], fields, rng)[0]
                    add(f"{name}_mix{k:02d}", new, 1, f"CT {name}, deformed")
    there = list_cases(out / "volumes")
    write_manifest(out / "drrs", asdict(A.geometry), a.size, mm, a.size, WINDOW, {n: sources[n] for n in there})
    held = [n for n in there if n in a.hold_out or n.startswith("valid")]
    print(f"{len(there)} cases in {out}; DATA.VALIDATION_CASES={held}")


if __name__ == "__main__":
    one_thread(main)
