"""New patients from real chests: each is deformed towards, or away from, a random mixture of the others.

python benchmarks/chest/mix.py --data data/chest --real lidc_idri_0001 lidc_idri_0005 --out data/chest/mix.safetensors

The chests are registered to each other, affine and then by diffeomorphic demons, at voxels of 6 mm (SimpleITK,
`pip install SimpleITK`; not a dependency of the package). The file holds a displacement field for each ordered pair;
`data.py --mix` draws patients from it."""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import one_thread

SIZE = 64  # voxels along an edge of a field


def register(
    fixed,  # (D, H, W) unit volume, numpy
    moving,  # the same of another patient
):  # (3, D, H, W) displacement z, y, x in voxels: moving at x + displacement looks like fixed at x
    "Affine, then demons, on volumes whose tissue outweighs its texture."
    import numpy as np
    import SimpleITK as sitk

    image = lambda v: sitk.GetImageFromArray(np.clip(v / 0.5, 0, 1).astype(np.float32))
    a, b = image(fixed), image(moving)
    r = sitk.ImageRegistrationMethod()
    r.SetMetricAsMeanSquares()
    r.SetInterpolator(sitk.sitkLinear)
    r.SetOptimizerAsRegularStepGradientDescent(1.0, 0.01, 100)
    r.SetOptimizerScalesFromPhysicalShift()
    r.SetShrinkFactorsPerLevel([4, 2])
    r.SetSmoothingSigmasPerLevel([2, 1])
    start = sitk.CenteredTransformInitializer(
        a, b, sitk.AffineTransform(3), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    r.SetInitialTransform(start)
    affine = r.Execute(a, b)
    field = sitk.TransformToDisplacementField(affine, sitk.sitkVectorFloat64, a.GetSize())
    demons = sitk.DiffeomorphicDemonsRegistrationFilter()
    demons.SetStandardDeviations(1.5)
    demons.SetSmoothDisplacementField(True)
    for shrink, rounds in ((4, 60), (2, 40), (1, 20)):
        small = [sitk.Shrink(sitk.SmoothingRecursiveGaussian(v, 0.5 * shrink), [shrink] * 3) for v in (a, b)]
        demons.SetNumberOfIterations(rounds)
        field = demons.Execute(*small, sitk.Resample(field, small[0]))
        field = sitk.Resample(field, a)
    return np.moveaxis(sitk.GetArrayFromImage(field), -1, 0)[::-1].astype(np.float32)


def warp(
    x,  # (1, D, H, W) unit volume
    field,  # (3, d, h, w) displacement z, y, x in voxels of the field's grid
):  # (1, D, H, W)
    "Sample a volume at displaced places; the field may be coarser."
    import torch
    import torch.nn.functional as F

    grid = F.affine_grid(torch.eye(3, 4)[None], [1, 1, *x.shape[1:]], align_corners=False)
    step = field.flip(0)[None] * 2 / field.shape[-1]
    step = F.interpolate(step, size=tuple(x.shape[1:]), mode="trilinear", align_corners=False)
    return F.grid_sample(x[None], grid + step.movedim(1, -1), align_corners=False)[0]


def mixed_patient(
    name: str,
    x,  # (1, D, H, W) unit volume of this patient
    fields: dict,  # "moving to fixed" -> field
    rng,  # numpy generator
):  # (1, D, H, W)
    "A patient deformed towards a random mixture of the others (up to wholly, or a third of it away)."
    import torch

    own = sorted(k for k in fields if k.startswith(f"{name} to "))
    weights = rng.dirichlet([0.5] * len(own)) * rng.uniform(-0.35, 1.0)
    total = torch.stack([float(w) * fields[k].float() for w, k in zip(weights, own)]).sum(0)
    return warp(x, total)


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, metavar="DIR", help="folder that data.py has made")
    p.add_argument("--real", nargs="+", required=True, metavar="CASE", help="real chests of the training")
    p.add_argument("--out", required=True, metavar="FILE", help="file of the fields, .safetensors")
    a = p.parse_args(argv)
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file, save_file

    from diffx2ct.basics import read_pt

    def read(name):
        x = read_pt(Path(a.data, "volumes", f"{name}.pt")).float()
        n = round(x.numel() ** (1 / 3))
        return F.avg_pool3d(x.reshape(1, n, n, n), n // SIZE)

    chests = {name: read(name) for name in a.real}
    fields = load_file(a.out) if Path(a.out).exists() else {}
    for moving in chests:
        for fixed in chests:
            key = f"{moving} to {fixed}"
            if moving == fixed or key in fields:
                continue
            fields[key] = torch.from_numpy(register(chests[fixed][0].numpy(), chests[moving][0].numpy()).copy()).half()
            before = (chests[moving] - chests[fixed]).square().mean().sqrt()
            after = (warp(chests[moving], fields[key].float()) - chests[fixed]).square().mean().sqrt()
            print(f"{key}: RMS difference {before:.3f} before, {after:.3f} after", flush=True)
            save_file(fields, a.out)


if __name__ == "__main__":
    one_thread(main)
