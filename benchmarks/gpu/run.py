"""Ten minutes on one GPU: what no CPU can show.

benchmarks/gpu/run.sh                        every part, on cuda:0, under 8 minutes; then the table
benchmarks/gpu/run.sh --only numerics steps  some parts
benchmarks/gpu/run.sh --device cpu --tiny    a rehearsal: the same code on tiny networks, about a minute

numerics   the same numbers as on a CPU: projector, adjoint, projection onto the views, lifting, network, gradients,
           Newton-Schulz, a sample
steps      training steps of every profile at its own crop and batch, on one card: seconds, peak memory, loss
volumes    training steps on whole volumes of 128^3 and 256^3, batch 1
sampling   a volume in 8 evaluations, whole and in windows; ambition at 256^3: 4 s and 8 GB
split      a step of lidc256 cut into three runs, every cut a copy, all on this card, against the network in one piece;
           bar: 5 % slower
compile    the steps again with torch.compile: seconds to start, and per step

Each part is a separate process with its own time limit. What fails or takes too long is recorded with what was
measured before, and the next part begins.
All goes into gpu.json; the exit code is 1 where a part failed or a check of numerics did not hold."""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import config, network, random_cases, save, table

LIMITS = dict(numerics=50, steps=100, volumes=70, sampling=60, split=50, compile=120)  # s; 450 together
PROFILES = ("demo", "few", "nodules", "lidc128", "lidc256")
SMALL = {"MODEL.SCALE": 0.0625, "BATCH_SIZE": 2}  # of a rehearsal


