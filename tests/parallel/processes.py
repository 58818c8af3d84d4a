"""Starting the ranks of the process tests."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]


def run_ranks(num_ranks: int, directory: Path, device: str, timeout_s: float) -> list[dict[str, Any]]:
    """Run `worker.py` on every rank and return what each saw; the last may get killed, and nothing is left running."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    try:
        for rank in range(num_ranks):
            environment = os.environ | {
                "RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            command = [sys.executable, "-m", "tests.parallel.worker", str(directory), device]
            log = (directory / f"rank{rank}.log").open("w")
            ranks.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log))
            log.close()
        codes = [rank.wait(timeout_s) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    logs = "\n".join((directory / f"rank{rank}.log").read_text() for rank in range(num_ranks))
    assert codes[:-1] == [0] * (num_ranks - 1), logs
    assert codes[-1] in (0, -signal.SIGKILL), logs
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(num_ranks)]
