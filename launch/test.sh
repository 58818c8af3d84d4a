#!/usr/bin/env bash
# Sets up .venv, then lint, types, import contracts and the test suite, on CPU.
#   bash launch/test.sh [--fast] [PYTEST ARGUMENTS]      --fast leaves out tests that start processes, train, or take long
#   bash launch/test.sh tests/solver -k split
set -euo pipefail

case ${1:-} in
    -h | --help) sed -n '2,4s/^# *//p' "$0"; exit ;;
    --fast) shift; set -- -m "not dist and not trains and not slow" "$@" ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

export OMP_NUM_THREADS=1  # tests start several ranks; threads of each would only fight for the cores
ruff check .
ruff format --check .
mypy
lint-imports
pytest --numprocesses 2 --dist loadfile "$@"  # a module is run by one worker: its fixtures are made once
