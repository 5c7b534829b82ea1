"""The picture at the head of README: two simulated films, the expected volume, and the truth.

    .venv/bin/python benchmarks/chest/hero.py checkpoints/best --out nbs/images/hero.png
    .venv/bin/python benchmarks/chest/hero.py checkpoints/best --ct chest.nii.gz

Without --ct the patient is a phantom whose seed no training uses. The picture states that the volume is generated."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, one_thread


def options() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="a checkpoint folder, or the name of a model of the package")
    p.add_argument("--ct", help="a real chest CT, not of the training data: NIfTI, NRRD, MetaImage or a DICOM folder")
    p.add_argument("--seed", type=int, default=10_007, help="the phantom, without --ct; default: 10007")
    p.add_argument("--out", default=str(ROOT / "nbs/images/hero.png"), help="default: nbs/images/hero.png")
    return p


def truth_of(
    a: argparse.Namespace,
    A,  # the model's projector
    window: tuple[float, float],  # HU of 0 and 1
):  # unit volume (D, H, W) and its views (2, P, P)
    "The patient of the picture on the grid of the model."
    from diffx2ct.basics import UserError
    from diffx2ct.phantom import phantom
    from diffx2ct.scans import find_scans, prepare_volume

    if not a.ct:
        return prepare_volume(phantom(a.seed, A.size, A.mm)[0], A, window, A.mm, half=False)[:2]
    scans = find_scans([a.ct])
    if len(scans) != 1:
        raise UserError(f"{a.ct} holds {len(scans)} scans; name the file or folder of one of them")
    return prepare_volume(scans[0].read(), A, window, half=False)[:2]


def draw(
    views,  # (2, P, P) mm of water
    made,  # (D, H, W) HU
    truth,  # (D, H, W) HU
    path: Path,
) -> None:
    "Frontal and lateral film, then a coronal and an axial slice of each volume."
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from diffx2ct.data import PLANES, draw_plane, mark_generated
    from diffx2ct.drr import to_display

    fig, axes = plt.subplots(1, 6, figsize=(12, 2.5), dpi=110, facecolor="black")
    for ax, film, title, letters in zip(axes, to_display(views)[0], ("frontal film", "lateral film"), ("RLHF", "APHF")):
        draw_plane(ax, film, title, letters, cmap="gray", vmin=0, vmax=1)
    middle, how = truth.shape[0] // 2, dict(cmap="gray", vmin=-1000, vmax=400)
    for ax, (volume, name) in zip(axes[2::2], ((made, "reconstruction"), (truth, "truth"))):
        draw_plane(ax, volume[:, middle], f"{name}, coronal", PLANES["coronal"], **how)
    for ax, (volume, name) in zip(axes[3::2], ((made, "reconstruction"), (truth, "truth"))):
        draw_plane(ax, volume[middle], f"{name}, axial", PLANES["axial"], **how)
    for ax in axes:
        ax.axis("off")
    fig.subplots_adjust(left=0.005, right=0.995, bottom=0.09, top=0.9, wspace=0.04)
    mark_generated(fig)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, facecolor="black")


def main(argv: list[str]) -> None:
    from diffx2ct.checkpoint import load_model
    from diffx2ct.data import to_hu
    from diffx2ct.metrics import psnr
    from diffx2ct.reconstruct import reconstruct

    a = options().parse_args(argv)
    model = load_model(a.model)
    net = model.denoiser
    truth, views = truth_of(a, net.A, net.window)
    made = reconstruct(model, views, "expected")[0].float()
    draw(views, to_hu(made, net.window), to_hu(truth, net.window), Path(a.out))
    print(f"{a.out}: expected volume {psnr(made, truth):.2f} dB")


if __name__ == "__main__":
    one_thread(main)
