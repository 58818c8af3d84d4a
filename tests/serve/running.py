"""A server under torchrun, for tests: its processes, its log, its end."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from bench.serving.local_client import local_client
from bench.serving.ports import free_port

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 240
RANK_MODULES = {"rq_ep.serve", "rq_ep.serve.rank.rank_process"}


def torchrun(num_ranks: int, port: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", f"--master-port={port}"]


def restarting(num_ranks: int, port: int) -> list[str]:
    return [*torchrun(num_ranks, port), "--max-restarts=9", "--monitor-interval=0.1"]


def deepspeed(num_ranks: int, port: int) -> list[str]:
    launcher = shutil.which("deepspeed")
    assert launcher is not None
    return [launcher, f"--num_accelerators={num_ranks}", f"--master_port={port}"]


def ray(num_ranks: int, port: int) -> list[str]:
    return [sys.executable, "launch/ray_job.py", f"--num-ranks={num_ranks}", "--max-restarts=1"]


def by_hand(num_ranks: int, port: int) -> list[str]:
    assert num_ranks == 1
    return [sys.executable]


def by_ones(num_ranks: int, port: int) -> list[str]:
    """Rank 0; what starts the others is up to the test."""
    variables = {"RANK": 0, "WORLD_SIZE": num_ranks, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": num_ranks}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return ["env", *(f"{name}={value}" for name, value in variables.items()), sys.executable]


Launcher = Callable[[int, int], list[str]]  # of a number of ranks, and a port where they may meet
SERVE: dict[Launcher, list[str]] = {
    torchrun: ["-m", "rq_ep.serve"],
    restarting: ["-m", "rq_ep.serve"],
    deepspeed: ["--module", "rq_ep.serve"],
    ray: ["serve"],
    by_hand: ["-m", "rq_ep.serve"],
    by_ones: ["-m", "rq_ep.serve"],
}


def environment() -> dict[str, str]:
    """Ours, and a Ray of our own that does not end its actors because of the memory of other processes."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
    return inherited | settings


def num_killed_for_memory() -> int:
    """Processes that the kernel's out-of-memory killer has ended so far, on this machine or in this container."""
    counts = [0]
    for path in (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events")):
        if path.exists():
            rows = (line.split() for line in path.read_text().splitlines())
            counts += [int(row[1]) for row in rows if row[0] == "oom_kill"]
    return max(counts)


@contextmanager
def naming_lack_of_memory() -> Iterator[None]:
    """Name the cause of a failure inside where it is that memory ran out, whoever used it."""
    before = num_killed_for_memory()
    try:
        yield
    except Exception as error:
        num_killed = num_killed_for_memory() - before
        if num_killed or "OutOfMemoryError" in str(error):
            left_gib = psutil.virtual_memory().available / 2**30
            raise AssertionError(
                f"memory ran out: the out-of-memory killer ended {num_killed} processes during this test, "
                f"{left_gib:.1f} GiB are available now; run it again when other processes have ended"
            ) from error
        raise


class Server:
    """A running server: torchrun, its ranks, and rank 0's HTTP process."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.client = local_client(url, 120)
        self.log = log
        self.seen: list[str] = []  # what /health said until it was well

    def wait_until_ready(self) -> None:
        end_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end_s:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                answer = self.client.get("/health", timeout=5)
                if answer.status_code == 200:
                    return
                self.seen.append(answer.json()["error"]["message"])
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text()[-3000:])

    def tree(self) -> list[psutil.Process]:
        """Every process of this server."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def launched(self, rank: int) -> psutil.Process:
        """What the launcher has started for a rank: its supervisor, or the rank."""
        return self._of_rank(rank)[0]

    def rank(self, rank: int) -> psutil.Process:
        """The process that serves as a rank."""
        return self._of_rank(rank)[-1]

    def _of_rank(self, rank: int) -> list[psutil.Process]:
        """The processes of a rank, its supervisor first; a server of one rank, started by hand, is the rank itself."""
        found = []
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                if RANK_MODULES & set(process.cmdline()) and process.environ().get("RANK") == str(rank):
                    found.append(process)
        return found or self.tree()[:1]

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Signal a rank as its launcher would."""
        self.launched(rank).send_signal(number)

    def wait(self, processes: list[psutil.Process], timeout_s: float) -> int:
        """Wait until all of these processes have ended; the launcher's exit status."""
        status = self.process.wait(timeout_s)
        _, alive = psutil.wait_procs(processes, timeout_s)
        assert alive == [], self.log.read_text()[-3000:]
        return status


def until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    """Wait until it holds."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


@contextmanager
def running(log: Path, num_ranks: int, *arguments: str, launcher: Launcher = torchrun) -> Iterator[Server]:
    """Start a server and end whatever is left of it."""
    with free_port() as port, free_port() as meeting, log.open("wb") as file:
        process = subprocess.Popen(
            [*launcher(num_ranks, meeting), *SERVE[launcher], "--port", str(port), *arguments],
            stdout=file,
            stderr=file,
            cwd=ROOT,
            env=environment() | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        )
        server = Server(process, f"http://127.0.0.1:{port}", log)
        processes: list[psutil.Process] = []
        try:
            server.wait_until_ready()
            processes = server.tree()
            yield server
        except BaseException:  # pytest's own of a timeout too
            print(f"the log of the server ends with:\n{log.read_text()[-5000:]}")
            raise
        finally:
            now = server.tree() if process.poll() is None else []  # others than at the start, if it was restarted
            server.client.close()
            for left in {*processes, *now}:
                try:
                    left.kill()
                except psutil.NoSuchProcess:
                    continue
            process.wait()
