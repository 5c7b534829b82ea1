"""Three GPUs that are not there (`pretended`): training and sampling of the profile lidc256, and every copy between
devices left out once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretended import CPU, Devices, MixedDevices

from diffx2ct import batches, resume
from diffx2ct import train as T
from diffx2ct.cases import TrainingData
from diffx2ct.config import load_config
from diffx2ct.data import Case, crop, density
from diffx2ct.diffusion import AMP, SAMPLERS, Diffusion, sampling_times
from diffx2ct.drr import Projector, geometry
from diffx2ct.parallel import DistributedUNet, named_blocks
from diffx2ct.reconstruct import reconstruct

ROOT = Path(__file__).resolve().parents[1]
EDGE, PATCH = 64, 32
SETS = [
    f"DATA.TARGET_VOLUME_SIZE={EDGE}",
    f"DATA.TARGET_DRR_SIZE={EDGE}",
    f"TRAINING.PATCH_SIZE={PATCH}",
    "MODEL.SCALE=0.0625",  # eight channels per level or more; levels, blocks, attention and planar levels as shipped
    "TRAINING.GRADIENT_ACCUMULATION_STEPS=1",
    "TRAINING.AUGMENT.GEOMETRY=0.05",  # a projector is made in the step
    "DIFFUSION.STEPS=1",  # all samplers are tested below
    "DIFFUSION.OVERLAP=0",
]
GPUS = [torch.device("cuda", i) for i in range(3)]


class Cases(list):
    "Cases in memory, read as `Crops` reads a folder."

    @property
    def cases(self):
        return [case.name for case in self]

    def part(self, i, origin, patch):
        return replace(self[i], volume=crop(self[i].volume, origin, patch))


def data_of(edge: int, g=geometry("parallel", 320)) -> TrainingData:
    "Two cases to train on and one to validate: random cubes of eight voxels along an edge."
    A, rng, cases = Projector(g, edge, 320 / edge, edge), torch.Generator().manual_seed(0), []
    for name in ("a", "b", "c"):
        x = torch.rand(1, 8, 8, 8, generator=rng)
        for axis in (1, 2, 3):
            x = x.repeat_interleave(edge // 8, axis)
        cases.append(Case(name, x, A(density(x[None], (-1024, 1500)))[0]))
    return TrainingData(Cases(cases[:2]), Cases(cases[2:]), g, 320 / edge, True)


def micro_batches(c, data: TrainingData, step: int = 0) -> list:
    "Read the crops of a step as the training loop does."
    crops = batches.Crops(data.train, batches.batch_plan(c, len(data.train), step), c, data.line_integrals, data.mm)
    return [crops[i] for i in range(len(crops))]


def awake(r: resume.TrainingState) -> None:
    "Give zero-initialised layers weights, so that every path counts."
    for net in (r.denoiser, r.ema):
        rng = torch.Generator().manual_seed(1)
        for p in net.parameters():
            if not p.any():
                p.data.add_((0.1 * torch.randn(p.shape, generator=rng)).to(p.device))


def trained(folder: Path, sets: list[str], steps: int = 1):
    "A training of lidc256 after some steps: settings, data, training and its log."
    c = load_config(ROOT / "config.yml", "lidc256", SETS + sets)
    torch.manual_seed(0)
    data = data_of(c.DATA.TARGET_VOLUME_SIZE)
    r = T.start_training(c, data, folder)
    awake(r)
    logs = [T.run_step(r, c, micro_batches(c, data, step), 0, "test") for step in range(steps)]
    return c, data, r, logs


SMALL = [  # three levels, for copies that are left out one after the other
    "DATA.TARGET_VOLUME_SIZE=32",
    "DATA.TARGET_DRR_SIZE=32",
    "TRAINING.PATCH_SIZE=16",
    "MODEL.UNET.NUM_CHANNELS=[8, 8, 8]",
    "MODEL.UNET.NUM_RES_BLOCKS=1",
    "MODEL.UNET.ATTENTION_LEVELS=[false, false, true]",
    "MODEL.UNET.CROSS_ATTENTION_LEVELS=[false, true, true]",
]
PLANS = ("balanced", pytest.param("seed3", marks=pytest.mark.slow))


@pytest.fixture(scope="module", params=PLANS)
def small(request, tmp_path_factory):
    "A small training after a step on three GPUs; enter `machine` to go on with it."
    machine = Devices(3)
    with machine:
        c, data, r, _ = trained(tmp_path_factory.mktemp(request.param), [*SMALL, f"PLAN={request.param}"])
    return request.param, machine, c, data, r


def left_out(machine: Devices, kinds: list[str], work) -> list[str]:
    "Do work again and again, each time without one kind of copy; the kinds that nobody missed."
    unseen = []
    for kind in kinds:
        machine.forget = lambda copy: copy.kind == kind
        try:
            work()
            unseen.append(kind)
        except MixedDevices:
            pass
        finally:
            machine.forget = lambda copy: False
    return unseen


def kinds_of(machine: Devices, work) -> list[str]:
    "The kinds of copies that work makes."
    machine.copies.clear()
    work()
    return sorted({copy.kind for copy in machine.copies})


def test_operations_on_several_devices_are_refused():
    with Devices(2) as machine:
        assert torch.cuda.device_count() == 2
        a, b = torch.ones(3, device="cuda:0", requires_grad=True), torch.ones(3).to("cuda:1")
        assert (a.device, b.device, (2 * b).device, torch.zeros_like(b).device) == (*GPUS[:2], GPUS[1], GPUS[1])
        for mixed in (
            lambda: a + b,
            lambda: a + torch.ones(3),
            lambda: torch.cat([a, b]),
            lambda: b.add_(torch.ones(3)),
            lambda: torch.nn.Linear(3, 1)(b),
            lambda: torch.stack([a.sum(), b.sum()]),
            lambda: b.numpy(),
        ):
            with pytest.raises(MixedDevices, match="cuda"):
                mixed()
        assert (a * torch.tensor(2.0)).device == GPUS[0]  # a number on the CPU may join
        assert b[torch.tensor([0, 1])].device == GPUS[1] and b.copy_(torch.arange(3.0)).device == GPUS[1]
        assert b.new_tensor([1.0]).device == torch.arange(3.0).to(b).device == b[1:].device == GPUS[1]
        (a.to("cuda:1") * b).sum().backward()
        assert a.grad.device == GPUS[0] and a.grad.tolist() == [0, 1, 2]
        layer = torch.nn.Linear(3, 1).cuda(1)
        assert {p.device for p in layer.parameters()} == {GPUS[1]} and layer(b).device == GPUS[1]
        with torch.autocast("cuda", torch.bfloat16):
            assert layer(b).dtype == torch.bfloat16
        with pytest.raises(AssertionError, match="cuda:2 is not on this machine"):
            a.to("cuda:2")
    assert a.device == CPU and len(machine.copies) == 5


def step_and_sample(folder: Path, *sets: str):
    "A step of training and a sample of lidc256: the training, its log, its weights, and the volume."
    c, data, r, (log,) = trained(folder, ["TRAINING.AMP=off", *sets])
    r.ema.eval()
    x = reconstruct(r.ema, data.valid[0].views, "sample", c.DIFFUSION)  # windows: see below
    return r, log, torch.cat([p.detach().cpu().flatten() for p in r.denoiser.parameters()]), x


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return step_and_sample(tmp_path_factory.mktemp("cpu"), "DEVICES=cpu", "PLAN=balanced")


@pytest.mark.parametrize("plan", PLANS)
def test_lidc256_trains_and_samples_on_three_gpus_as_on_one_device(plan, on_cpu, tmp_path):
    with Devices(3) as machine:
        r, log, weights, x = step_and_sample(tmp_path, f"PLAN={plan}")
        for p, q in zip(r.denoiser.parameters(), r.ema.parameters(), strict=True):
            kept = [v for k, v in r.optimizer.state[p].items() if k != "step"]
            assert {p.device, q.device, *(v.device for v in kept)} == {p.device} and len(kept) in (1, 2)
        assert {p.device for p in r.denoiser.parameters()} == {*GPUS}
        assert x.device == r.denoiser.scales.device == GPUS[0]
    assert all(machine.used[g] > 100 for g in GPUS)
    assert [
        k for k in machine.copies if k.function == "run_step" and k.shape
    ] == []  # the average lies with the weights
    _, log1, weights1, x1 = on_cpu
    assert log["loss"] == pytest.approx(log1["loss"], rel=1e-5)
    assert log["grad_norm"] == pytest.approx(log1["grad_norm"], rel=1e-4)
    assert (weights - weights1).norm() < 1e-4 * weights1.norm() and (x - x1).abs().max() < 1e-3


def test_no_copy_of_a_training_step_can_be_left_out(small):
    plan, machine, c, data, r = small
    (item,) = micro_batches(c, data, step=1)

    def forward():
        r.denoiser.train()
        r.denoiser.lifts.clear()
        r.loss(item, {"L2": 1.0})

    def step():
        try:
            T.run_step(r, c, [item], 0, "test")
        finally:
            r.optimizer.zero_grad()

    with machine:
        kinds = kinds_of(machine, forward)
        # base, views, noise and times; lifting; the transform to half resolution
        assert {f"{f}  cpu cuda:0" for f in ("forward", "render_views", "condition", "haar", "unhaar")} <= {*kinds}
        walk = {tuple(k.split()[1:]) for k in kinds if k.startswith("walk")}
        at_cuts = {
            "balanced": "x t tokens lifted0 lifted1 lifted2 h",
            "seed3": "emb tokens lifted0 lifted1 lifted2 h skip0.0 skip1.0",
        }
        assert {name for name, *_ in walk} == {*at_cuts[plan].split()}
        assert left_out(machine, kinds, forward) == []
        if plan == "seed3":
            return
        clipping = [k for k in kinds_of(machine, step) if k.startswith("train_step")]
        assert len(clipping) == 4  # norms come together, and their factor goes back
        assert left_out(machine, clipping, step) == []


def test_a_copy_taken_out_of_the_code_is_missed(small, monkeypatch):
    _, machine, c, data, r = small
    (item,) = micro_batches(c, data, step=1)
    with machine:
        r.loss(item, {"L2": 1.0})
        placed = r.denoiser.unet.forward.__self__
        assert isinstance(placed, DistributedUNet)
        monkeypatch.setattr(placed, "move", lambda value, device: value)
        with pytest.raises(MixedDevices, match="cuda:1"):
            r.loss(item, {"L2": 1.0})
        monkeypatch.undo()
        named_blocks(r.denoiser.unet, r.denoiser.encoder)["mid"].to("cuda:2")  # weights that nobody placed
        with pytest.raises(MixedDevices, match="cuda:2"):
            r.loss(item, {"L2": 1.0})
        r.denoiser.unet.stages["mid"].to("cuda:1")
        r.loss(item, {"L2": 1.0})


@pytest.mark.slow
def test_no_copy_of_sampling_in_windows_can_be_left_out(small):
    _, machine, c, data, r = small

    def sample():
        r.ema.eval()
        r.ema.lifts.clear()
        return reconstruct(r.ema, data.valid[0].views, "sample", c.DIFFUSION, patch=16, amp=AMP["bf16"])

    with machine:
        around = [k for k in kinds_of(machine, sample) if not k.startswith("walk")]  # walk: as in training
        assert {"draw_samples  cpu cuda:0", "condition  cpu cuda:0"} <= {*around}
        assert left_out(machine, around, sample) == []


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_stays_on_its_gpu(name):
    with Devices(2) as machine:
        noise = torch.randn(1, 1, 4, 4, 4).to("cuda:1")
        machine.copies.clear()
        x = SAMPLERS[name](
            lambda x, t: 0.5 * x, noise, sampling_times(3), Diffusion(), torch.Generator().manual_seed(0)
        )
        assert x.device == GPUS[1] and not any(k.target == CPU and k.shape for k in machine.copies)


@pytest.mark.slow
def test_a_training_goes_on_where_its_blocks_are(small, tmp_path):
    plan, machine, c, data, r = small
    if plan == "seed3":
        pytest.skip("once is enough")
    with machine:
        resume.write_checkpoint(r, c, tmp_path, 0, {"cases": resume.case_split(data)})
        again = T.start_training(c, data, tmp_path)
        assert again.step == r.step
        for p, q in zip(r.denoiser.parameters(), again.denoiser.parameters(), strict=True):
            assert p.device == q.device and torch.equal(p, q)
            kept = [v for k, v in again.optimizer.state[q].items() if k != "step"]
            assert kept and {v.device for v in kept} == {q.device}
        T.run_step(again, c, micro_batches(c, data, 1), 0, "test")
