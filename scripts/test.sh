#!/usr/bin/env bash
# Installs what is missing, fetches the data, then runs the tests: bash scripts/test.sh [flags of pytest]
# What takes long is left out, and run by: bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup "$PWD" requirements.txt tests/requirements.txt

"$PYTHON" train.py --check
# One more test at once than there are cores, eight at most: most of them wait for processes that they start.
cores=$(count_cores)
exec "$PYTHON" -m pytest --numprocesses $((cores < 8 ? cores + 1 : 8)) --dist loadfile --no-loadscope-reorder -m "not slow" "$@"
