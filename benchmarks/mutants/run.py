"""Would the tests notice? Plants the bugs of `mutants.py` one at a time and runs the tests most likely to notice each.

python benchmarks/mutants/run.py                       every bug that has no result yet: two CPU hours
python benchmarks/mutants/run.py --only drr metrics    the bugs of some modules
python benchmarks/mutants/run.py --first               the quickest check of each bug only: half an hour
python benchmarks/mutants/run.py --survivors           those that were not noticed, once more
python benchmarks/mutants/run.py --list                the bugs, nothing is run

The project is copied to a temporary folder. A bug is planted in the chapter's export cell and in the exported module,
the checks of its module (`CHECKS` below) run one after another until one fails, and the bug is taken out again. Each
check runs in a separate process, forked from one that has imported the large packages, and is ended after five times
as long as it takes without a bug. Results are kept in `results.json` after each bug, so that the same command goes on;
`README.md` is written from them. Exit code 1 where fewer than 85 % of all bugs with a result, or fewer than 70 % of
those of a module, were noticed; 2 where a text no longer stands exactly once, or a check fails without a bug."""

import argparse
import gc
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
from mutants import LEFT, MUTANTS

RESULTS, TABLE = HERE / "results.json", HERE / "README.md"
ALL, EACH = 0.85, 0.70  # share of bugs that must be noticed: of all, and of each module
LARGE = (
    "numpy torch torch.distributed.tensor matplotlib.pyplot pytest nbdev.test monai.metrics diffusers SimpleITK optuna"
)
HERE_ALONE = "not browser and not cuda"  # tests that run on any machine

