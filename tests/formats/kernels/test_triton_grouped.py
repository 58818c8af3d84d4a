"""The GPU's kernels for low bits, in Triton's interpreter; on a device see `tests/gpu/test_kernels.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="comes with PyTorch for CUDA")


def test_kernels_multiply_dequantized_weights() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when Triton is imported
    command = [sys.executable, "-m", "tests.formats.interpreted"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[3], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "int4_g32 down_proj" in done.stdout
