"""Train the calibration network of the shipped chest model, first at half of the pixels.

python benchmarks/chest/calibrator.py --data data/chest --real lidc_idri_0001 lidc_idri_0005 \
c3n_00249 cmb_crc_msb_01068 --out data/chest/calibrator.safetensors

Weights are moved by Muon (chapter 03d). The same command resumes an interrupted training."""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import one_thread

WINDOW = (-1024.0, 1500.0)


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, metavar="DIR", help="folder that data.py has made")
    p.add_argument("--out", required=True, metavar="FILE", help="calibration file, .safetensors")
    p.add_argument("--real", nargs="*", default=[], metavar="CASE", help="real chests to train on; default: none")
    p.add_argument("--steps", type=int, nargs=2, default=[1200, 2400], help="at half and at all pixels")
    p.add_argument("--rates", type=float, nargs=2, default=[0.008, 0.006], help="peak learning rates of both")
    a = p.parse_args(argv)
    import torch.nn.functional as F

    from diffx2ct.basics import read_pt
    from diffx2ct.calibrate import CalibratorConfig, save_calibrator, train_calibrator
    from diffx2ct.data import read_manifest
    from diffx2ct.drr import Projector, geometry
    from diffx2ct.optimizer import muon

    manifest = read_manifest(str(Path(a.data, "drrs")))
    size, edge = manifest["size"], manifest["size"] * manifest["mm"]
    read = lambda name: read_pt(Path(a.data, "volumes", f"{name}.pt")).float().reshape(1, size, size, size)
    phantoms = [read(q.stem) for q in sorted(Path(a.data, "volumes").glob("phantom*.pt"))]
    real = [read(name) for name in a.real]
    net, out = None, Path(a.out)
    for pixels, steps, rate in zip((size // 2, size), a.steps, a.rates):
        A = Projector(geometry(manifest["geometry"], edge), pixels, edge / pixels, pixels)
        c = CalibratorConfig(STEPS=steps, LEARNING_RATE=rate, PATIENTS=3, FILMS=2)
        pooled = [[F.avg_pool3d(x, size // pixels) for x in group] for group in (phantoms, real)]
        net = train_calibrator(
            pooled[0],
            A,
            WINDOW,
            c,
            real=pooled[1],
            state=out.with_suffix(f".{pixels}.pt"),
            start_from=net,
            optimizer=lambda net, rate: muon(dict(net.named_parameters()), rate, special=("fields.",)),
        )
    save_calibrator(net, out, A, c)
    print(f"wrote {out}")


if __name__ == "__main__":
    one_thread(main)