# Module -> checks, the quickest first: a test file with an expression for `pytest -k`, or a chapter.
CHECKS = {
    "drr": ["tests/test_wiring.py drr", "nbs/00a_drr.ipynb", "tests/test_wiring.py encoder"],
    "consistency": ["tests/test_wiring.py consisten", "nbs/00d_consistency.ipynb"],
    "measures": ["nbs/00h_measures.ipynb"],
    "metrics": ["tests/test_wiring.py metrics", "nbs/00e_metrics.ipynb"],
    "augment": ["tests/test_wiring.py augment", "nbs/00f_augment.ipynb"],
    "encoder": ["tests/test_wiring.py encoder", "nbs/01_encoder.ipynb"],
    "unet": ["tests/test_wiring.py unet", "nbs/02_unet.ipynb"],
    "diffusion": [
        "tests/test_wiring.py diffusion and not stored",
        "tests/test_wiring.py stored and diffusion",
        "nbs/02a_diffusion.ipynb",
    ],
    "parallel": ["tests/test_wiring.py parallel", "nbs/03c_pipeline.ipynb", "nbs/03_parallel.ipynb"],
    "ranks": ["tests/test_wiring.py ranks", "nbs/03a_ranks.ipynb"],
    "pipeline": ["tests/test_wiring.py pipeline", "nbs/03c_pipeline.ipynb"],
    "checkpoint": ["tests/test_wiring.py checkpoint", "nbs/03b_checkpoint.ipynb"],
    "lesions": ["tests/test_wiring.py lesions", "nbs/04c_lesions.ipynb"],
    "basics": ["tests/test_data_rules.py", "nbs/00_basics.ipynb"],
    "config": ["tests/test_data_rules.py", "nbs/00_config.ipynb", "tests/test_wiring.py consistency"],
    "data": ["tests/test_data_rules.py", "nbs/00_data.ipynb", "tests/test_wiring.py consistency"],
    "scans": ["tests/test_scan_rules.py", "nbs/00b_scans.ipynb", "tests/test_prepare.py"],
    "phantom": ["tests/test_phantom.py", "nbs/00c_phantom.ipynb"],
    "reconstruct": [
        "tests/test_wiring.py reconstruct",
        "tests/test_judging_rules.py noise",
        "nbs/02b_reconstruct.ipynb",
    ],
    "train": [
        "tests/test_training_rules.py average_follows or views_of or best_one",
        "tests/test_training_rules.py",
        "tests/test_determinism.py",
        "nbs/04_train_optuna.ipynb",
    ],
    "batches": ["tests/test_training_rules.py order_of or coarse_stage", "nbs/03g_batches.ipynb"],
    "resume": ["tests/test_training_rules.py memory or means or state_is", "nbs/03h_resume.ipynb"],
    "progress": ["nbs/03i_progress.ipynb"],
    "commands": ["nbs/00_commands.ipynb", "tests/test_packaging.py heavy", "tests/test_evaluate.py"],
    "cases": ["nbs/03e_cases.ipynb", "tests/test_training_rules.py", "tests/test_chest.py"],
    "reporting": ["nbs/03f_reporting.ipynb", "tests/test_reporting.py"],
    "study": [
        "tests/test_training_rules.py without_a_pruner or lags or highest",
        "nbs/04d_study.ipynb",
        "tests/test_training.py",
    ],
    "evaluate": [
        "tests/test_judging_rules.py second or means or figures or evaluation or machine",
        "nbs/04a_evaluate.ipynb",
        "tests/test_evaluate.py",
    ],
    "uncertainty": [
        "tests/test_judging_rules.py factors or kind or distance or half or limits or turned or fitted",
        "nbs/04b_uncertainty.ipynb",
        "tests/test_uncertainty.py",
    ],
    "two_images": [
        "tests/test_two_images_rules.py",
        "tests/test_two_images.py window or monochrome1 or orientation or magnification",
        "nbs/05a_two_images.ipynb",
    ],
    "drawing": ["tests/test_viewer.py", "nbs/04e_drawing.ipynb"],
    "volumes": ["tests/test_viewer.py", "nbs/04f_volumes.ipynb"],
    "viewer": ["tests/test_viewer.py", "nbs/04g_viewer.ipynb"],
    "report": ["tests/test_viewer.py", "nbs/04h_report.ipynb"],
    "visualize": ["nbs/05_visualize.ipynb", "tests/test_shipped.py"],
    "verbs": ["nbs/05b_python.ipynb", "tests/test_shipped.py"],
    "app": ["nbs/05c_app.ipynb"],
    "optimizer": ["tests/test_optimizer.py", "nbs/03d_optimizer.ipynb"],
    "radiograph": ["tests/test_film_rules.py", "tests/test_film.py physics", "nbs/00g_radiograph.ipynb"],
    "calibrate": ["tests/test_calibrate_rules.py", "nbs/01a_calibrate.ipynb"],
    "align": ["tests/test_align.py", "nbs/01b_align.ipynb", "tests/test_film.py tables"],
}


def chapter_of(root: Path, module: str) -> Path:
    "The notebook a module is exported from."
    text = (root / f"diffx2ct/{module}.py").read_text(encoding="utf-8")
    return root / re.search(r"File to edit: \.\./(\S+\.ipynb)", text)[1]


def planted(
    root: Path,  # a copy of the project
    module: str,  # where the text stands
    old: str,
    new: str,
) -> dict[Path, str]:  # file -> its text with the bug
    "The edit in the module and in its chapter; an error where the text does not stand exactly once in each."
    path = root / f"diffx2ct/{module}.py"
    text, chapter = path.read_text(encoding="utf-8"), chapter_of(root, module)
    book = json.loads(chapter.read_text(encoding="utf-8"))
    cells = [c for c in book["cells"] if c["cell_type"] == "code" and re.match(r"#\|\s*export", "".join(c["source"]))]
    found = {module + ".py": text.count(old), chapter.name: sum("".join(c["source"]).count(old) for c in cells)}
    if set(found.values()) != {1}:
        raise ValueError("the text does not stand exactly once: " + ", ".join(f"{v} in {k}" for k, v in found.items()))
    for c in cells:
        c["source"] = "".join(c["source"]).replace(old, new).splitlines(keepends=True)
    return {path: text.replace(old, new), chapter: json.dumps(book, indent=1, ensure_ascii=False) + "\n"}


