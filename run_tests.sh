#!/usr/bin/env bash
# Everything that CI runs. The last line is `N passed, N failed`; the exit code is 1 when anything failed.
# Usage: ./run_tests.sh [quick | NAME...]
#   quick   leaves out the cells, chapters and tests marked slow, the types and the site
#   NAME    a chapter (02a), a module (diffusion) or a file of tests (wiring): all of its checks, and no others
set -euo pipefail
case "${1:-}" in
  -h | --help) sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}"; exit ;;
esac
here=$(dirname "${BASH_SOURCE[0]}")
for name in "$@"; do
  if [ "$name" != quick ] && ! compgen -G "$here/nbs/${name}_*.ipynb" >/dev/null && ! compgen -G "$here/nbs/$name.ipynb" >/dev/null \
    && [ ! -e "$here/diffx2ct/$name.py" ] && [ ! -e "$here/tests/test_$name.py" ]; then
    echo "diffx2ct: run_tests.sh takes quick, a chapter such as 02a, a module or a file of tests, not $name" >&2
    exit 2
  fi
done
source "$(dirname "${BASH_SOURCE[0]}")/docker/setup.sh"
setup dev

# What tests use and pip does not bring: a browser, a PostgreSQL server, and DICOM validators.
# Where they are absent, their tests are skipped, saying so.
if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  missing=()
  if ! command -v chromium >/dev/null; then missing+=(chromium); fi
  if ! compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; then missing+=(postgresql); fi
  if ! command -v dciodvfy >/dev/null; then missing+=(dicom3tools); fi
  if ! command -v dcm2niix >/dev/null; then missing+=(dcm2niix); fi
  if [ "${#missing[@]}" -gt 0 ] && ! { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}"; } >/dev/null 2>&1; then
    echo "diffx2ct: ${missing[*]} could not be installed; their tests will be skipped"
  fi
fi

# Nothing is read from or written to the home folder, no run leaves the machine, one thread each.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for name in HOME XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME IPYTHONDIR MPLCONFIGDIR WANDB_DIR JUPYTER_CONFIG_DIR JUPYTER_DATA_DIR JUPYTER_RUNTIME_DIR; do
  mkdir "$scratch/$name"
  export "$name=$scratch/$name"
done
export WANDB_MODE=disabled OMP_NUM_THREADS=1 MPLBACKEND=agg PYTHONDONTWRITEBYTECODE=1
PATH=$(dirname "$python"):$PATH
cd "$root"
"$python" .ci/check.py "$@" </dev/null
