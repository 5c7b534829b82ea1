#!/usr/bin/env bash
# The one place that installs diffx2ct. Sourced by run_training.sh, run_visualize.sh and run_tests.sh; the Dockerfile executes it.
#   setup [dev]              sets $python to an interpreter that has diffx2ct; the first use makes .venv and installs the pinned packages
#   launch COMMAND [ARG...]  runs an installed command in the project folder, or with --docker in a container
# Environment: DIFFX2CT_PYTHON  an interpreter with diffx2ct in it, used as it is
#              DIFFX2CT_VENV    where the environment is made (default: .venv in the project folder)
# With --docker, see docker/compose.yml: DIFFX2CT_GPU (auto, on or off), DIFFX2CT_DATA, DIFFX2CT_CHECKPOINTS, DIFFX2CT_CONFIG,
#              DIFFX2CT_UID and DIFFX2CT_GID (default: the owner of the project folder)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DIFFX2CT_VENV:-$root/.venv}

fail() { echo "diffx2ct: $*" >&2; exit 2; }

find_python() {
  local c
  for c in python3.11 python3.12 python3.13 python3 python; do
    if "$c" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$c"; return; fi
  done
  fail "Python 3.11 or newer with its venv module was not found; install it (Debian: apt-get install python3-venv), or set DIFFX2CT_PYTHON"
}

is_this_project() { # INTERPRETER: is the diffx2ct it imports the one in this folder?
  [ -x "$1" ] && [ "$("$1" -P -c 'from importlib.util import find_spec as f; print(f("diffx2ct").origin)' 2>/dev/null)" = "$root/diffx2ct/__init__.py" ]
}

stamp_of() { # [dev]: names what is installed; it holds the project's path, since an environment does not survive being moved
  echo "$venv/.diffx2ct-${1:+$1-}$(cat "$root/requirements.txt" ${1:+"$root/requirements-$1.txt"} "$root/docker/requirements.lock" "$root/pyproject.toml" | cksum | cut -d' ' -f1)"
}

ready() { [ "$(cat "$(stamp_of "$@")" 2>/dev/null)" = "$root" ]; }

install_part() { # PIP... PART: the packages of a part of the lock, each file checked against its hash
  local part=${*: -1}
  sed -n "/^# \[$part\]/,/^# \[/p" "$root/docker/requirements.lock" >"$venv/$part.lock"
  "${@:1:$#-1}" --no-deps --require-hashes -r "$venv/$part.lock"
}

install_torch() { # PIP...: of the pinned version the build that the user's index has
  local torch build
  torch=$(grep '^torch==' "$root/requirements.txt")
  build=$("$@" --dry-run --ignore-installed --no-deps --report - "$torch" | "$venv/bin/python" -c 'import json, sys; print(*(p["metadata"]["version"] for p in json.load(sys.stdin)["install"]))')
  case $build in
    *+cu*) "$@" "$torch" ;; # from an index the user chose and trusts; the lock has the CUDA libraries of PyPI's build only
    *+*) "$@" --no-deps "$torch" ;; # such as +cpu
    *) install_part "$@" torch ;;
  esac
}

install_project() { # PIP...: this folder, editable; pyproject.toml decides how it is found
  "$@" --no-deps --no-build-isolation -e "$root"
}

install_into_venv() { # [dev]
  local base pip old
  base=$(find_python)
  echo "diffx2ct: first use: installing the pinned packages into $venv (about 2 GB, or 7 GB where pip brings CUDA; one to ten minutes)" >&2
  for old in "$venv"/.diffx2ct-*; do
    if [ -f "$old" ] && [ "$(cat "$old")" != "$root" ]; then "$base" -m venv --clear "$venv"; fi
  done
  rm -f "$venv"/.diffx2ct-*
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then "$base" -m venv --clear "$venv"; fi
  pip=("$venv/bin/python" -m pip --disable-pip-version-check install -qq)
  install_torch "${pip[@]}"
  install_part "${pip[@]}" run
  if [ "${1:-}" ]; then install_part "${pip[@]}" "$1"; fi
  install_project "${pip[@]}"
  if [ "${1:-}" ]; then echo "$root" >"$(stamp_of)"; fi
  echo "$root" >"$(stamp_of "$@")"
}

setup() { # [dev]
  if [ -n "${DIFFX2CT_PYTHON:-}" ]; then
    python=$(command -v "$DIFFX2CT_PYTHON") || fail "DIFFX2CT_PYTHON is $DIFFX2CT_PYTHON, which is not an interpreter; set it to one, or leave it out"
    is_this_project "$python" || fail "DIFFX2CT_PYTHON ($python) has no diffx2ct from $root; run: $python -m pip install -e '$root'"
    return
  fi
  python=$venv/bin/python
  if ready "$@"; then return; fi
  if [ -n "${VIRTUAL_ENV:-}" ] && [ "$VIRTUAL_ENV" != "$venv" ] && is_this_project "$VIRTUAL_ENV/bin/python"; then
    python=$VIRTUAL_ENV/bin/python
    return
  fi
  (
    trap 'ready "$@" || fail "the installation did not finish; fix the error above and run the same command again"' EXIT
    if command -v flock >/dev/null; then flock 9; fi # a second first use waits here, and then finds all ready
    ready "$@" || install_into_venv "$@"
  ) 9>"$venv.lock"
}

