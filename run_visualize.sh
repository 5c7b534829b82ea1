#!/usr/bin/env bash
# Look at what a checkpoint reconstructs. Works in the project folder.
# Usage: ./run_visualize.sh [options of diffx2ct_visualize, see --help] [--docker [--dry_run]]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/docker/setup.sh"
launch diffx2ct_visualize "$@"
