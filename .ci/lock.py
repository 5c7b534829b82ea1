"""docker/requirements.lock: every pinned package with the hashes of its files on PyPI, for all platforms. Needs uv
(pip install uv) and the network.
Three parts, for docker/setup.sh: torch with the CUDA libraries that it needs, the run time, and what tests need."""

import re
import subprocess
from pathlib import Path

root = Path(__file__).resolve().parents[1]
HEAD = "# Made by .ci/lock.py from requirements.txt and requirements-dev.txt; docker/setup.sh installs from it.\n"


def name_of(line: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split("[=;@ ]", line)[0]).lower()


def main():
    files = [root / "requirements.txt", root / "requirements-dev.txt"]
    dev = {name_of(line) for line in files[1].read_text().splitlines() if line and line[0] != "#"}
    made = subprocess.run(
        [
            "uv",
            "pip",
            "compile",
            *files,
            "--universal",
            "--python-version",
            "3.11.5",
            "--generate-hashes",
            "--no-annotate",
            "--no-header",
            "--quiet",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    parts = {"torch": "", "run": "", "dev": ""}
    for block in re.split(r"\n(?=\S)", made.strip()):
        name = name_of(block)
        parts["torch" if re.match("torch$|triton$|nvidia-|cuda-", name) else "dev" if name in dev else "run"] += (
            block + "\n"
        )
    (root / "docker/requirements.lock").write_text(
        HEAD + "".join(f"\n# [{part}]\n{blocks}" for part, blocks in parts.items())
    )


if __name__ == "__main__":
    main()