container_user() { # prints UID GID: the owner of the project folder, so that what a run writes there is theirs
  local ids
  ids=$(stat -c '%u %g' "$root" 2>/dev/null || stat -f '%u %g' "$root" 2>/dev/null || true)
  case $ids in
    '' | '0 '*) if [ "$(id -u)" != 0 ]; then ids="$(id -u) $(id -g)"; fi ;; # root only for root
  esac
  case $(docker info --format '{{.SecurityOptions}}' 2>/dev/null || true) in
    *name=rootless*) ids='0 0' ;; # there root in the container is the caller outside
  esac
  ids=${ids:-0 0}
  echo "${DIFFX2CT_UID:-${ids% *}} ${DIFFX2CT_GID:-${ids#* }}"
}

toolkit_found() {
  command -v nvidia-ctk >/dev/null || command -v nvidia-container-runtime >/dev/null ||
    [[ $(docker info --format '{{json .Runtimes}}' 2>/dev/null || true) == *nvidia* ]]
}

wants_gpu() { # whether the container gets the GPUs
  local missing='the NVIDIA container toolkit was not found'
  case ${DIFFX2CT_GPU:-auto} in
    off) return 1 ;;
    on) toolkit_found || fail "DIFFX2CT_GPU is on, but $missing; install it, or set DIFFX2CT_GPU=off to run on the CPU" ;;
    auto)
      nvidia-smi -L >/dev/null 2>&1 || return 1
      if toolkit_found; then return; fi
      echo "diffx2ct: this machine has a GPU, but $missing, so the container runs on the CPU; install the toolkit, or set DIFFX2CT_GPU=off to leave this line out" >&2
      return 1
      ;;
    *) fail "DIFFX2CT_GPU is $DIFFX2CT_GPU; use auto, on or off" ;;
  esac
}

mounted() { # NAME: prints NAME=PATH for the variable of that name; the folder or file must exist
  local path=${!1}
  case $path in /*) ;; *) path=$PWD/$path ;; esac
  [ -e "$path" ] || fail "$1 is $path, which does not exist; set it to what the container is to use, or leave it out"
  echo "$1=$path"
}

launch_in_docker() { # DRY_RUN COMMAND [ARG...]
  local dry=$1 user name folder files=(-f "$root/docker/compose.yml") settings=() line
  shift
  [ "$dry" ] || docker compose version >/dev/null 2>&1 || fail "docker compose was not found; install Docker with its compose plugin, or leave --docker out"
  user=$(container_user)
  settings=("DIFFX2CT_UID=${user% *}" "DIFFX2CT_GID=${user#* }")
  : "${DIFFX2CT_DATA:=}" "${DIFFX2CT_CHECKPOINTS:=}" "${DIFFX2CT_CONFIG:=}"
  for name in DIFFX2CT_DATA DIFFX2CT_CHECKPOINTS DIFFX2CT_CONFIG; do
    if [ "${!name}" ]; then
      settings+=("$(mounted "$name")")
    elif [ "$name" = DIFFX2CT_DATA ]; then
      settings+=("$name=$root/data")
    fi
  done
  if [ -z "${DIFFX2CT_NETRC:-}" ] && [ -r "${HOME:-}/.netrc" ]; then settings+=("DIFFX2CT_NETRC=$HOME/.netrc"); fi # a W&B login
  if wants_gpu; then files+=(-f "$root/docker/compose.gpu.yml"); fi
  line=(env "${settings[@]}" docker compose "${files[@]}" run --rm --build diffx2ct "$@")
  if [ "$dry" ]; then printf '%q ' "${line[@]}" | sed 's/ $//'; echo; return; fi
  for folder in "$root/data" "$root/checkpoints"; do
    if [ ! -d "$folder" ]; then
      mkdir "$folder"
      if [ "$(id -u)" = 0 ]; then chown "${settings[0]#*=}:${settings[1]#*=}" "$folder"; fi
    fi
  done
  exec "${line[@]}"
}

launch() { # COMMAND [ARG...]
  local command=$1 docker='' dry='' help='' arg rest=()
  shift
  for arg in "$@"; do
    case $arg in
      --docker) docker=1 ;;
      --dry_run) dry=1 ;;
      -h | --help) help=1 rest+=("$arg") ;;
      *) rest+=("$arg") ;;
    esac
  done
  if [ "$docker" ]; then launch_in_docker "$dry" "$command" ${rest[@]+"${rest[@]}"}; return; fi
  if [ "$dry" ] && [ -z "$help" ]; then fail "--dry_run shows what --docker would start; give --docker as well"; fi
  setup
  cd "$root"
  if [ "$help" ]; then
    "$(dirname "$python")/$command" ${rest[@]+"${rest[@]}"}
    cat <<'EOF'

options of this script:
  --docker              run in a container (docker/compose.yml; needs Docker and the NVIDIA container toolkit)
  --dry_run             with --docker: print the command that starts the container, and exit
EOF
    return
  fi
  exec "$(dirname "$python")/$command" ${rest[@]+"${rest[@]}"}
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then setup "$@"; fi
