"""The deepspeed launcher starts the same programs: it adds --local_rank and sets the environment."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def test_layer_bench_under_deepspeed(tmp_path: Path) -> None:
    launcher = shutil.which("deepspeed")
    assert launcher is not None
    out = tmp_path / "result.json"
    command = [launcher, "--num_accelerators", "2", "bench/layer.py", "--shape", "tiny"]
    command += ["--tokens-per-rank", "64", "--pairs", "2", "--json", str(out)]
    environment = dict(os.environ, DS_ACCELERATOR="cpu")
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert json.loads(out.read_text())["num_ranks"] == 2