clock = itertools.count(int(time.time()), 10)


def put(files: dict[Path, str]) -> None:
    "Write files, each time with a later date, so that no compiled file of an earlier text is taken for theirs."
    now = next(clock)
    for p, text in files.items():
        p.write_text(text, encoding="utf-8")
        os.utime(p, (now, now))


@contextmanager
def edited(files: dict[Path, str]):
    "Files with another text, for a while."
    before = {p: p.read_text(encoding="utf-8") for p in files}
    try:
        put(files)
        yield
    finally:
        put(before)


def work(root: Path, check: str, told: int) -> int:  # exit code
    "A check, in its own process; the name of what failed goes to the pipe `told`."
    os.chdir(root)
    sys.path[:] = [str(root), *(p for p in sys.path if Path(p).resolve() not in (ROOT, HERE))]
    os.environ |= {"PYTHONPATH": str(root), "WANDB_MODE": "disabled", "MPLBACKEND": "agg"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is needed, and together they take seconds
    import diffx2ct

    assert Path(diffx2ct.__file__).is_relative_to(root), diffx2ct.__file__
    if check.endswith(".ipynb"):
        from nbdev.test import test_nb

        passed, _ = test_nb(root / check, skip_flags=["cuda", "notest"])
        if not passed:
            os.write(told, check.encode())
        return int(not passed)
    import pytest

    class First:
        def pytest_runtest_logreport(self, report):
            if report.failed:
                os.write(told, f"{report.nodeid}\n".encode())

    path, _, expression = check.partition(" ")
    words = ["-k", expression] if expression else []
    code = pytest.main(
        ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", "-m", HERE_ALONE, *words, path], plugins=[First()]
    )
    if code and code != 1:
        os.write(told, f"{path} does not run\n".encode())  # such as an import that fails
    return int(code != 0)


def run(root: Path, check: str, limit: float) -> tuple[bool, str, float]:  # passed, what failed, seconds
    "A check in a forked process, ended after `limit` seconds."
    read, write = os.pipe()
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()
            os.close(read)
            log = os.open(root / "check.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = work(root, check, write)
        except BaseException as e:  # noqa: B036
            os.write(write, f"{type(e).__name__} in {check}\n".encode())
        finally:
            os._exit(code)
    os.close(write)
    status = None
    while status is None and time.monotonic() < start + limit:
        done, code = os.waitpid(pid, os.WNOHANG)
        status = code if done else time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # with all processes it has started
    if status is None:
        os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as f:
        os.set_blocking(f.fileno(), False)
        said = (f.read() or b"").decode().splitlines()
    what = said[0] if said else check if status is not None else f"time limit of {limit:.0f} s, {check}"
    return status == 0, what.replace(f"{root}/", ""), time.monotonic() - start


def copy(to: Path) -> Path:
    "The project without what git ignores."
    names = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in names.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name, follow_symlinks=False)
    return to


def mutants(only: list[str] | None = None) -> list[tuple[str, str, str, str, str, str]]:
    "Module, name, text, text with the bug, what goes wrong, module in which the text stands."
    return [(m, *e[:4], e[4] if len(e) > 4 else m) for m in only or MUTANTS for e in MUTANTS[m]]


def mark(old: str, new: str) -> str:
    "True if a result is of this edit."
    return hashlib.sha256(f"{old}\0{new}".encode()).hexdigest()[:12]


def table(results: dict[str, dict]) -> tuple[str, bool]:
    "The README, and whether the bars are met."
    rows, planted_all, killed_all, left, met = [], 0, 0, [], True
    for module, edits in MUTANTS.items():
        mine = {e[0]: r for e in edits if (r := results.get(f"{module}/{e[0]}")) and r["mark"] == mark(e[1], e[2])}
        killed = sum(r["status"] == "killed" for r in mine.values())
        planted_all, killed_all = planted_all + len(mine), killed_all + killed
        met &= killed >= EACH * len(mine)
        share = f"{killed / len(mine):.0%}" if mine else "not run"
        rows.append(f"| {module} | {len(edits)} | {len(mine)} | {killed} | {share} |")
        for name, _, _, why, *_ in edits:
            if name in mine and mine[name]["status"] != "killed":
                reason = LEFT.get((module, name), "no test notices it yet")
                left.append(f"| {module} | {name} | {why} | {reason} |")
    met &= killed_all >= ALL * planted_all
    total = f"{killed_all / planted_all:.0%}" if planted_all else "not run"
    rows.append(f"| **all** | {sum(map(len, MUTANTS.values()))} | {planted_all} | {killed_all} | **{total}** |")
    text = f"""# Mutants

Plausible bugs, planted one at a time, and how many of them the tests notice. `mutants.py` lists the bugs, `run.py`
plants them (`--help`), `results.json` names the check that noticed each.
The bar is {ALL:.0%} of all and {EACH:.0%} of each module.

| module | bugs | run | noticed | share |
|---|---|---|---|---|
{chr(10).join(rows)}

## Not noticed

| module | bug | what goes wrong | reason |
|---|---|---|---|
{chr(10).join(left) or "| | none | | |"}
"""
    return text, met


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", metavar="MODULE", choices=list(MUTANTS), help="bugs of these modules")
    p.add_argument("--name", help="only bugs whose name contains this")
    p.add_argument("--list", action="store_true", help="name the bugs and end")
    p.add_argument(
        "--first", action="store_true", help="run only the first check of each module, which is the quickest"
    )
    p.add_argument("--survivors", action="store_true", help="run again those that were not noticed")
    p.add_argument("--again", action="store_true", help="run again those that have a result")
    a = p.parse_args()
    chosen = [m for m in mutants(a.only) if not a.name or a.name in m[1]]
    if a.list:
        for module, name, *_, why, _ in chosen:
            print(f"{module:12} {name:40} {why}")
        return 0
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results = {k: r for k, r in results.items() if k in {f"{m[0]}/{m[1]}" for m in mutants()}}
    for name in os.environ.keys() & {"RANK", "WORLD_SIZE", "IN_TEST"}:
        del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in LARGE.split():
        importlib.import_module(name)
    gc.freeze()  # what is here for good need not be looked through by every process
    limits: dict[str, float] = {}
    broken = 0
    with tempfile.TemporaryDirectory(prefix="diffx2ct-mutants-") as scratch:
        root = copy(Path(scratch).resolve() / "project")
        for module, name, old, new, _, where in chosen:
            known = results.get(f"{module}/{name}", {})
            if (
                known.get("mark") == mark(old, new)
                and not a.again
                and not (a.survivors and known["status"] == "survived")
            ):
                continue
            try:
                files = planted(root, where, old, new)
            except ValueError as e:
                print(f"ERROR    {module}: {name}: {e}", flush=True)
                broken += 1
                continue
            found = dict(mark=mark(old, new), status="survived", by="", seconds=0.0)
            for check in CHECKS[module][: 1 if a.first else None]:
                if check not in limits:
                    passed, what, seconds = run(root, check, 3600)
                    if not passed:
                        log = (root / "check.log").read_text(encoding="utf-8")
                        print(f"ERROR    {what} fails without a bug:\n{log[-3000:]}")
                        return 2
                    limits[check] = max(60, 5 * seconds)
                with edited(files):
                    passed, what, seconds = run(root, check, limits[check])
                found["seconds"] = round(found["seconds"] + seconds, 1)
                if not passed:
                    found |= dict(status="killed", by=what)
                    break
            results[f"{module}/{name}"] = found
            RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
            print(f"{found['status']:8} {module}: {name} ({found['seconds']:.0f} s) {found['by']}", flush=True)
    text, met = table(results)
    TABLE.write_text(text, encoding="utf-8")
    print(text)
    return 2 if broken else int(not met)


if __name__ == "__main__":
    sys.exit(main())
