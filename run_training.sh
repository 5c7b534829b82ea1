#!/usr/bin/env bash
# Train: the Optuna search, then the long run of the best trial. Works in the project folder (config.yml, data/, checkpoints/, the study).
# Usage: ./run_training.sh [options of diffx2ct_train, see --help] [--docker [--dry_run]]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/docker/setup.sh"
launch diffx2ct_train "$@"
