"""Compare searches that are killed and restarted with one that is left undisturbed; and let many workers share a study.

python benchmarks/kills/run.py                      everything: about half an hour on one core
python benchmarks/kills/run.py --only kills         kills, workers, server, taken or away
python benchmarks/kills/run.py --kills 6 --trials 12 --out /tmp/kills   a rehearsal

kills     a search of two trials at 16^3 with accumulation, EMA, dynamic clipping, AMP, loss phases, a coarse stage and
          W&B offline, killed by SIGKILL at random moments: some after a random time, the others just before or after a
          random call. At the end every file and every row is compared with the undisturbed search
workers   four processes on one SQLite file, at 8^3
server    four processes on one PostgreSQL server, which is stopped and started again after half of the trials
taken     four processes, one of which is killed during a trial: time until another resumes the trial
away      two processes in separate folders, one of which is killed during a trial: time until the other trains its
          values again, with a timeout of 5 s

Processes are forked from one that has imported everything, so that a start is fast. Results are kept: run the same
command to continue. Exit code 1 if anything was lost."""

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import one_thread, postgres, save, table

PARTS = ["kills", "workers", "server", "taken", "away"]
KINDS = ("time", "step", "validation", "file", "study", "W&B")
BASE = [
    "DATA.PHANTOMS=4",
    "VALIDATION_SPLIT=0.34",
    "MODEL.UNET.NUM_CHANNELS=[8, 16]",
    "MODEL.UNET.ATTENTION_LEVELS=[false, true]",
    "MODEL.UNET.CROSS_ATTENTION_LEVELS=[false, true]",
    "MODEL.UNET.PLANAR_LEVELS=1",
    "MODEL.CONDITIONING_ENCODER.NUM_CHANNELS=8",
    "DEVICES=cpu",
    "DIFFUSION.STEPS=2",
    "OPTUNA.PRUNER=none",
]
RICH = BASE + [
    "DATA.TARGET_VOLUME_SIZE=16",
    "DATA.TARGET_DRR_SIZE=16",
    "TRAINING.PATCH_SIZE=16",
    "MODEL.EMA_DECAY=0.8",
    "EPOCHS=6",
    "BATCH_SIZE=1",
    "TRAINING.GRADIENT_ACCUMULATION_STEPS=2",
    "TRAINING.AMP=bf16",
    "TRAINING.CLIPPING=dynamic",
    "TRAINING.CLIP_HISTORY=12",
    "TRAINING.LOSS_PHASE_EPOCHS=[2, 2]",
    "TRAINING.COARSE_EPOCHS=[3]",
    "TRAINING.WARMUP_STEPS=4",
    "TRAINING.VALIDATION_FREQ=3",
    "TRAINING.CHECKPOINT_FREQ=2",
]
POOR = BASE + [
    "DATA.TARGET_VOLUME_SIZE=8",
    "DATA.TARGET_DRR_SIZE=8",
    "TRAINING.PATCH_SIZE=8",
    "TRAINING.COARSE_EPOCHS=[]",
    "EPOCHS=1",
    "BATCH_SIZE=4",
    "TRAINING.AMP=off",
    "OPTUNA.PARAMS={TRAINING.LEARNING_RATE: {low: 1.0e-4, high: 1.0e-2, log: true}}",
]


def options(trials: int, sets: list[str]) -> list[str]:
    return ["--study_name", "s", "--n_trials", str(trials), *(x for s in sets for x in ("--set", s))]


def places() -> dict[str, list[tuple]]:
    "Kind of moment -> what is called then."
    import torch
    import wandb
    from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite as sqlite
    from torch.optim.swa_utils import AveragedModel

    import diffx2ct.progress as progress
    import diffx2ct.train as T

    return {
        "step": [(T.Loss, "forward"), (torch.optim.AdamW, "step"), (AveragedModel, "update_parameters")],
        "validation": [(T, "reconstruct"), (progress, "reconstruct")],
        "file": [(os, "fsync"), (os, "replace"), (os, "unlink")],
        "study": [(sqlite, "do_execute"), (sqlite, "do_commit")],
        "W&B": [(wandb, "init"), (wandb.Run, "log"), (wandb.Run, "finish")],
    }


