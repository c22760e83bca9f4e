#!/usr/bin/env bash
# Installs what is missing, fetches the data, then runs the tests: bash scripts/test.sh [flags of pytest]
# What takes long is left out, and run by: bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup "$PWD" requirements.txt tests/requirements.txt

"$PYTHON" train.py --check
# A test starts up to four ranks, and some hold them to a time: four cores each.
exec "$PYTHON" -m pytest --numprocesses $(($(count_cores) / 4)) --dist loadfile -m "not slow" "$@"
