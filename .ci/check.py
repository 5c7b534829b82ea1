"""Run the checks and count them. Called by run_tests.sh, which sets the environment.

Without words: everything. `quick`: without slow cells, chapters and tests, types and site. Names of chapters (02a),
modules (diffusion) or test files (wiring): the chapter's cells and the tests of its module, slow ones too. Notebooks
and test files run in processes forked from one that has imported the large packages and the modules of this one, two at
a time, so nobody waits for those imports."""

import gc
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
WORKERS, TIMEOUT = 2, 1200  # processes at once; seconds a notebook may take, a third of what a file of tests may
LARGE = "numpy torch matplotlib.pyplot pytest nbdev.test monai.metrics diffusers SimpleITK pydicom optuna"
words = [word for word in sys.argv[1:] if word]
quick = bool(words)
passed, failed, skipped = 0, [], 0


def report(name: str, ok: bool, seconds: float, words: str = ""):
    "Count one check and print its line, with its output where it failed."
    global passed
    print(f"{'ok    ' if ok else 'FAILED'} {seconds:6.1f} s  {name}", flush=True)
    if ok:
        passed += 1
    else:
        failed.append(name)
        print(words.rstrip(), flush=True)


def run(*args: str) -> tuple[bool, float, str]:  # success, seconds, output
    "Run a command."
    start = time.time()
    how = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        p = subprocess.run(args, encoding="utf-8", errors="replace", timeout=TIMEOUT, **how)
        return p.returncode == 0, time.time() - start, p.stdout
    except subprocess.TimeoutExpired as e:
        text = (e.stdout or b"").decode(errors="replace")
        return False, time.time() - start, f"{text}\nstopped after {TIMEOUT} s"


def tool(name: str, *args: str) -> tuple[bool, float, str]:
    "Run a command of the environment."
    return run(str(Path(sys.executable).with_name(name)), *args)


def sources() -> dict:
    return {
        p: hashlib.sha256(p.read_bytes()).digest()
        for d in ("nbs", "diffx2ct")
        for p in Path(d).rglob("*")
        if p.is_file() and p.suffix in (".ipynb", ".py")
    }


def check_drift():
    "Cleaning and exporting change nothing: notebooks are clean, and the package equals what they export."
    for command in ("nbdev_clean", "nbdev_export"):
        before = sources()
        ok, seconds, text = tool(command)
        after = sources()
        changed = sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
        if changed:
            text += f"{command} changed {', '.join(changed)}: look at the change and commit it"
        report(f"{command} changes nothing", ok and not changed, seconds, text)


@dataclass
class Job:
    "A notebook, or a file of tests, and the process that runs it."

    path: Path
    keyword: str = ""  # of `pytest -k`
    slow: bool = False  # with what is marked slow
    started: float = 0.0
    output: IO = field(default_factory=tempfile.TemporaryFile)
    results: Path = field(default_factory=lambda: Path(tempfile.mkstemp(suffix=".xml")[1]))

    def work(self) -> int:  # exit code
        "Run in this process."
        sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT / ".ci"]
        if self.path.suffix == ".ipynb":
            from nbdev.test import test_nb

            skip, force = ["notest", "slow", "cuda"], ["slow"] if self.slow else []
            return not test_nb(self.path.resolve(), skip_flags=skip, force_flags=force)[0]
        import pytest

        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is needed, and they take two seconds to load
        select = [] if self.slow else ["-m", "not slow"]
        select += ["-k", self.keyword] if self.keyword else []
        how = ["-q", "-ra", "-p", "no:cacheprovider", f"--junitxml={self.results}"]
        return pytest.main([*how, *select, str(self.path)]) not in (0, 5)  # 5: no test is left

    def start(self) -> int:  # process id
        self.started = time.time()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            for stream in (1, 2):
                os.dup2(self.output.fileno(), stream)
            code = int(self.work())
            sys.stdout.flush()
        finally:
            os._exit(code)

    def done(self, ok: bool, cpu: float):
        "Count what it found."
        global passed, skipped
        self.output.seek(0)
        text = self.output.read().decode(errors="replace")
        name = f"{self.path}{f' -k {self.keyword!r}' if self.keyword else ''}"
        if self.path.suffix == ".ipynb":
            return report(name, ok, cpu, text)
        try:
            cases = list(ET.parse(self.results).iter("testcase"))
        except ET.ParseError:
            return report(name, False, cpu, f"{text}\npytest ended without a report")
        bad = [c for c in cases if any(c.find(k) is not None for k in ("failure", "error"))]
        left_out = [c for c in cases if c not in bad and c.find("skipped") is not None]
        print(f"{'FAILED' if bad or not ok else 'ok    '} {cpu:6.1f} s  {name}, {len(cases)} tests", flush=True)
        if bad or not ok or left_out:
            print(text.rstrip(), flush=True)
        failed.extend([f"{c.get('classname')}::{c.get('name')}" for c in bad] or ([] if ok else [name]))
        passed, skipped = passed + len(cases) - len(bad) - len(left_out), skipped + len(left_out)


