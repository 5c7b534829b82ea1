"""Does a training step wait for its data? Crops read a CPU second, and what new views cost.

python benchmarks/data/run.py                    both tables; minutes
python benchmarks/data/run.py --only crops       crops or views
python benchmarks/data/run.py --edge 32 --repeats 1 --out /tmp/data   a rehearsal

crops   cubes of half the edge out of volumes of --edge voxels, at random: `torch.load` of a single-precision .pt for
        every crop, as the original did, against
        `CTPairs` and `Crops` (chapters 00 and 04). All read the same crops, from the page cache, between steps of a
        network that trains in the same process, since
        in an idle one the figures hang on whether the allocator happens to give its pages back; every way's crops are
        compared with the first way's
views   where a case is changed its views are rendered again: the share of a training step that takes, for both
        geometries, at --edge / 2 with the profile demo
        and at --edge with the profile lidc128 as shipped, batch 1; and the share of warping the volume, which half of
        the cases are spared

Times are CPU seconds of one thread, interleaved, medians of --repeats rounds."""

import argparse
import itertools
import sys
import tempfile
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import config, cpu_seconds, network, one_thread, random_cases, save, table, training_step


def crops(edge: int, repeats: int, many: int = 10, cases: int = 8) -> list[dict]:
    "Ways to read crops, `many` between two steps."
    import numpy as np
    import torch

    import diffx2ct.batches as B
    from diffx2ct.data import CTPairs, crop, crop_origin, save_case

    patch, still = edge // 2, {"TRAINING.AUGMENT.SHARE": 0.0, "TRAINING.FLIP_AXES": [], "BATCH_SIZE": 1}
    with tempfile.TemporaryDirectory() as tmp:
        for kind, half in (("half", True), ("single", False)):
            for i in range(cases):
                save_case(
                    f"case{i}",
                    torch.rand(edge, edge, edge, generator=torch.Generator().manual_seed(i)),
                    torch.zeros(2, 32, 32),
                    f"{tmp}/{kind}",
                    f"{tmp}/views",
                    half,
                )
        draws = [
            B.BatchPlan((int(np.random.default_rng(i).integers(cases)),), crop_origin(edge, patch, (0, i)), i)
            for i in range(100)
        ]

        def ours(kind):
            c = config(
                "demo",
                still
                | {
                    "DATA.PT_DATA_DIR": f"{tmp}/{kind}",
                    "DATA.DRR_DIR": f"{tmp}/views",
                    "DATA.TARGET_VOLUME_SIZE": edge,
                    "DATA.TARGET_DRR_SIZE": 32,
                    "TRAINING.PATCH_SIZE": patch,
                },
            )
            return B.Crops(CTPairs(c.DATA), draws, c, True, c.DATA.CUBE_MM / c.DATA.TARGET_VOLUME_SIZE)

        def load(i, **how):
            return crop(
                torch.load(f"{tmp}/single/case{draws[i].cases[0]}.pt", weights_only=True, **how)[None, None],
                draws[i].origin,
                patch,
            ).contiguous()

        half, single, ram = (
            ours("half"),
            ours("single"),
            [torch.load(f"{tmp}/single/case{i}.pt", weights_only=True) for i in range(cases)],
        )
        ways = {  # name -> crop number i, (1, 1, patch, patch, patch) in single precision
            "torch.load of single precision (the original)": lambda i: load(i),
            "the same, mapped anew for every crop": lambda i: load(i, mmap=True),
            "CTPairs, the whole volume converted, then cropped": lambda i: crop(
                half.pairs[draws[i].cases[0]].volume[None], draws[i].origin, patch
            ).contiguous(),
            "CTPairs + Crops, half precision (diffx2ct_prepare)": lambda i: half[i][2],
            "CTPairs + Crops, single precision (files of others)": lambda i: single[i][2],
            "tensors of single precision in RAM": lambda i: crop(
                ram[draws[i].cases[0]][None, None], draws[i].origin, patch
            ).clone(),
        }
        first, *others = ways.values()
        for way in others:
            for i in range(0, len(draws), 10):
                torch.testing.assert_close(
                    way(i), first(i), rtol=0, atol=3e-4
                )  # half a unit in the last place of a half
        trains = config(
            "demo",
            {
                "DATA.TARGET_VOLUME_SIZE": patch,
                "DATA.TARGET_DRR_SIZE": patch,
                "TRAINING.PATCH_SIZE": patch,
                "TRAINING.AUGMENT.SHARE": 1.0,
                "BATCH_SIZE": 1,
                "DEVICES": "cpu",
            },
        )
        net, turn = network(trains), {name: itertools.cycle(range(len(draws))) for name in ways}
        step = partial(
            training_step(net, trains),
            [B.Crops(random_cases(1, net), [B.BatchPlan((0,), (0, 0, 0), 0)], trains, True, net.A.mm)[0]],
        )

        def read(name):
            for i in itertools.islice(turn[name], many):
                ways[name](i)

        spent = cpu_seconds({name: lambda name=name: read(name) for name in ways}, repeats, before=step)
    base = next(iter(spent.values()))
    return [{"reading": name, "crops a CPU second": many / s, "ratio": base / s} for name, s in spent.items()]


