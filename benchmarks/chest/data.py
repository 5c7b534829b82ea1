"""Training data of the shipped chest model: phantoms, and every real chest many times among them.

python benchmarks/chest/data.py --ct ../shared/ct --out data/chest --hold_out lidc_idri_0021 lung_dx_a0001_dicom

`--out` gets volumes/ and drrs/ as `diffx2ct_prepare` writes them, in the geometry `chest` (cube 384 mm).
Real chests are copied (as hard links) so that each pass over the cases sees them as often as 1 in 4 cases; augmentation
changes every copy.
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
    p.add_argument("--phantoms", type=int, default=272, help="number of phantoms for training; default: 272")
    p.add_argument("--valid_phantoms", type=int, default=8, help="further phantoms for validation; default: 8")
    p.add_argument("--first", type=int, default=0, help="seed of the first phantom; default: 0")
    p.add_argument("--copies", type=int, default=16, help="how often each real chest is there; default: 16")
    p.add_argument("--hold_out", nargs="*", default=[], metavar="CASE", help="real chests for validation, there once")
    p.add_argument("--held_out_only", action="store_true", help="leave out the real chests of the training")
    a = p.parse_args(argv)
    import torch
    from tqdm.auto import tqdm

    import diffx2ct.scans as scans
    from diffx2ct.data import density, list_cases, save_case, to_unit, write_manifest
    from diffx2ct.drr import CHEST_CUBE_MM, Projector, geometry
    from diffx2ct.phantom import phantom

    out, mm = Path(a.out), CHEST_CUBE_MM / a.size
    A = Projector(geometry("chest", CHEST_CUBE_MM), a.size, mm, a.size)
    sources = {}

    def add(name: str, hu: torch.Tensor, copies: int, source: str) -> None:
        x = to_unit(hu, WINDOW)
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
            add(name, phantom(k, a.size, mm)[0], 1, "procedural phantom")
        sources[name] = dict(source="procedural phantom")
    if a.ct:
        for path in sorted(Path(a.ct).iterdir()):
            if path.name.startswith((".", "sts_", "README")):
                continue
            name = path.name.split(".")[0]
            if a.held_out_only and name not in a.hold_out:
                continue
            hu = scans.to_cube(scans.find_scans([path])[0].read(), a.size, mm)[0]
            add(name, hu, 1 if name in a.hold_out else a.copies, f"CT {name}")
    there = list_cases(out / "volumes")
    write_manifest(out / "drrs", asdict(A.geometry), a.size, mm, a.size, WINDOW, {n: sources[n] for n in there})
    held = [n for n in there if n in a.hold_out or n.startswith("valid")]
    print(f"{len(there)} cases in {out}; DATA.VALIDATION_CASES={held}")


if __name__ == "__main__":
    one_thread(main)
