"""The Ray launcher, on a Ray of two CPU actors."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.serve.running import ROOT, environment, naming_lack_of_memory, ray, running

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def ray_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/ray_job.py", "--num-ranks", "2", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)


@naming_lack_of_memory()
def test_a_program_returns_its_result(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    run = ray_job("--json", str(out), "tests/launch/program.py")
    assert run.returncode == 0, run.stderr
    assert json.loads(out.read_text()) == {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@naming_lack_of_memory()
def test_dead_actor_ends_the_job_by_name() -> None:
    run = ray_job("tests/launch/program.py", "fail")
    assert run.returncode == 1
    assert "ray_job: error: rank 1 on " in run.stderr


@naming_lack_of_memory()
def test_a_server_comes_back_when_rank_0_dies(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_checkpoint), "--served-model-name", "tiny", "--device", "cpu"]
    body = {"model": "tiny", "prompt": "a", "max_tokens": 500, "stream": True, "ignore_eos": True}
    with running(tmp_path / "log", 2, *arguments, launcher=ray) as server:
        url = f"{server.url}/v1/completions"
        rank_0 = min(process.pid for process in server.tree() if process.cmdline()[0].startswith("ray::Rank"))
        with httpx.stream("POST", url, json=body, timeout=120) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(rank_0, signal.SIGKILL)
            last = [line for line in lines if line][-1]
        assert "the server failed: rank 0 died" in last
        server.wait_until_ready()
        again = httpx.post(url, json={**body, "max_tokens": 3, "stream": False}, timeout=120).json()
        assert again["usage"]["completion_tokens"] == 3
        server.process.terminate()
        assert server.wait(server.tree(), 120) == 0
    assert "failed: ActorDiedError" in server.log.read_text()
