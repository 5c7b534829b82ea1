"Rules of the optimizer, each by a small case worked out by hand."

import torch
import torch.nn.functional as F
from torch import nn

from diffx2ct.config import load_config
from diffx2ct.diffusion import build_denoiser
from diffx2ct.drr import geometry
from diffx2ct.optimizer import Muon, make_optimizer, orthogonalize


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    "Numbers of a normal distribution, the same each time."
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_orthogonal_matrices_have_singular_values_near_one():
    for shape in ((8, 20), (20, 8)):
        m = drawn(*shape)
        values = torch.linalg.svdvals(orthogonalize(m))
        assert 0.65 < values.min() and values.max() < 1.25, values
        u, _, v = torch.linalg.svd(m, full_matrices=False)
        assert F.cosine_similarity(orthogonalize(m).flatten(), (u @ v).flatten(), 0) > 0.97


def test_two_steps_are_those_of_the_equation():
    "Nesterov momentum, decay by the learning rate, a step of 0.2 root mean square for every shape."
    p, lr, decay, mu = nn.Parameter(drawn(6, 30)), 0.02, 0.1, 0.9
    optimizer, by_hand, m = Muon([dict(params=[p], muon=True)], lr, decay, mu), p.detach().clone(), torch.zeros(6, 30)
    for step in (1, 2):
        p.grad = drawn(6, 30, seed=step)
        m = mu * m + (1 - mu) * p.grad
        by_hand = by_hand * (1 - lr * decay) - 0.2 * lr * 30**0.5 * orthogonalize(mu * m + (1 - mu) * p.grad)
        optimizer.step()
        torch.testing.assert_close(p.detach(), by_hand, rtol=1e-4, atol=1e-6)


def test_the_last_layer_and_places_are_left_to_adamw_and_all_weights_decay():
    sets = ["MODEL.SCALE=0.25", "DATA.TARGET_VOLUME_SIZE=16", "DATA.TARGET_DRR_SIZE=16", "TRAINING.PATCH_SIZE=16"]
    c = load_config(sets=[*sets, "TRAINING.OPTIMIZER=muon", "TRAINING.WEIGHT_DECAY=0.03"])
    denoiser = build_denoiser(c, geometry("parallel", 320.0), 20.0)
    optimizer = make_optimizer(denoiser, c)
    held = {id(p): g["muon"] for g in optimizer.param_groups for p in g["params"]}
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.03, 0.03]
    for name, p in denoiser.named_parameters():
        assert held[id(p)] == (p.ndim > 1 and not name.startswith(("unet.last.", "encoder.place"))), name
