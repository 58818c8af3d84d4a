"""Starting the ranks of the process tests."""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from bench.serving.ports import free_port
from tests.forkserver import forkserver


def exit_codes(
    num_ranks: int, command: list[str], directory: Path, timeout_s: float, address: str = "127.0.0.1"
) -> tuple[list[int | None], str]:
    """Run a module with its arguments on every rank; how each ended, and what they wrote. Nothing is left running."""
    ranks = []
    with free_port() as port:
        try:
            for rank in range(num_ranks):
                environment = {
                    "RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank),
                    "MASTER_ADDR": address, "MASTER_PORT": str(port),
                }  # fmt: skip
                arguments = (command, environment, directory / f"rank{rank}.log")
                ranks.append(forkserver().Process(target=_run, args=arguments))
                ranks[-1].start()
            for process in ranks:
                process.join(timeout_s)
            codes = [process.exitcode for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.join()
    return codes, "\n".join((directory / f"rank{rank}.log").read_text()[-4000:] for rank in range(num_ranks))


def _run(command: list[str], environment: dict[str, str], log: Path) -> None:
    """What a rank does: as `python -m`."""
    os.environ |= environment
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__")


def run_ranks(num_ranks: int, directory: Path, device: str, timeout_s: float) -> list[dict[str, Any]]:
    """Run `worker.py` on every rank and return what each saw; the last may get killed."""
    codes, logs = exit_codes(num_ranks, ["tests.parallel.worker", str(directory), device], directory, timeout_s)
    assert codes[:-1] == [0] * (num_ranks - 1), logs
    assert codes[-1] in (0, -signal.SIGKILL), logs
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(num_ranks)]
