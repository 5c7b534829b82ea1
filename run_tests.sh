#!/usr/bin/env bash
# Everything that CI runs. The last line says `N passed, N failed`; the exit code is 1 when anything failed.
# Usage: ./run_tests.sh [quick]
#   quick   leaves out the cells and tests marked slow
set -euo pipefail
case "${1:-}" in
  -h | --help) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"; exit ;;
  '' | quick) ;;
  *) echo "diffx2ct: run_tests.sh knows quick and --help, not $1" >&2; exit 2 ;;
esac
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
"$python" .ci/check.py "${1:-}" </dev/null
