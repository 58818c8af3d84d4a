"""The Ray launcher, on a Ray of two CPU actors."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.replicas import Replica
from rq_ep.core.topology import Topology
from rq_ep.formats import ExpertLayout, get_format
from tests.serve.running import ROOT, Server, environment, naming_lack_of_memory, ray, running, until

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
def test_a_job_that_waits_for_room_can_be_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "launch/ray_job.py", "--num-ranks=2", "--gpus-per-rank=1", "tests/launch/program.py"]
    log = tmp_path / "log"
    with log.open("wb") as file:
        without_gpu = environment() | {"CUDA_VISIBLE_DEVICES": ""}
        job = subprocess.Popen(command, cwd=ROOT, env=without_gpu, stdout=file, stderr=file)
    try:
        until(lambda: "ray_job: waiting for room for 2 x" in log.read_text())
        job.terminate()
        assert job.wait(120) == 130
    finally:
        job.kill()
        job.wait()
    assert log.read_text().endswith("ray_job: stopped\n")


def actors(server: Server) -> list[psutil.Process]:
    """The actors of the ranks, in order."""
    found = [process for process in server.tree() if process.cmdline()[:1] == ["ray::Rank.run"]]
    return sorted(found, key=lambda process: process.pid)


def members(server: Server) -> list[int]:
    try:
        members: list[int] = server.client.get("/v1/ep/ranks").json()["members"]
    except (httpx.TransportError, ValueError):
        return []
    return members


@naming_lack_of_memory()
def test_a_server_goes_on_when_an_actor_dies_and_comes_back_when_all_have_died(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    replicas = [Replica(rank, expert, "bf16") for rank in range(2) for expert in range(8)]
    layers = tuple(LayerPlacement.even(layer, 8, replicas) for layer in range(2))
    layout = ExpertLayout({"gate_up_proj": (2 * 32, 64), "down_proj": (64, 32)})
    budget = 2 * 8 * get_format("bf16").nbytes(layout)
    Placement(layers, "eplb", Topology(2), (budget,) * 2).save(tmp_path / "placement.json")
    arguments = ["--model", str(tiny_checkpoint), "--served-model-name", "tiny", "--device", "cpu"]
    arguments += ["--placement", str(tmp_path / "placement.json")]
    body = {"model": "tiny", "prompt": "a", "max_tokens": 500, "stream": True, "ignore_eos": True}
    with running(tmp_path / "log", 2, *arguments, launcher=ray) as server:
        url = "/v1/completions"
        with server.client.stream("POST", url, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            actors(server)[1].kill()
            last = [line for line in lines if line][-1]
        assert last == "data: [DONE]"
        until(lambda: members(server) == [0, 1] and "the other ranks go on" in server.log.read_text())
        with server.client.stream("POST", url, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            for actor in actors(server):
                actor.kill()
            last = [line for line in lines if line][-1]
        assert "the server failed: " in last
        server.wait_until_ready()
        again = server.client.post(url, json={**body, "max_tokens": 3, "stream": False}).json()
        assert again["usage"]["completion_tokens"] == 3
        server.process.terminate()
        assert server.wait(server.tree(), 120) == 0
    assert "failed: ActorDiedError" in server.log.read_text()
