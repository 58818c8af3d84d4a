"""The Ray launcher, on a Ray of two CPU actors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def ray_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "launch/ray_job.py", "--num-ranks", "2", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)


def test_layer_bench_returns_its_result(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    bench = ("bench/layer.py", "--shape", "tiny", "--tokens-per-rank", "64", "--pairs", "2")
    run = ray_job("--json", str(out), *bench)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert {row["strategy"] for row in result["rows"]} >= {"standard", "rq"}


def test_dead_actor_ends_the_job_by_name() -> None:
    run = ray_job("tests/launch/failing_rank.py")
    assert run.returncode == 1
    assert "ray_job: error: rank 1 on " in run.stderr