def watch(
    meet: Callable[[str, bool], None],  # called with the kind, before a call (False) and after it (True)
) -> None:
    "Let every call of `places` be noticed, in this process."

    def met(kind, call):
        def wrapped(*a, **k):
            meet(kind, False)
            out = call(*a, **k)
            meet(kind, True)
            return out

        return wrapped

    for kind, calls in places().items():
        for owner, name in calls:
            setattr(owner, name, met(kind, getattr(owner, name)))


def start(
    folder: Path,  # working folder; output goes to `said` in it
    args: list[str],  # of diffx2ct_train
    prepare: Callable[[], None] = lambda: None,  # done in the new process first
    **env: str,
) -> int:  # process id
    "Fork a process that does what diffx2ct_train does."
    if pid := os.fork():
        return pid
    code = 1
    try:
        import diffx2ct.study as S

        os.setsid()
        os.chdir(folder)
        os.environ.update(env)
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(said, stream)
        prepare()
        S.main(args)
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sha(thing) -> str:
    "Of bytes, tensors, and nested lists and dicts of numbers and text."
    import torch

    if isinstance(thing, torch.Tensor):
        return sha(
            [
                str(thing.dtype),
                list(thing.shape),
                hashlib.sha256(thing.contiguous().view(-1).numpy().tobytes()).hexdigest(),
            ]
        )
    if isinstance(thing, dict):
        return sha([[str(k), sha(v)] for k, v in thing.items()])
    if isinstance(thing, list):
        return sha(repr([sha(v) if isinstance(v, (torch.Tensor, dict, list, tuple)) else v for v in thing]).encode())
    return hashlib.sha256(thing if isinstance(thing, bytes) else repr(thing).encode()).hexdigest()


def trials_of(folder: Path, storage: str | None = None) -> list:
    import optuna

    return optuna.load_study(study_name="s", storage=storage or f"sqlite:///{folder}/s.db").trials


def facts(folder: Path) -> dict[str, dict]:
    "Results of a search: aspect -> name -> value, to be equal to the last bit."
    import torch

    from diffx2ct.checkpoint import verify_checksum

    root, out = folder / "checkpoints/s", {}
    for p in sorted(root.rglob("*.safetensors")):
        out.setdefault("weights, EMA, best model and their headers", {})[str(p.relative_to(root))] = sha(p.read_bytes())
    for p in sorted(root.rglob("training_*.pt")):
        state, name = torch.load(p, weights_only=True), str(p.relative_to(root))
        h = state.pop("history")
        for aspect, part in (
            ("optimizer state, step, averages", state),
            ("losses", h["losses"]),
            ("gradient norms and thresholds", [h["norms"], h["thresholds"]]),
            ("validation values, best value", [h["values"], h["best"], h["bad"]]),
        ):
            out.setdefault(aspect, {})[name] = sha(part)
    for p in sorted(root.rglob("history.json")):  # of finished trials, which keep no state
        h, name = json.loads(p.read_text()), str(p.relative_to(root))
        out.setdefault("histories of finished trials", {})[name] = repr(h)
    for t in trials_of(folder):
        out.setdefault("trials: number, state, parameters, value, reports", {})[t.number] = repr(
            (
                t.state.name,
                sorted(t.params.items()),
                t.value,
                sorted(t.intermediate_values.items()),
                sorted(t.user_attrs.keys()),
            )
        )
    out["phantoms and views"] = {
        str(p.relative_to(folder)): sha(p.read_bytes()) for p in sorted((folder / "data").rglob("*.*"))
    }
    out["files that are damaged or left over"] = {
        str(p.relative_to(folder)): "?"
        for p in sorted(folder.rglob("*"))
        if p.is_file()
        and (
            p.name.startswith(".tmp")
            or root in p.parents
            and p.suffix in (".pt", ".safetensors")
            and verify_checksum(p)
        )
    }
    return out


