#!/usr/bin/env bash
# From an empty machine to a trained network: bash scripts/train.sh [flags of train.py]
# Installs what is missing, checks the flags, fetches the data, then trains on all GPUs, or on 2 CPU ranks where there is
# none. NPROC=4 bash scripts/train.sh ... starts 4 ranks instead.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup.sh"
setup "$root" requirements.txt

gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true)
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true)
fi
ranks=${NPROC:-$((gpus > 0 ? gpus : 2))}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || die "NPROC=$ranks is not a number of ranks"

WORLD_SIZE=$ranks "$PYTHON" "$root/train.py" --check "$@"
for flag in "$@"; do
    case $flag in --help | -h | --check) exit ;; esac
done
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
exec "$PYTHON" -m accelerate.commands.launch --config_file "$root/accelerate_config.yaml" --num_processes "$ranks" \
    "$root/train.py" "$@"
