#!/usr/bin/env bash
# Sets up .venv, then lint, types of the pure floors, import contracts and the whole test suite, on CPU.
# Arguments go to pytest: bash launch/test.sh tests/solver -k split
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

export OMP_NUM_THREADS=1  # tests start several ranks; threads of each would only fight for the cores
ruff check .
ruff format --check .
mypy
lint-imports
pytest "$@"
