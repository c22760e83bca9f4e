#!/usr/bin/env bash
# From an empty machine to a trained network: bash scripts/train.sh [flags of train.py]
# Installs what is missing, checks the flags, fetches the data, then trains on all GPUs, or on 2 CPU ranks where there is
# none. NPROC=4 bash scripts/train.sh ... starts 4 ranks instead.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup.sh"
setup "$root" requirements.txt
count_ranks

WORLD_SIZE=$ranks "$PYTHON" "$root/train.py" --check "$@"
for flag in "$@"; do
    case $flag in --help | -h | --check) exit ;; esac
done
share_cores
export LAUNCHED_BY="${NPROC:+NPROC=$NPROC }bash $0" # what to call to go on with a run
exec "$PYTHON" "$root/scripts/launch.py" --standalone --nproc_per_node "$ranks" "$root/train.py" "$@"
