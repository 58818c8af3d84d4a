#!/usr/bin/env bash
# All evidence that one GPU gives, in one command and nine minutes: bash bench/gpu.sh [options of `python -m bench gpu`]
#
# On a machine without a package index, first, on another one: bash bench/gpu.sh --pack [DIR]
# It fetches the wheels that a bare machine with Python 3.12, PyTorch and its usual companions lacks (about 25 MB) to
# DIR (default: .gpu-wheels in the checkout, which git ignores), which then travels with the checkout. Set WHEELS to use
# another folder than that, PYTHON for another interpreter than python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
wheels=${WHEELS:-.gpu-wheels}

# What is pinned in launch/constraints.txt and may be missing, or too old, beside PyTorch and transformers of the time.
names='accelerate annotated-doc annotated-types anyio click fastapi hf-xet httpcore2 httpx httpx2 huggingface_hub
    opentelemetry-api prometheus_client pydantic pydantic_core pytest-timeout safetensors starlette tokenizers
    transformers truststore typing_extensions typing-inspection uvicorn'

if [ "${1:-}" = --pack ]; then
    wheels=${2:-$wheels}
    mkdir -p "$wheels"
    for name in $names; do
        pin=$(grep -i "^${name//_/[-_]}==" launch/constraints.txt) || { echo "gpu.sh: $name is not pinned" >&2; exit 1; }
        "${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
            --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
            --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest "$wheels" "$pin"
    done
    du -sh "$wheels"
    exit
fi

if [ -d "$wheels" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "${PYTHON:-python3}" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
"${PYTHON:-python3}" -m rq_ep env || true
"${PYTHON:-python3}" -m bench gpu "$@"
