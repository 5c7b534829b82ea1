"Pictures that are no chest film, drawn from simple shapes."

import torch
from torch import Tensor

SIZE = 256  # pixels along an edge
V = torch.linspace(-1, 1, SIZE)[:, None].expand(SIZE, SIZE)
U = V.T


def stroke(a: tuple[float, float], b: tuple[float, float], width: float) -> Tensor:
    "Thickness of a round bar from a to b, (row, column) in half-edges."
    d = torch.tensor(b) - torch.tensor(a)
    t = (((V - a[0]) * d[0] + (U - a[1]) * d[1]) / d.square().sum().clamp(min=1e-6)).clamp(0, 1)
    far = (V - a[0] - t * d[0]) ** 2 + (U - a[1] - t * d[1]) ** 2
    return (width**2 - far).clamp(min=0).sqrt()


def hand(shift: float = 0.0) -> Tensor:
    "Five fingers with bones, a palm and a wrist, (SIZE, SIZE) in [0, 1]."
    out = stroke((0.35, shift), (0.5, shift), 0.36) + stroke((0.6, shift), (1.2, shift), 0.22)
    tips = ((-0.45, -0.42), (-0.75, -0.16), (-0.85, 0.06), (-0.7, 0.27), (0.0, 0.62))
    roots = ((0.2, -0.28), (0.15, -0.12), (0.12, 0.04), (0.15, 0.2), (0.4, 0.28))
    for tip, root in zip(tips, roots):
        a, b = ((r, c + shift) for r, c in (root, tip))
        out = out + 0.8 * stroke(a, b, 0.09) + 1.5 * stroke(a, b, 0.04)
    return (out / out.max()) ** 0.7


def lumbar_spine(side: bool = False) -> Tensor:
    "Five vertebrae in a soft body without lungs, from the front or the side, (SIZE, SIZE) in [0, 1]."
    out = (1.3 - (U / 0.95) ** 2).clamp(min=0).sqrt() * 0.8
    for k in range(6):
        row, column = -0.9 + 0.36 * k, 0.25 * (1 - (k / 2.5 - 1) ** 2) if side else 0.0
        out = out + 0.5 * ((V - row).abs() < 0.14) * ((U - column).abs() < 0.2)
        out = out + 0.3 * stroke((row, column + 0.2), (row + 0.1, column + 0.45), 0.06)
    out = out + 0.8 * stroke((0.9, -0.6), (1.0, -0.3), 0.35) + 0.8 * stroke((0.9, 0.6), (1.0, 0.3), 0.35)
    return out / out.max()


def on_light_box(
    film: Tensor,  # (h, w) in [0, 1], bone bright
    share: float = 0.6,  # of the picture's edge
) -> Tensor:  # (SIZE, SIZE)
    "A photograph of a film that hangs askew on a bright box in a dark room."
    n = round(SIZE * share)
    small = torch.nn.functional.interpolate(film[None, None], (n, n), mode="bilinear")[0, 0]
    out, a = torch.zeros(SIZE, SIZE), (SIZE - n) // 2
    out[20:-20, 8:-8] = 0.95 - 0.1 * V[20:-20, 8:-8]
    out[a : a + n, a + 6 : a + 6 + n] = 0.05 + 0.75 * small
    turn = torch.tensor([[[0.996, -0.087, 0.03], [0.087, 0.996, 0.0]]])
    grid = torch.nn.functional.affine_grid(turn, [1, 1, SIZE, SIZE], align_corners=False)
    return torch.nn.functional.grid_sample(out[None, None], grid, align_corners=False)[0, 0]