def kills(
    many: int,
    seed: int,
    home: Path,  # for working folders
    path: Path,  # of the result: runs that are there are kept, and every new one is written at once
) -> dict:
    "Kill runs until there were `many` kills."
    args, offline = options(2, RICH), dict(WANDB_MODE="offline", WANDB_SILENT="true")
    runs = json.loads(path.read_text())["runs"] if path.exists() else []

    def fresh(name):
        (home / name).mkdir()
        return home / name

    def count():
        calls = Counter()
        watch(lambda kind, after: calls.update([kind] * (not after)))
        real = os._exit

        def leave(code):
            Path("calls.json").write_text(json.dumps(dict(calls=calls, modules=list(sys.modules))))
            real(code)

        os._exit = leave

    peace, began = fresh("peace"), time.monotonic()
    if ended(start(peace, args, count, **offline)):
        sys.exit(f"the search that nobody kills has failed:\n{(peace / 'said').read_text()}")
    seconds, met, want = time.monotonic() - began, json.loads((peace / "calls.json").read_text()), facts(peace)
    for name in met["modules"]:  # what it has imported late, so that the others need not
        try:
            importlib.import_module(name)
        except ImportError:
            pass
    calls = met["calls"]
    if not runs:
        command = fresh("command")
        subprocess.run(
            [Path(sys.executable).with_name("diffx2ct_train"), *args],
            cwd=command,
            env=os.environ | offline,
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )
        runs.append(dict(run="the command itself, in peace", kills=[], differs=unequal(facts(command), want)))
    result = dict(seconds=seconds, calls=calls, compared={k: len(v) for k, v in want.items()}, runs=runs)
    done = sum(len(r["kills"]) for r in runs)
    while done < many:
        folder, hit, rng = fresh(f"run{len(runs)}"), [], random.Random(f"{seed} {len(runs)}")
        if len(runs) % 4:
            shutil.copytree(peace / "data", folder / "data")  # every fourth makes its phantoms as well
        while True:
            kind, share, after = rng.choice(KINDS), rng.random(), rng.random() < 0.5
            at = share * seconds / 4 if kind == "time" else 1 + int(share * calls[kind] / 4)

            def trap(kind=kind, at=at, after=after):
                met = Counter()

                def meet(k, a):
                    if k == kind and a == after:
                        met[k] += 1
                        if met[k] >= at:
                            os.kill(os.getpid(), signal.SIGKILL)

                watch(meet)

            off = done + len(hit) >= many
            pid = start(folder, args, (lambda: None) if off or kind == "time" else trap, **offline)
            if kind == "time" and not off:
                until = time.monotonic() + at
                running = os.WEXITED | os.WNOHANG | os.WNOWAIT
                while time.monotonic() < until and os.waitid(os.P_PID, pid, running) is None:
                    time.sleep(0.002)
                os.kill(pid, signal.SIGKILL)  # does nothing if the process has ended
            code = ended(pid)
            if code != -signal.SIGKILL:
                break
            hit.append(dict(kind=kind, at=round(at, 3), after=after))
        done += len(hit)
        runs.append(
            dict(
                run=len(runs),
                kills=hit,
                differs=unequal(facts(folder), want)
                if code == 0
                else {"exit code": [code, (folder / "said").read_text()[-300:]]},
            )
        )
        save(path, result)
        shutil.rmtree(folder)
        print(
            f"run {len(runs) - 1}: {len(hit)} kills, "
            + (f"DIFFERS in {runs[-1]['differs']}" if runs[-1]["differs"] else "equal"),
            flush=True,
        )
    return result


def unequal(got: dict, want: dict) -> dict[str, list]:
    "Aspect -> names that differ."
    return {
        k: bad
        for k in want | got
        if (
            bad := [str(n) for n in want.get(k, {}) | got.get(k, {}) if want.get(k, {}).get(n) != got.get(k, {}).get(n)]
        )
    }


def show_kills(r: dict) -> str:
    rows = [
        dict(
            moment=kind if kind != "time" else "any (after a drawn time)",
            **{
                "kills": sum(k["kind"] == kind for x in r["runs"] for k in x["kills"]),
                "before, after the call": "-"
                if kind == "time"
                else " + ".join(
                    str(sum(k["kind"] == kind and k["after"] == a for x in r["runs"] for k in x["kills"]))
                    for a in (False, True)
                ),
                "runs with such a kill": len(
                    hit := [x for x in r["runs"] if any(k["kind"] == kind for k in x["kills"])]
                ),
                "of them equal to the bit": sum(not x["differs"] for x in hit),
            },
        )
        for kind in KINDS
    ]
    every = [x for x in r["runs"] if x["kills"]]
    rows.append(
        dict(
            zip(
                rows[0],
                ("all", sum(len(x["kills"]) for x in every), "", len(every), sum(not x["differs"] for x in every)),
            )
        )
    )
    return "### Kills\n\n" + table(rows) + "\n\nCompared: " + ", ".join(f"{k} ({n})" for k, n in r["compared"].items())


