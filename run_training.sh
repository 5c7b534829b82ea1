#!/usr/bin/env bash
# Train: the Optuna search; with --retrain_best the long run of its best values; with --no_search one run. Works in the project folder (config.yml, data/, checkpoints/, the study).
# Usage: ./run_training.sh [options of diffx2ct_train, see --help] [--docker [--dry_run]]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/docker/setup.sh"
launch diffx2ct_train "$@"