class Part:
    "Inputs and results of a part: the device, sizes, and rows that are written as soon as they are measured."

    def __init__(self, device: str, tiny: bool, file: Path):
        import torch

        self.device, self.tiny, self.file, self.failed = torch.device(device), tiny, file, False
        self.cuda = self.device.type == "cuda"

    def row(self, name: str, work: Callable[[], dict]) -> dict | None:
        "Measure a row; what goes wrong in it is recorded."
        import torch

        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            result = work()
        except Exception as e:
            self.failed = True
            result = dict(error=f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
        with open(self.file, "a") as f:
            f.write(json.dumps(dict(name=name) | result) + "\n")
        return None if "error" in result else result

    def settings(self, profile: str, edge: int | None = None, crop: int | None = None, **sets):
        "A profile, perhaps at another volume size; tiny networks in a rehearsal, at an eighth of the size."
        c = config(profile, {})
        edge, crop = edge or c.DATA.TARGET_VOLUME_SIZE, crop or c.TRAINING.PATCH_SIZE
        if self.tiny:
            edge, crop = max(edge // 4, 32), max(crop // 4, 32)
        sizes = {"DATA.TARGET_VOLUME_SIZE": edge, "DATA.TARGET_DRR_SIZE": edge, "TRAINING.PATCH_SIZE": min(crop, edge)}
        return config(profile, sizes | {"DEVICES": str(self.device)} | sets | (SMALL if self.tiny else {}))

    def timed(self, work: Callable[[], None], repeats: int) -> float:
        "Median wall seconds, the device's work counted in."
        import torch

        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            if self.cuda:
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def peak(self) -> float | None:
        "Most memory held on the card since the row began, GB."
        import torch

        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.cuda else None


def step_of(part: Part, c, place: Callable | None = None) -> tuple[Callable[[], dict], object]:
    "A function that trains one step on random cases, and the network."
    import torch

    import diffx2ct.batches as B
    import diffx2ct.train as T
    from diffx2ct.data import Case, crop
    from diffx2ct.optimizer import make_optimizer

    class Cases(list):
        def part(self, i, origin, patch):
            case = self[i]
            return Case(case.name, crop(case.volume, origin, patch), case.views)

    net = network(c)
    cases = Cases(random_cases(min(2, c.BATCH_SIZE), net))
    draws = B.batch_plan(c, len(cases), 0)
    crops = B.Crops(cases, draws, c, True, net.A.mm)
    items = [crops[i] for i in range(len(draws))]
    net.to(part.device)
    if place:
        place(net)
    net.train()
    optimizer, scaler = make_optimizer(net, c), torch.amp.GradScaler(part.device.type, enabled=False)
    loss = T.Loss(net, c)
    return lambda: T.train_step(loss, c, items, 0, optimizer, scaler, []), net


def train(part: Part, c, repeats: int = 3, place: Callable | None = None) -> dict:
    "Some steps: seconds of the first and of the next ones, memory, losses."
    step, net = step_of(part, c, place)
    losses: list[float] = []
    work = lambda: losses.append(step()["loss"])
    first = part.timed(work, 1)
    seconds = part.timed(work, 1 if part.tiny else repeats)
    voxels = c.TRAINING.GRADIENT_ACCUMULATION_STEPS * c.BATCH_SIZE * c.TRAINING.PATCH_SIZE**3
    return {
        "volume": c.DATA.TARGET_VOLUME_SIZE,
        "crop": c.TRAINING.PATCH_SIZE,
        "batch": c.BATCH_SIZE * c.TRAINING.GRADIENT_ACCUMULATION_STEPS,
        "parameters": sum(p.numel() for p in net.parameters()),
        "first step, s": first,
        "step, s": seconds,
        "million voxels per s": voxels / seconds / 1e6,
        "peak, GB": part.peak(),
        "losses": losses,
    }


def steps(part: Part) -> None:
    for profile in PROFILES:
        part.row(profile, lambda: train(part, part.settings(profile)))


def volumes(part: Part) -> None:
    for profile, edge in (("lidc128", 128), ("lidc256", 256)):
        one = {"BATCH_SIZE": 1, "TRAINING.GRADIENT_ACCUMULATION_STEPS": 1}
        part.row(f"{profile} {edge}^3", lambda: train(part, part.settings(profile, edge, edge, **one), repeats=2))


def compiled(part: Part) -> None:
    import torch

    backend = "eager" if part.tiny else "inductor"  # the rehearsal only traces
    for profile in PROFILES[:1] if part.tiny else ("lidc128", "demo", "lidc256", "few"):  # nodules is demo's network
        place = lambda net: net.unet.compile(backend=backend)
        part.row(profile, lambda: dict(backend=backend) | train(part, part.settings(profile), place=place))
        torch._dynamo.reset()


def sampling(part: Part) -> None:
    "Seconds of one volume, after one that is not counted."
    from diffx2ct.diffusion import AMP
    from diffx2ct.reconstruct import reconstruct

    for profile, edge in (("lidc128", 128), ("lidc256", 256)):

        def one(whole: bool = True) -> dict:
            c = part.settings(profile, edge, edge)
            edge_now = c.DATA.TARGET_VOLUME_SIZE
            net = network(c)
            views = random_cases(1, net)[0].views
            net.to(part.device).eval()
            patch = edge_now if whole else edge_now // 2
            evaluations = 2 if part.tiny else 8
            d = c.DIFFUSION.model_copy(update=dict(STEPS=evaluations))
            out = []
            sample = lambda: out.append(reconstruct(net, views, "sample", d, patch=patch, amp=AMP[c.TRAINING.AMP]))
            part.timed(sample, 1)
            seconds = part.timed(sample, 1 if part.tiny else 2)
            finite = bool(out[-1].isfinite().all())
            return {
                "evaluations": evaluations,
                "window": patch,
                "seconds": seconds,
                "peak, GB": part.peak(),
                "finite": finite,
            }

        part.row(f"{profile} {edge}^3 whole", one)
        if edge > 128:
            part.row(f"{profile} {edge}^3 in windows of 128^3", lambda: one(whole=False))


def split(part: Part) -> None:
    "The runs of three devices on one; every cut copies, as between cards."
    from diffx2ct.parallel import DistributedUNet

    def copied(value, device):
        if isinstance(value, (list, tuple)):
            return type(value)(copied(v, device) for v in value)
        return value.clone() if value is not None else None

    c = part.settings("lidc256")

    def cut(plan, micro):
        def place(net):
            three = [part.device] * 3
            DistributedUNet(net.unet, net.encoder, three, plan, c.TRAINING.PATCH_SIZE, micro, move=copied)

        return place

    whole = part.row("whole", lambda: train(part, c))
    for plan, micro in (("balanced", 1), ("seed3", 1), ("balanced", 4)):

        def compare():
            got = train(part, c, place=cut(plan, micro))
            if whole:
                got["slower than whole, %"] = 100 * (got["step, s"] / whole["step, s"] - 1)
                got["loss apart"] = abs(got["losses"][0] - whole["losses"][0]) / abs(whole["losses"][0])
            return got

        part.row(f"three runs, {plan}, micro-batches up to {micro}", compare)


def numerics(part: Part) -> None:
    "The device against the CPU, relative to the size of the numbers; TF32 is off."
    import torch

    import diffx2ct.batches as B
    import diffx2ct.train as T
    from diffx2ct.consistency import alternating_projections
    from diffx2ct.data import density
    from diffx2ct.optimizer import make_optimizer, orthogonalize
    from diffx2ct.reconstruct import reconstruct

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    c = part.settings("demo", **{"TRAINING.AMP": "off"})

    def fresh():
        net = network(c)
        for p in net.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(1))
        return net

    case = random_cases(1, fresh())[0]

    def both(work: Callable) -> list[torch.Tensor]:
        "The result of work(network, device) on both."
        return [work(fresh().to(d), d).detach().cpu().double() for d in (torch.device("cpu"), part.device)]

    def check(name: str, work: Callable, bound: float) -> None:
        def compare():
            want, got = both(work)
            apart = ((got - want).norm() / want.norm().clamp(min=1e-12)).item()
            part.failed |= not apart <= bound
            return {"apart": apart, "bound": bound, "holds": apart <= bound}

        part.row(name, compare)

    def gradients(net, d, amp=None):
        net.train()
        base, views = case.volume[None].to(d) * 0.5, case.views[None].to(d)
        x = torch.randn(base.shape, generator=torch.Generator().manual_seed(2)).to(d)
        with torch.autocast(d.type, amp, enabled=amp is not None):
            net(x, torch.full((1,), 0.7, device=d), net.condition(base, net.encode(views))).square().mean().backward()
        return torch.cat([p.grad.flatten().cpu() for p in net.parameters() if p.grad is not None])

    def output(net, d, amp=None):
        base, views = case.volume[None].to(d) * 0.5, case.views[None].to(d)
        x = torch.randn(base.shape, generator=torch.Generator().manual_seed(2)).to(d)
        with torch.no_grad(), torch.autocast(d.type, amp, enabled=amp is not None):
            return net.eval()(x, torch.full((1,), 0.7, device=d), net.condition(base, net.encode(views)))

    volume = lambda d: case.volume[None].to(d)
    views = lambda d: case.views[None].to(d)
    check("projector", lambda net, d: net.A(density(volume(d), net.window)), 1e-5)
    check("adjoint", lambda net, d: net.A.adjoint(views(d)), 1e-5)
    check(
        "onto the views", lambda net, d: alternating_projections(net.mean, views(d), net.A, net.window, rounds=10), 1e-4
    )
    check("lifting", lambda net, d: net.condition(volume(d), net.encode(views(d))).lifted[0], 1e-4)
    check("network", output, 1e-4)
    check("network, bf16", lambda net, d: output(net, d, torch.bfloat16), 0.05)
    check("gradients", gradients, 1e-3)
    matrix = torch.randn(64, 200, generator=torch.Generator().manual_seed(3))
    check("Newton-Schulz", lambda net, d: orthogonalize(matrix.to(d)), 1e-4)
    check("a sample", lambda net, d: reconstruct(net.eval(), case.views, "sample", c.DIFFUSION), 1e-3)

    def trained(net, d):
        optimizer, scaler = make_optimizer(net, c), torch.amp.GradScaler(d.type, enabled=False)
        item = (B.BatchPlan((0,), (0, 0, 0), 0), None, volume("cpu"), views("cpu"), None)
        logs = [T.train_step(T.Loss(net.train(), c), c, [item], 0, optimizer, scaler, []) for _ in range(3)]
        return torch.tensor([v for log in logs for v in (log["loss"], log["grad_norm"])])

    check("losses and gradient norms of three steps", trained, 1e-2)


PARTS = dict(numerics=numerics, steps=steps, volumes=volumes, sampling=sampling, split=split, compile=compiled)


def card(device: str) -> dict:
    "Describe the device and the software."
    import torch

    d = torch.device(device)
    if d.type != "cuda":
        return dict(device=device)
    p = torch.cuda.get_device_properties(d)
    return dict(
        device=device,
        name=p.name,
        memory_GB=round(p.total_memory / 1e9, 1),
        capability=f"{p.major}.{p.minor}",
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        built_for=torch.cuda.get_arch_list(),
    )


def bars(parts: dict) -> list[dict]:
    "The figures that were requested in advance, as far as they were measured."
    rows = {(name, r["name"]): r for name, p in parts.items() for r in p["rows"] if "error" not in r}
    found = []
    for part, row, key, bar in (
        ("sampling", "lidc256 256^3 whole", "seconds", 4.0),
        ("sampling", "lidc256 256^3 whole", "peak, GB", 8.0),
        ("split", "three runs, balanced, micro-batches up to 1", "slower than whole, %", 5.0),
    ):
        value = rows.get((part, row), {}).get(key)
        if value is not None:
            found.append({"what": f"{row}: {key}", "bar": bar, "measured": value, "met": value <= bar})
    return found


def run_part(name: str, a: argparse.Namespace) -> dict:
    "Run a part in a separate process group; end it at its time limit."
    file = a.out / f"{name}.rows"
    file.unlink(missing_ok=True)
    limit, start = a.limit or LIMITS[name], time.monotonic()
    args = [sys.executable, __file__, "--part", name, "--device", a.device, "--out", a.out]
    child = subprocess.Popen(
        [*map(str, args), *(["--tiny"] if a.tiny else [])],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        words = child.communicate(timeout=limit)[1]
        status = "ok" if child.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        words, status = child.communicate()[1], f"out of time ({limit:g} s)"
    seconds = round(time.monotonic() - start, 1)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    file.unlink(missing_ok=True)
    print(f"{status:12} {seconds:6.1f} s  {name}", file=sys.stderr, flush=True)
    last = (words.strip().splitlines() or [""])[-1][:300]
    return dict(status=status, seconds=seconds, rows=rows) | (dict(error=last) if status != "ok" and last else {})


def show(result: dict) -> str:
    "The tables of a result."
    said = []
    for name, p in result["parts"].items():
        said += [f"{name}: {p['status']}, {p['seconds']} s" + (f", {p['error']}" if "error" in p else "")]
        good = [{k: v for k, v in r.items() if k != "losses"} for r in p["rows"] if "error" not in r]
        keys = list(dict.fromkeys(k for r in good for k in r))
        said += [table([{k: r.get(k) for k in keys} for r in good])] if good else []
        said += [f"{r['name']}: {r['error']}" for r in p["rows"] if "error" in r] + [""]
    return "\n".join(said + ([table(result["bars"])] if result["bars"] else []))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda:0", help="cuda:0, or cpu for a rehearsal (default: %(default)s)")
    p.add_argument("--tiny", action="store_true", help="tiny networks and volumes, one step each: a rehearsal")
    p.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help="parts to run")
    p.add_argument("--limit", type=float, help="seconds for each part instead of its own limit")
    p.add_argument("--out", type=Path, default=HERE / "results", help="gpu.json goes there (default: %(default)s)")
    p.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    from diffx2ct.basics import command
    from diffx2ct.parallel import device_option

    if a.part:
        if a.tiny:
            import torch

            torch.set_num_threads(1)
        part = Part(a.device, a.tiny, a.out / f"{a.part}.rows")
        PARTS[a.part](part)
        sys.exit(part.failed)

    @command
    def body(argv):
        a.device = str(device_option(a.device))
        result = dict(card=card(a.device), tiny=a.tiny, parts={})
        for name in a.only:
            result["parts"][name] = run_part(name, a)
            result["bars"] = [] if a.tiny else bars(result["parts"])
            save(a.out / "gpu.json", result)  # after each part: what ends the run leaves what there is
        print(show(result))
        if any(p["status"] != "ok" for p in result["parts"].values()):
            sys.exit(1)

    body()


if __name__ == "__main__":
    main()