def run_jobs(jobs: list[Job]):
    "Run all jobs, WORKERS at a time, each in a forked process; seconds are those of CPU."
    for name in LARGE.split():
        importlib.import_module(name)
    for path in Path("diffx2ct").glob("[!_]*.py"):
        with suppress(Exception):  # what uses a broken module reports it
            importlib.import_module(f"diffx2ct.{path.stem}")
    gc.freeze()  # what is here for good need not be looked through by every process
    running: dict[int, Job] = {}
    while jobs or running:
        while jobs and len(running) < WORKERS:
            job = jobs.pop(0)
            running[job.start()] = job
        pid, status, used = os.wait4(-1, os.WNOHANG)
        if pid in running:
            job = running.pop(pid)
            job.done(status == 0, used.ru_utime + used.ru_stime)
            job.results.unlink(missing_ok=True)
        for pid, job in running.items():
            limit = TIMEOUT * (1 if job.path.suffix == ".ipynb" else 3)
            if time.time() - job.started > limit:
                job.output.write(f"\nstopped after {limit} s".encode())
                os.killpg(pid, signal.SIGKILL)
                job.started = time.time()
        time.sleep(0.02)


def is_slow(notebook: Path) -> bool:
    "Whether the whole chapter is slow: its first code cell has the flag."
    first = next(c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code")
    return "#| slow\n" in "".join(first["source"]) + "\n"


def module_of(notebook: Path) -> str:
    "The module that a notebook exports."
    marker = '"#| default_exp '
    return next((x.split(marker)[1].split('"')[0].split("\\n")[0] for x in [notebook.read_text()] if marker in x), "")


def chosen(name: str) -> list[Job]:
    "The checks of a chapter, a module or a file of tests."
    if (tests := Path(f"tests/test_{name}.py")).is_file():
        return [Job(tests, slow=True)]
    sys.path.insert(0, str(ROOT / "benchmarks/mutants"))
    import run as mutants  # its table lists which tests notice an error in which module

    sys.path.pop(0)
    for p in sorted(Path("nbs").glob("*.ipynb")):
        module = module_of(p)
        if name in (p.stem, p.stem.split("_")[0], module):
            checks = [c.partition(" ") for c in mutants.CHECKS.get(module, []) if not c.endswith(".ipynb")]
            return [Job(p, slow=True), *(Job(Path(path), keyword, slow=True) for path, _, keyword in checks)]
    print(f"diffx2ct: {name} is not a chapter, a module or a file of tests; use a name such as 02a", file=sys.stderr)
    sys.exit(2)


def all_jobs() -> list[Job]:
    "Every notebook and every file of tests, the largest first."
    notebooks = [p for p in Path("nbs").glob("*.ipynb") if p.name[0] not in "_." and not (quick and is_slow(p))]
    tests = list(Path("tests").glob("test_*.py"))
    return [Job(p, slow=not quick) for p in [*sorted(notebooks), *sorted(tests, key=lambda p: -p.stat().st_size)]]


def main():
    started = time.time()
    jobs = all_jobs() if words in ([], ["quick"]) else [job for word in words for job in chosen(word)]
    check_drift()
    report("README.md agrees with nbs/index.ipynb", *run(sys.executable, ".ci/readme.py", "--check"))
    report("one format (ruff format)", *tool("ruff", "format", "--check", "."))
    report("no likely bugs (ruff check)", *tool("ruff", "check", "."))
    if not quick:
        report("types agree (mypy)", *run(sys.executable, "-m", "mypy"))
        report("the book is a whole site", *run(sys.executable, ".ci/book.py"))
    run_jobs(jobs)
    for name in failed:
        print("failed:", name)
    used = sum(os.times()[:4])
    print(f"{used:.0f} CPU seconds, {time.time() - started:.0f} s")
    print(f"{passed} passed, {len(failed)} failed" + (f", {skipped} skipped" if skipped else ""))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
