"""Shared by the benchmarks: settings, a case, interleaved timing, tables and results. Light to import, so that a
process can start others without using their memory."""

import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH32 = {"MODEL.UNET.NUM_CHANNELS": [32, 64, 128, 256]}  # the demo at the width of the original project
ORIGINAL = WIDTH32 | {  # the same in its style
    "MODEL.BASE": "none",
    "MODEL.CONDITIONING_ENCODER.LIFT": "none",
    "MODEL.UNET.HALF_RESOLUTION": False,
    "MODEL.UNET.PLANAR_LEVELS": 0,
    "MODEL.UNET.NUM_RES_BLOCKS": 2,
    "MODEL.UNET.CROSS_ATTENTION_LEVELS": [False, True, True, True],
    "DIFFUSION.CONSISTENCY": "off",
}


def command_line(script: str) -> str:
    "The command that was run; folders of this machine are DIR."
    return " ".join([f"benchmarks/{script}", *("DIR" if Path(word).is_dir() else word for word in sys.argv[1:])])


def one_thread(main: Callable[[list[str]], None]) -> None:
    """Run a script's body on one thread, since CPU time counts the waiting of others too; what its user can repair is
    one sentence and exit code 2."""
    import torch

    from diffx2ct.basics import command

    @command
    def body(argv):
        torch.set_num_threads(1)
        main(argv)

    body()


def config(
    profile: str,  # a block of PROFILES in config.yml
    sets: dict,  # dotted key: value, laid over it
):
    "Settings of a shipped profile with some values changed."
    from diffx2ct.config import check_config, load_config, set_key

    c = load_config(ROOT / "config.yml", profile)
    for key, value in sets.items():
        set_key(c, key, value)
    return check_config(c)


def network(c):
    "An untrained denoiser of the settings, with buffers a run would have measured."
    import torch

    from diffx2ct.diffusion import build_denoiser
    from diffx2ct.drr import geometry

    torch.manual_seed(0)
    net = build_denoiser(c, geometry(c.DATA.GEOMETRY, c.DATA.CUBE_MM), c.DATA.CUBE_MM / c.DATA.TARGET_VOLUME_SIZE)
    for part in (net, *([net.coarse] if net.coarse else [])):
        part.mean.fill_(0.3)
        part.scales.fill_(0.1)
    return net


def training_step(net, c) -> Callable[[list[tuple]], None]:
    "Return a function that trains one step on micro-batches of `Crops`."
    import torch

    import diffx2ct.train as T
    from diffx2ct.optimizer import make_optimizer

    optimizer = make_optimizer(net, c)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(items):
        net.train()
        T.train_step(T.Loss(net, c), c, items, 0, optimizer, scaler, [])

    return step


def random_cases(
    n: int,
    net,  # has size, window and projector
) -> list:
    "Cases of random numbers: time and memory depend on shapes alone."
    import torch

    from diffx2ct.data import Case, density

    volumes = [torch.rand(1, *(net.A.size,) * 3, generator=torch.Generator().manual_seed(i)) for i in range(n)]
    return [Case(f"random{i}", v, net.A(density(v[None], net.window))[0]) for i, v in enumerate(volumes)]


def cpu_seconds(
    work: dict[str, Callable],  # name -> what is timed
    repeats: int,  # rounds; each runs everything once, in a new random order
    before: Callable = lambda: None,  # done before each, not timed
) -> dict[str, float]:  # name -> median CPU seconds of this process
    """Time things side by side: rounds in which each has its turn, after one that is not counted; what else the
    machine does then falls on all of them alike."""
    from diffx2ct.basics import UserError

    if repeats < 1:
        raise UserError(f"--repeats {repeats}: at least one round must be counted")
    times = {name: [] for name in work}
    for r in range(repeats + 1):
        for name in random.Random(r).sample(list(work), len(work)):
            before()
            start = time.process_time()
            work[name]()
            if r:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def table(rows: list[dict]) -> str:
    "Rows of equal keys as a Markdown table."
    show = lambda v: (
        "-"
        if v is None
        else f"{v:,}"
        if isinstance(v, int) and not isinstance(v, bool)
        else f"{v:.3g}"
        if isinstance(v, float) and abs(v) < 1000
        else f"{v:,.0f}"
        if isinstance(v, float)
        else str(v)
    )
    return "\n".join(
        "| " + " | ".join(cells) + " |"
        for cells in [list(rows[0]), ["---"] * len(rows[0]), *([show(v) for v in r.values()] for r in rows)]
    )


@contextmanager
def postgres() -> Iterator[tuple[str, Callable]]:  # URL, and what stops the server without ceremony and starts it again
    "A PostgreSQL server of our own, on a socket in a scratch folder."
    from diffx2ct.basics import UserError

    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        raise UserError("there is no PostgreSQL server; install one (Debian: apt-get install postgresql)")
    home = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # short, as sockets require
    me = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []  # PostgreSQL does not run as root
    if me:
        shutil.chown(home, "postgres")
    call = lambda tool, *args: subprocess.run(
        [*me, found[-1].with_name(tool), *args],
        check=True,
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        cwd="/tmp",
    )
    data = ("-D", home / "data")
    stop, begin = (
        (lambda: call("pg_ctl", *data, "-m", "immediate", "stop")),
        lambda: call(
            "pg_ctl", *data, "-w", "-l", home / "log", "-o", f"-k {home} -c listen_addresses='' -c fsync=off", "start"
        ),
    )

    def restart():
        stop()
        time.sleep(3)
        begin()

    call("initdb", *data, "-A", "trust", "-U", "tester", "--no-sync")
    begin()
    try:
        yield f"postgresql+psycopg2://tester@/postgres?host={home}", restart
    finally:
        stop()
        shutil.rmtree(home)


def machine() -> dict:
    "Describe the machine."
    import torch

    name = (
        next(
            (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
            platform.processor(),
        )
        if os.path.exists("/proc/cpuinfo")
        else platform.processor()
    )
    return dict(
        cpu=name,
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 1),
        torch=torch.__version__,
    )


def save(path: Path, result: dict) -> None:
    "Write a result and the machine it comes from."
    from diffx2ct.basics import write_atomic

    write_atomic(path, lambda p: p.write_text(json.dumps(dict(machine=machine()) | result, indent=1) + "\n"))