def views(edge: int, repeats: int) -> list[dict]:
    "Share of rendering and of warping in a training step."
    import numpy as np

    import diffx2ct.batches as B
    from diffx2ct.augment import augment
    from diffx2ct.data import density

    rows = []
    for size, profile in ((edge // 2, "demo"), (edge, "lidc128")):
        work = {}
        for g in ("parallel", "x2ct"):
            c = config(
                profile,
                {
                    "DATA.TARGET_VOLUME_SIZE": size,
                    "DATA.TARGET_DRR_SIZE": size,
                    "TRAINING.PATCH_SIZE": size,
                    "DATA.GEOMETRY": g,
                    "BATCH_SIZE": 1,
                    "TRAINING.AUGMENT.SHARE": 1.0,
                    "DEVICES": "cpu",
                },
            )
            net = network(c)
            case = random_cases(1, net)
            item = B.Crops(case, [B.BatchPlan((0,), (0, 0, 0), 0)], c, True, net.A.mm)[0]
            work[g, "step"] = partial(training_step(net, c), [item])
            work[g, "render"] = lambda net=net, item=item: net.A(density(item[1], net.window))
            work[g, "warp"] = lambda c=c, case=case: augment(
                case[0].volume, np.random.default_rng(0), c.TRAINING.AUGMENT, c.TRAINING.FLIP_AXES
            )
        spent = cpu_seconds(work, repeats)
        rows += [
            {
                "volume": f"{size}^3",
                "geometry": g,
                "profile": profile,
                "step, CPU s": spent[g, "step"],
                "new views, CPU s": spent[g, "render"],
                "new views, % of the step": 100 * spent[g, "render"] / spent[g, "step"],
                "a warp, % of the step": 100 * spent[g, "warp"] / spent[g, "step"],
            }
            for g in ("parallel", "x2ct")
        ]
    return rows


def main(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", choices=("crops", "views"), help="one table")
    p.add_argument("--edge", type=int, default=128, help="voxels along an edge of the volumes (default: %(default)s)")
    p.add_argument("--repeats", type=int, help="rounds (default: 10 for crops, 2 for views)")
    p.add_argument(
        "--out", type=Path, default=HERE / "results", help="crops.json and views.json go there (default: %(default)s)"
    )
    a = p.parse_args(argv)
    for name, measure, usual in (("crops", crops, 10), ("views", views, 2)):
        if a.only in (None, name):
            repeats = usual if a.repeats is None else a.repeats
            rows = measure(a.edge, repeats)
            save(a.out / f"{name}.json", dict(edge=a.edge, repeats=repeats, rows=rows))
            print(table(rows), end="\n\n")


if __name__ == "__main__":
    one_thread(main)
