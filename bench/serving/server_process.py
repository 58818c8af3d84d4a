"""A server of one strategy under torchrun, for as long as a benchmark needs it."""

import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import httpx
import psutil

from bench.serving.local_client import local_client
from bench.serving.ports import free_port
from rq_ep.config import child_environment
from rq_ep.core.errors import UserError

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
NAME = "bench"  # of the model, in requests


@contextmanager
def server(
    num_ranks: int, arguments: Sequence[str], log: Path, module: str = "rq_ep.serve", max_restarts: int = 0
) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server, wait until it is well, and end it afterwards; its address, and the launcher's process.

    Args:
        num_ranks: processes of the group.
        arguments: of `rq_ep.serve`; host and port are chosen here.
        log: where its output goes.
        module: that each rank runs.
        max_restarts: how often torchrun starts a group again that has failed.

    Raises:
        UserError: it does not start; the end of its log says why.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
    if max_restarts:
        command += [f"--max-restarts={max_restarts}", "--monitor-interval=0.1"]
    with free_port() as port, free_port() as rendezvous:
        command += [f"--master-port={rendezvous}", "-m", module, "--port", str(port), "--served-model-name", NAME]
        with log.open("wb") as file:
            process = _start([*command, *arguments], file)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_well(process, url, log)
            yield url, process
        finally:
            tree = [process, *process.children(recursive=True)] if process.is_running() else []
            process.terminate()
            _, alive = psutil.wait_procs(tree, STOP_TIMEOUT_S)
            for left in alive:
                left.kill()


def rank_processes(launcher: psutil.Process) -> dict[int, psutil.Process]:
    """Rank of a group under way -> the process that computes as it: what its supervisor has started, if it has one."""
    ranks = {}
    for started in launcher.children():
        below = [one for one in started.children() if not any("http_process" in word for word in one.cmdline())]
        ranks[int(started.environ()["RANK"])] = below[0] if below else started
    return ranks


def own_bytes(process: psutil.Process) -> int:
    """Memory that a process has beside the files that it has mapped, such as a checkpoint."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return sum(int(sizes[kind].split()[0]) * 1024 for kind in ("RssAnon", "RssShmem"))


def pin_ranks(launcher: psutil.Process) -> None:
    """Bind each rank of a group, with all of its threads, to a core of its own as far as there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    for rank, process in rank_processes(launcher).items():
        _bind([process], {cores[rank % len(cores)]})


@contextmanager
def pinned_apart(launcher: psutil.Process) -> Iterator[bool]:
    """Inside, each rank has a core of its own, and this process and the rest of the group have the others.

    Whether there are enough cores for that; else nothing is bound.
    """
    cores, ranks = sorted(os.sched_getaffinity(0)), rank_processes(launcher)
    others = [psutil.Process(), launcher, *launcher.children(recursive=True)]
    if len(cores) <= len(ranks):
        yield False
        return
    _bind(others, cores[len(ranks) :])
    for process, core in zip(ranks.values(), cores, strict=False):
        _bind([process], [core])
    try:
        yield True
    finally:
        _bind(others, cores)


def _bind(processes: Iterable[psutil.Process], cores: Collection[int]) -> None:
    """Bind processes, with all of their threads, to some cores."""
    for process in processes:
        for thread in process.threads():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread.id, cores)


def cpu_s(launcher: psutil.Process) -> float:
    """CPU time of a group's processes so far, to the nanosecond: that of `psutil` is in hundredths of a second."""
    total_ns = 0
    for process in (launcher, *launcher.children(recursive=True)):
        for path in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
            total_ns += int(path.read_text().split()[0])
    return total_ns / 1e9


def _start(command: list[str], log: IO[bytes]) -> psutil.Process:
    environment = {"OMP_NUM_THREADS": "1", **child_environment()}
    return psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _wait_until_well(process: psutil.Process, url: str, log: Path) -> None:
    end_s = time.monotonic() + START_TIMEOUT_S
    client = local_client(url)
    while time.monotonic() < end_s and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    errors = [line for line in log.read_text().splitlines() if "error" in line]
    raise UserError(f"the server does not start, see {log}: {errors[0] if errors else 'its log has no error'}")
