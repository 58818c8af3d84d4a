"""Starting the ranks of the process tests."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.serving.ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]


def exit_codes(
    num_ranks: int, command: list[str], directory: Path, timeout_s: float, address: str = "127.0.0.1"
) -> tuple[list[int], str]:
    """Run `python -m` the command on every rank; how each ended, and what they wrote. Nothing is left running."""
    ranks = []
    with free_port() as port:
        try:
            for rank in range(num_ranks):
                environment = os.environ | {
                    "RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank),
                    "MASTER_ADDR": address, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                }  # fmt: skip
                with (directory / f"rank{rank}.log").open("w") as log:
                    started = [sys.executable, "-m", *command]
                    ranks.append(subprocess.Popen(started, cwd=REPOSITORY, env=environment, stdout=log, stderr=log))
            codes = [rank.wait(timeout_s) for rank in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    return codes, "\n".join((directory / f"rank{rank}.log").read_text()[-4000:] for rank in range(num_ranks))


def run_ranks(num_ranks: int, directory: Path, device: str, timeout_s: float) -> list[dict[str, Any]]:
    """Run `worker.py` on every rank and return what each saw; the last may get killed."""
    codes, logs = exit_codes(num_ranks, ["tests.parallel.worker", str(directory), device], directory, timeout_s)
    assert codes[:-1] == [0] * (num_ranks - 1), logs
    assert codes[-1] in (0, -signal.SIGKILL), logs
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(num_ranks)]
