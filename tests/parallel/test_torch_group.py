"""The choice of a backend; the group of a process that is alone."""

import logging
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from rq_ep.core.errors import UserError
from rq_ep.parallel.processes.transport import choose_transport
from rq_ep.parallel.processes.world import RendezvousError
from rq_ep.parallel.torch_group import TorchGroup


@pytest.mark.parametrize(
    ("wanted", "gpus", "device_type", "backend"),
    [
        ("auto", ["a 0", "a 1"], "cuda", "nccl"),
        ("auto", ["a 0"], "cuda", "nccl"),
        ("auto", ["a 0", "a 0"], "cpu", "gloo"),
        ("auto", ["a 0", None], "cpu", "gloo"),
        ("auto", [None, None], "cpu", "gloo"),
        ("cuda", ["a 0", "b 0"], "cuda", "nccl"),
        ("cuda", ["a 0", "a 0"], "cuda", "gloo"),
        ("cpu", ["a 0", "a 1"], "cpu", "gloo"),
    ],
)
def test_choice_of_backend(wanted: str, gpus: list[str | None], device_type: str, backend: str) -> None:
    transport = choose_transport(wanted, gpus)
    assert (transport.device_type, transport.backend) == (device_type, backend)
    assert transport.reason


def test_impossible_devices_are_refused() -> None:
    with pytest.raises(UserError, match="--device cuda: rank 1 has no CUDA device"):
        choose_transport("cuda", ["a 0", None])
    with pytest.raises(UserError, match="did you mean 'cuda'"):
        choose_transport("cudo", [None])


def test_a_process_started_by_hand_is_a_group_of_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with caplog.at_level(logging.INFO):
        group = TorchGroup.from_environment("cpu")
    assert caplog.messages == ["rank 0 of 1: gloo on cpu (as asked)"]
    assert group.gather_counts(torch.tensor([0, 2])).tolist() == [[0, 2]]
    assert group.all_to_all(torch.arange(2), [2], [2]).tolist() == [0, 1]

    second = TorchGroup.from_environment("cpu")
    second.close()
    assert dist.is_initialized(), "a group ends torch.distributed only if it began it"
    group.barrier()
    group.close()
    assert not dist.is_initialized()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have names in /proc")
def test_no_thread_of_gloo_is_left_when_the_interpreter_ends() -> None:
    """One that frees a tensor then would end the process by SIGABRT."""
    code = """
import atexit
from pathlib import Path
import torch.distributed as dist
from rq_ep.parallel.default_group import default_group

names = lambda: [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
atexit.register(lambda: print(names().count("pt_gloo_runloop")))  # the first is called last
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = default_group("cpu")
group.barrier()
import torch.distributed.nn.functional
dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_a_taken_master_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RendezvousError, match=f"MASTER_ADDR=127.0.0.1, MASTER_PORT={port} .*EADDRINUSE") as caught:
            TorchGroup.from_environment("cpu", timeout_s=5)
    assert "\n" not in str(caught.value)
    assert not dist.is_initialized()
