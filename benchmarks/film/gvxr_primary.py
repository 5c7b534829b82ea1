"""Primary beam behind a chest by another program: surfaces in gvxr, attenuation of xraylib, a spectrum of spekpy.

python benchmarks/film/gvxr_primary.py chest.npy primary.npy

Runs in a separate environment with gvxr, xraylib, spekpy, scikit-image and numpy; it needs EGL but no screen. The
input is the density relative to water of a
384 mm cube, (D, H, W), as run.py --write_density writes it. Each surface adds a step of density inside it. gvxr traces
the rays of the preset `chest` through one
surface at a time, since many nested surfaces at once come out wrong in gvxr 2.1.0; their path lengths are combined over
the spectrum. Written is the share of the
open beam's energy, (2, 192, 192), frontal and lateral."""

import sys

import numpy as np

EDGE, SAD, SDD, PANEL, PIXELS = 384.0, 1608.0, 1800.0, 430.0, 192  # mm, the preset `chest`
BONE = "Bone, Cortical (ICRP)"
WATER = [(0.05 + 0.1 * i, 0.1) for i in range(10)] + [(1.04, 0.06)]  # density of the surface, step inside it
BONES = [(1.2, 0.14), (1.35, 0.2), (1.6, 0.25), (1.9, 0.35)]
VIEWS = [
    ((0, SAD, 0), (0, SAD - SDD, 0)),
    ((-SAD, 0, 0), (SDD - SAD, 0, 0)),
]  # source and detector: x left, y back, z up


def path_length(gvxr, label: str, volume, level: float, mu: float):
    "Length of each ray inside a surface, mm, for both views."
    from skimage.measure import marching_cubes

    vertices, faces, _, _ = marching_cubes(volume, level)
    at = (vertices - (np.array(volume.shape) - 1) / 2) * EDGE / (volume.shape[0] - 2)
    xyz = np.stack([at[:, 2], at[:, 1], -at[:, 0]], 1)
    gvxr.removePolygonMeshesFromXRayRenderer()
    gvxr.makeTriangularMesh(label, xyz.flatten().tolist(), faces[:, ::-1].astype(int).flatten().tolist(), "mm")
    gvxr.setCompound(label, "H2O")
    gvxr.setDensity(label, 0.1, "g/cm3")
    gvxr.addPolygonMeshAsInnerSurface(label)
    out = []
    for source, detector in VIEWS:
        gvxr.setSourcePosition(*map(float, source), "mm")
        gvxr.setDetectorPosition(*map(float, detector), "mm")
        gvxr.setDetectorUpVector(0, 0, 1)
        signal = np.array(gvxr.computeXRayImage()) / gvxr.getTotalEnergyWithDetectorResponse()
        out.append(-np.log(np.clip(signal, 1e-9, None)) / (0.1 * mu) * 10)
    return np.stack(out)


def main(source: str, target: str) -> None:
    import spekpy
    import xraylib
    from gvxrPython3 import gvxr

    volume = np.pad(np.load(source).astype(np.float32), 1)
    gvxr.createOpenGLContext()
    gvxr.usePointSource()
    gvxr.setMonoChromatic(60, "keV", 1)
    gvxr.setDetectorNumberOfPixels(PIXELS, PIXELS)
    gvxr.setDetectorPixelSize(PANEL / PIXELS, PANEL / PIXELS, "mm")
    table = {m: (lambda e, m=m: xraylib.CS_Total_CP(m, float(e))) for m in ("Water, Liquid", BONE)}
    mu60, parts = table["Water, Liquid"](60), []
    per_water = table["Water, Liquid"](70) / table[BONE](70)  # g/cm3 of bone that attenuate like water at 70 keV
    for k, (level, step) in enumerate(WATER + BONES):
        if volume.max() > level:
            bone = k >= len(WATER)
            length = path_length(gvxr, f"surface{k}", volume, level, mu60) / 10
            parts.append((length * step * (per_water if bone else 1), BONE if bone else "Water, Liquid"))
    beam = spekpy.Spek(kvp=100, th=11, dk=2.0)
    beam.filter("Al", 3.0)
    energies, photons = beam.get_spectrum()
    weights = energies * photons / (energies * photons).sum()
    total = sum(w * np.exp(-sum(p * table[m](e) for p, m in parts)) for e, w in zip(energies, weights) if w > 1e-5)
    np.save(target, total.astype(np.float32)[:, ::-1, ::-1])  # rows from head to feet, columns as our views


if __name__ == "__main__":
    main(*sys.argv[1:])
