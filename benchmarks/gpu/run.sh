#!/usr/bin/env bash
# Ten minutes on one GPU: numbers, steps, memory and sampling on a card, written as JSON.
# Under 8 minutes; nothing is installed.
# Usage: benchmarks/gpu/run.sh [options of run.py, see --help]
# Rehearsal without a GPU: benchmarks/gpu/run.sh --device cpu --tiny
# Python: DIFFX2CT_PYTHON, else .venv of the project, else the first of python3.11, python3 and python that has torch.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
needed='from importlib.util import find_spec as f; raise SystemExit(not (f("torch") and f("monai")))'
for python in ${DIFFX2CT_PYTHON:+"$DIFFX2CT_PYTHON"} "$root/.venv/bin/python" python3.11 python3 python; do
  if "$python" -c "$needed" 2>/dev/null; then
    exec "$python" "$here/run.py" "$@"
  fi
done
echo "diffx2ct: no Python with torch and the other packages of requirements.txt was found;" \
  "set DIFFX2CT_PYTHON, or run ./run_training.sh --help once, which installs them" >&2
exit 2
