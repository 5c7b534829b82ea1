"The plan over three processes: `torchrun` starts this file, which is its own worker."

import pytest
from conftest import run_cmd


@pytest.mark.slow
def test_three_processes_equal_one():
    p = run_cmd(
        ["torchrun", "--standalone", "--nproc-per-node=3", __file__], timeout=120, OMP_NUM_THREADS="1"
    )  # standalone: on a free port
    assert p.returncode == 0, p.stderr[-3000:]
    assert sorted(p.stdout.split()) == [f"{plan}:rank{rank}" for plan in ("line", "seed3") for rank in range(3)]


def worker():
    "One rank: a step of the schedule for each plan; loss and gradients against the whole network in this same process."
    import torch
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    from diffx2ct.config import load_config
    from diffx2ct.diffusion import build_denoiser
    from diffx2ct.drr import geometry
    from diffx2ct.parallel import block_bytes, named_blocks, original_partition
    from diffx2ct.pipeline import line_plan, partition_model
    from diffx2ct.unet import randomise_zero_layers

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size, n = dist.get_rank(), dist.get_world_size(), 8
    sets = [
        "DATA.TARGET_VOLUME_SIZE=16",
        "DATA.TARGET_DRR_SIZE=16",
        "TRAINING.PATCH_SIZE=16",
        "MODEL.UNET.NUM_CHANNELS=[8, 16, 24]",
        "MODEL.UNET.ATTENTION_LEVELS=[false, false, true]",
        "MODEL.UNET.CROSS_ATTENTION_LEVELS=[false, true, true]",
        "MODEL.UNET.CHECKPOINTING=true",
        "MODEL.CONDITIONING_ENCODER.NUM_CHANNELS=8",
        "MODEL.CONDITIONING_ENCODER.OUTPUT_DIM=8",
    ]
    torch.manual_seed(0)
    denoiser = randomise_zero_layers(build_denoiser(load_config(sets=sets), geometry("parallel", 320), 20.0))
    unet, encoder = denoiser.unet, denoiser.encoder
    lift = lambda maps: denoiser.condition(denoiser.mean, (maps, None)).lifted
    loss_fn = lambda out, truth: (out - truth).square().mean()
    views, t, x, truth = (
        torch.rand(n, 2, 16, 16),
        torch.rand(n),
        torch.randn(n, 6, 16, 16, 16),
        torch.randn(n, 1, 16, 16, 16),
    )

    maps, tokens = encoder(views)
    want = loss_fn(unet(x, t, lift(maps), tokens), truth)
    want.backward()
    grads = {k: p.grad.clone() for k, p in denoiser.named_parameters()}
    assert all(g.any() for g in grads.values())
    total = torch.cat([g.flatten() for g in grads.values()]).norm()

    names = list(named_blocks(unet, encoder))
    for title, plan in {
        "line": line_plan(block_bytes(unet, encoder, 16), size),
        "seed3": original_partition(names),
    }.items():
        denoiser.zero_grad()
        part = partition_model(unet, encoder, plan, lift)[rank]
        schedule = ScheduleGPipe(
            PipelineStage(part, rank, size, torch.device("cpu")), n // 2, loss_fn
        )  # two samples each: with one the gradient of a skip would be contiguous by chance
        losses = []
        if rank == 0:
            schedule.step(views, t, x)
        elif rank == size - 1:
            schedule.step(target=truth, losses=losses)
        else:
            schedule.step()
        if losses:
            assert abs(torch.stack(losses).mean().item() - want.item()) < 1e-5 * want.item()
        own = {id(p) for p in part.parameters()}
        for k, p in denoiser.named_parameters():
            assert (p.grad is not None) == (id(p) in own), k  # every weight of this rank, and none of another's
            if id(p) in own:
                assert (p.grad - grads[k]).norm() <= 1e-5 * max(grads[k].norm(), total / 100), (
                    k
                )  # a bias before a norm has a gradient of rounding only
        print(f"{title}:rank{rank}\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    worker()