def share_study(
    home: Path,
    trials: int,
    workers: int,
    storage: str | None = None,
    disturb: Callable[
        [list[int], Path], dict
    ] = lambda pids, folder: {},  # called while they work; what it returns goes into the result
    sets: list[str] = POOR,
) -> dict:
    "Let processes share a study in one folder, and see what became of every trial."
    home.mkdir()

    def note():
        import diffx2ct.study as S

        real = S.run_trial

        def run_trial(study, trial, *a):
            with open("begun", "a") as f:
                f.write(f"{trial.number} {os.getpid()} {time.monotonic()}\n")
            real(study, trial, *a)

        S.run_trial = run_trial

    began = time.monotonic()
    args = options(trials, sets + ([f"OPTUNA.STORAGE={storage}"] if storage else []))
    pids = [start(home, args, note, WANDB_MODE="disabled") for _ in range(workers)]
    more = disturb(pids, home)
    codes = [ended(p) for p in pids]
    said, begun, there = (home / "said").read_text(errors="replace"), begun_in(home), trials_of(home, storage)
    states = Counter(t.state.name for t in there)
    times = Counter(n for n, _, _ in begun)
    return dict(
        workers=workers,
        trials=trials,
        seconds=round(time.monotonic() - began, 1),
        states=dict(states),
        lost=trials - states["COMPLETE"],
        doubled=len(there) - len({t.params["TRAINING.LEARNING_RATE"] for t in there}),
        taken_up_again=sum(n > 1 for n in times.values()),
        without_checkpoint=sum(
            not any((home / f"checkpoints/s/trial_{t.number}").glob("*.safetensors")) for t in there
        ),
        locked_said=said.count("locked"),
        tracebacks=said.count("Traceback"),
        exit_codes=sorted(codes),
        complaints=[line for line in said.splitlines() if "diffx2ct:" in line and "waiting, then" not in line],
        by_worker=sorted(Counter(p for _, p, _ in begun).values()),
        **more,
    )


def begun_in(folder: Path) -> list[tuple[int, int, float]]:  # trial, process, monotonic time
    return (
        [(int(a), int(b), float(c)) for a, b, c in map(str.split, (folder / "begun").read_text().splitlines())]
        if (folder / "begun").exists()
        else []
    )


def wait_until(true: Callable, pids: list[int], limit: float = 600):
    "Wait while the workers live."
    until = time.monotonic() + limit
    while not (got := true()):
        if time.monotonic() > until or os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            sys.exit("the workers have ended before anything could be done to them")
        time.sleep(0.002)
    return got


def with_server(home: Path, trials: int, workers: int) -> dict:
    "The same on PostgreSQL, which is killed and started again half-way."
    with postgres() as (url, restart):

        def disturb(pids, folder):
            wait_until(lambda: len(begun_in(folder)) > trials / 2, pids)
            restart()
            return dict(restarted_after=len(begun_in(folder)))

        return share_study(home, trials, workers, url, disturb)


def taken(home: Path, workers: int) -> dict:
    "Kill a worker in mid-trial, after its first checkpoint."
    killed = {}

    def disturb(pids, folder):
        def ready():
            return next(
                (
                    x
                    for x in begun_in(folder)
                    if any((folder / f"checkpoints/s/trial_{x[0]}").glob("model_*.safetensors"))
                    and not any((folder / f"checkpoints/s/trial_{x[0]}").glob("model_000040*"))
                ),
                None,
            )

        n, pid, _ = wait_until(ready, pids)
        os.kill(pid, signal.SIGKILL)
        killed.update(trial=n, pid=pid, at=time.monotonic())
        return {}

    r = share_study(
        home,
        2 * workers,
        workers,
        None,
        disturb,
        [*POOR, "EPOCHS=40", "TRAINING.VALIDATION_FREQ=20", "TRAINING.VISUALIZATION_FREQ=40"],
    )
    again = next((x for x in begun_in(home) if x[0] == killed["trial"] and x[1] != killed["pid"]), None)
    return r | dict(
        killed_trial=killed["trial"],
        seconds_until_taken_up=again and round(again[2] - killed["at"], 2),
        went_on_from_a_checkpoint=f"trial {killed['trial']}: going on from step" in (home / "said").read_text(),
    )


