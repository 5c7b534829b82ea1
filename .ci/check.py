"Run all checks and count them. Called by run_tests.sh, which sets the environment."

import hashlib
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

WORKERS, TIMEOUT = (
    2,
    1200,
)  # notebooks, or files of tests, at once; seconds a notebook may take, a third of what such a file may
quick = "quick" in sys.argv[1:]
notebooks = sorted(p for p in Path("nbs").glob("*.ipynb") if p.name[0] not in "_.")
passed, failed, skipped = 0, [], 0


def report(name: str, ok: bool, seconds: float, words: str = ""):
    "Count one check and print its line; what it said is shown when it failed."
    global passed
    print(f"{'ok    ' if ok else 'FAILED'} {seconds:6.1f} s  {name}", flush=True)
    if ok:
        passed += 1
    else:
        failed.append(name)
        print(words.rstrip(), flush=True)


def run(*args: str, timeout: float = TIMEOUT) -> tuple[bool, float, str]:
    "Run a command: did it succeed, how many seconds did it take, what did it say."
    start = time.time()
    try:
        p = subprocess.run(
            args,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
        )
        return p.returncode == 0, time.time() - start, p.stdout
    except subprocess.TimeoutExpired as e:
        return (
            False,
            time.time() - start,
            f"{(e.stdout or b'').decode(errors='replace')}\nstopped after {timeout:.0f} s",
        )


def nbdev(command: str, *args: str):
    return run(str(Path(sys.executable).with_name(command)), *args)


def sources() -> dict:
    return {
        p: hashlib.sha256(p.read_bytes()).digest()
        for d in ("nbs", "diffx2ct")
        for p in Path(d).rglob("*")
        if p.is_file() and p.suffix in (".ipynb", ".py")
    }


def check_drift():
    "Cleaning and exporting must change nothing: what is committed is clean, and the package is what the notebooks say."
    for command in ("nbdev_clean", "nbdev_export"):
        before = sources()
        ok, seconds, words = nbdev(command)
        after = sources()
        changed = sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
        if changed:
            words += f"{command} changed {', '.join(changed)}: look at the change and commit it"
        report(f"{command} changes nothing", ok and not changed, seconds, words)


def check_notebooks():
    "Every notebook in a process of its own, with its slow cells unless it must be quick."
    jobs = [(p, ("--flags", "slow") if not quick and "#| slow" in p.read_text() else ()) for p in notebooks]

    def one(job):
        return job, nbdev("nbdev_test", "--path", str(job[0]), "--n_workers", "0", *job[1])

    with ThreadPoolExecutor(WORKERS) as pool:
        for (path, flags), result in pool.map(one, jobs):
            report(" ".join([str(path), *flags]), *result)


def check_pytest():
    "The tests of the commands, the scripts and the packaging, a process for each file; each test counts."
    global passed, skipped
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:

        def one(path):
            return (
                path,
                Path(folder) / f"{path.stem}.xml",
                run(
                    sys.executable,
                    "-m",
                    "pytest",
                    "-q",
                    "-ra",
                    "-p",
                    "no:cacheprovider",
                    f"--junitxml={folder}/{path.stem}.xml",
                    *(["-m", "not slow"] if quick else []),
                    str(path),
                    timeout=3 * TIMEOUT,
                ),
            )

        for path, xml, (_, _, words) in pool.map(
            one, sorted(Path("tests").glob("test_*.py"), key=lambda p: -p.stat().st_size)
        ):  # the largest first
            print(f"{path}\n{words.rstrip()}", flush=True)
            if not xml.exists():
                report(str(path), False, 0, "pytest ended without a report")
                continue
            for case in ET.parse(xml).iter("testcase"):
                bad, left_out = (
                    any(case.find(k) is not None for k in ("failure", "error")),
                    case.find("skipped") is not None,
                )
                if bad:
                    failed.append(f"{case.get('classname')}::{case.get('name')}")
                elif left_out:
                    skipped += 1
                else:
                    passed += 1


check_drift()
report("README.md agrees with nbs/index.ipynb", *run(sys.executable, ".ci/readme.py", "--check"))
report("one format (ruff format)", *run(str(Path(sys.executable).with_name("ruff")), "format", "--check", "."))
report("no likely bugs (ruff check)", *run(str(Path(sys.executable).with_name("ruff")), "check", "."))
report("types agree (mypy)", *run(sys.executable, "-m", "mypy"))
report("the book is a whole site", *run(sys.executable, ".ci/book.py"))
check_notebooks()
check_pytest()
for name in failed:
    print("failed:", name)
print(f"{passed} passed, {len(failed)} failed" + (f", {skipped} skipped" if skipped else ""))
sys.exit(bool(failed))