def away(home: Path) -> dict:
    "Kill a worker whose checkpoints nobody else sees."
    there, here, storage, grace = home / "there", home / "here", f"sqlite:///{home}/s.db", 5
    for folder in (home, there, here):
        folder.mkdir()
    args = options(
        2,
        [
            *POOR,
            "EPOCHS=40",
            "TRAINING.VALIDATION_FREQ=20",
            "TRAINING.VISUALIZATION_FREQ=40",
            f"OPTUNA.STORAGE={storage}",
            f"OPTUNA.GRACE={grace}",
        ],
    )
    gone = start(there, args, WANDB_MODE="disabled")
    wait_until(lambda: any(there.glob("checkpoints/s/trial_0/model_*.safetensors")), [gone])
    other = start(here, args, WANDB_MODE="disabled")
    wait_until(lambda: (here / "checkpoints/s/trial_1").exists(), [gone, other])  # it has begun another
    os.kill(gone, signal.SIGKILL)
    killed, codes = time.time(), [ended(gone), ended(other)]
    trials, said = trials_of(home, storage), (here / "said").read_text(errors="replace")
    again = next((t for t in trials if t.user_attrs.get("instead_of") == 0), None)
    return dict(
        workers=2,
        grace=grace,
        states=[t.state.name for t in trials],
        why=trials[0].user_attrs.get("failed"),
        same_values=bool(again) and again.params == trials[0].params,
        seconds_until_tried_again=again and round(again.datetime_start.timestamp() - killed, 1),
        tracebacks=said.count("Traceback"),
        exit_codes=codes,
    )


def sound(name: str, r: dict) -> bool:
    "True if nothing was lost."
    if name == "away":
        return (
            r["states"] == ["FAIL", "COMPLETE", "COMPLETE"]
            and r["same_values"]
            and not r["tracebacks"]
            and r["exit_codes"] == [-signal.SIGKILL, 0]
        )
    if name == "kills":
        return not any(x["differs"] for x in r["runs"])
    died = [-signal.SIGKILL] if name == "taken" else []
    return (
        not (r["lost"] or r["doubled"] or r["without_checkpoint"] or r["locked_said"] or r["tracebacks"])
        and r["exit_codes"] == died + [0] * (r["workers"] - len(died))
        and (name != "taken" or r["went_on_from_a_checkpoint"])
    )


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts (default: all)")
    p.add_argument("--kills", type=int, default=100, help="default: %(default)s")
    p.add_argument("--trials", type=int, default=200, help="of a shared study (default: %(default)s)")
    p.add_argument("--workers", type=int, default=4, help="processes that share it (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    p.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results (default: %(default)s)")
    a = p.parse_args(argv)
    import optuna
    import wandb  # noqa: F401  imported before forking

    import diffx2ct.study  # noqa: F401

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parts = {
        "kills": lambda d: kills(a.kills, a.seed, d, a.out / "kills.json"),
        "workers": lambda d: share_study(d / "w", a.trials, a.workers),
        "server": lambda d: with_server(d / "w", a.trials, a.workers),
        "taken": lambda d: taken(d / "w", a.workers),
        "away": lambda d: away(d / "w"),
    }
    bad = []
    with tempfile.TemporaryDirectory() as home:
        for name in a.only:
            (Path(home) / name).mkdir()
            r = parts[name](Path(home) / name)
            save(a.out / f"{name}.json", r)
            print(
                show_kills(r)
                if name == "kills"
                else f"### {name}\n\n" + table([{"what": k, "figure": str(v)} for k, v in r.items()]),
                end="\n\n",
                flush=True,
            )
            if not sound(name, r):
                bad.append(name)
    if bad:
        sys.exit(f"something was lost: {', '.join(bad)}")


if __name__ == "__main__":
    one_thread(main)
