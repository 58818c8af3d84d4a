"""A supervisor with a rank's process that has no model: real processes, signals and sockets."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from rq_ep.config import Environment, ServeConfig
from rq_ep.serve.frames import GREETING, HEADER, Frames, Role, read_greeting
from rq_ep.serve.messages import (
    FROM_SUPERVISOR,
    Abort,
    Aborted,
    Bye,
    DrainRequest,
    KillRank,
    RankEnded,
    RankGivenUp,
    RankStarted,
    StartRank,
    Stop,
    StopRank,
    ToSupervisor,
    decode,
    encode,
)
from rq_ep.serve.supervisor.supervision import SignalReceived
from rq_ep.serve.supervisor.supervisor import Supervisor
from tests.serve.running import ROOT

FAKE_RANK = Path(__file__).with_name("fake_rank.py")


class FakeHub:
    """The HTTP process, as far as one supervisor meets it."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = self._server.getsockname()
        self.received: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.connected = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            self._socket, _ = self._server.accept()
        except OSError:
            return
        with self._socket.makefile("rb") as file:
            greeting = read_greeting("token", file.read(GREETING.size))
            assert greeting is not None
            assert (greeting.role, greeting.rank) == (Role.SUPERVISOR, 1)
            self._frames = Frames("token", greeting.nonce, is_to_rank=True)
            frames = Frames("token", greeting.nonce, is_to_rank=False)
            self.connected.set()
            while header := file.read(HEADER.size):
                size, mac = frames.read_header(header)
                self.received.put(decode(frames.verify(file.read(size), mac), FROM_SUPERVISOR))

    def send(self, message: ToSupervisor) -> None:
        assert self.connected.wait(20)
        self._socket.sendall(self._frames.pack(encode(message)))

    def next(self) -> Any:
        return self.received.get(timeout=20)

    def close(self) -> None:
        self._server.close()
        if self.connected.is_set():
            self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    yield hub
    with suppress(OSError):
        hub.close()


def fake_rank(hub: FakeHub, *scripts: str) -> list[str]:
    """The command of a rank whose starts do what the scripts say."""
    return [sys.executable, "-S", "-E", str(FAKE_RANK), json.dumps(hub.address), *scripts]


class Supervised:
    """A supervisor on a thread, of a rank whose starts do what the scripts say."""

    def __init__(self, hub: FakeHub, *scripts: str, max_restarts: int = 3) -> None:
        config = ServeConfig(model="m", max_rank_restarts=max_restarts)
        self.supervisor = Supervisor(config, Environment(rank=1, world_size=2), fake_rank(hub, *scripts))
        self._status: list[int] = []
        self._thread = threading.Thread(target=lambda: self._status.append(self.supervisor.run()), daemon=True)
        self._thread.start()

    @property
    def child(self) -> psutil.Process:
        return psutil.Process(self.supervisor._child.pid)

    def signal(self) -> None:
        """The supervisor's process gets a SIGTERM."""
        self.supervisor._events.put(SignalReceived("SIGTERM"))

    def wait(self) -> int:
        self._thread.join(20)
        return self._status[0]


@pytest.mark.parametrize(
    ("script", "status"), [("exit:0", 0), ("ending exit:2", 2), ("exit:1", 1), ("kill", 137), ("fork kill", 137)]
)
def test_before_the_group_serves_it_ends_as_its_rank_does(hub: FakeHub, script: str, status: int) -> None:
    began_s = time.monotonic()
    assert Supervised(hub, script).wait() == status
    assert time.monotonic() - began_s < 10, "it does not wait for those who hold the rank's files open"


def test_a_rank_that_fails_joins_again_and_the_group_learns_of_it(hub: FakeHub) -> None:
    run = Supervised(hub, "serve kill", "exit:3", "serve fork exit:1", "serve ending exit:0")
    expected = [
        RankEnded("was killed by SIGKILL"), RankStarted(1), RankEnded("ended with exit code 3"), RankStarted(2),
        RankEnded("ended with exit code 1"), RankStarted(3),
    ]  # fmt: skip
    assert [hub.next() for _ in expected] == expected
    assert run.wait() == 0
    assert hub.next() == Bye()


def test_the_death_of_a_rank_is_noticed_within_milliseconds(hub: FakeHub) -> None:
    run = Supervised(hub, "serve fork obey", max_restarts=0)
    assert hub.connected.wait(20)
    run.child.kill()
    killed_s = time.monotonic()
    assert hub.next() == RankEnded("was killed by SIGKILL")
    assert time.monotonic() - killed_s < 1.0  # 2 ms on a quiet machine
    assert isinstance(hub.next(), RankGivenUp)
    hub.send(Stop())
    assert run.wait() == 0


def test_the_hub_kills_removes_and_starts_the_rank(hub: FakeHub) -> None:
    run = Supervised(hub, "serve hang", "serve obey")
    hub.send(KillRank("no progress"))
    assert [hub.next(), hub.next()] == [RankEnded("was killed by SIGKILL"), RankStarted(1)]
    child = run.child
    hub.send(StopRank())
    child.wait(20)
    hub.send(StartRank())
    assert hub.next() == RankStarted(2)
    hub.send(Abort("the group has failed"))
    assert run.wait() == 1


def test_a_rank_that_cannot_be_started_now_is_tried_again(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Supervised(hub, "serve obey", "serve ending exit:0")
    assert hub.connected.wait(20)
    start = subprocess.Popen

    def fail(*_: Any, **__: Any) -> None:
        monkeypatch.setattr(subprocess, "Popen", start)
        raise BlockingIOError("no process is free")

    monkeypatch.setattr(subprocess, "Popen", fail)
    run.child.kill()
    expected = [RankEnded("was killed by SIGKILL"), RankStarted(1), RankEnded("ended with exit code 1"), RankStarted(2)]
    assert [hub.next() for _ in expected] == expected
    assert run.wait() == 0


def test_signals_reach_the_rank_and_the_second_one_aborts(hub: FakeHub, capfd: pytest.CaptureFixture[str]) -> None:
    run = Supervised(hub, "serve obey")
    assert hub.connected.wait(20)
    run.signal()
    run.signal()
    assert run.wait() == 1
    assert "rank: a second SIGTERM" in capfd.readouterr().out


def test_without_a_rank_signals_are_the_supervisors(hub: FakeHub, capfd: pytest.CaptureFixture[str]) -> None:
    run = Supervised(hub, "serve kill", max_restarts=0)
    assert isinstance(hub.next(), RankEnded)
    assert isinstance(hub.next(), RankGivenUp)
    run.signal()
    assert hub.next() == DrainRequest(30.0)
    run.signal()
    assert hub.next() == Aborted("SIGTERM", was_loading=False)
    assert run.wait() == 1
    assert capfd.readouterr().err == "rq_ep.serve: error: rank 1: aborted by a second SIGTERM\n"


@pytest.mark.parametrize("script", ["serve fork obey", "serve kill"])
def test_it_ends_with_the_http_process(hub: FakeHub, script: str) -> None:
    """Whoever of a rank's children holds its files open."""
    run = Supervised(hub, script, "obey", max_restarts=1)
    assert hub.connected.wait(20)
    if script == "serve kill":
        assert [hub.next(), hub.next()] == [RankEnded("was killed by SIGKILL"), RankStarted(1)]
    child = run.child
    hub.close()
    if script != "serve kill":
        child.kill()  # as it would end by itself
    assert run.wait() in ((1,) if script == "serve kill" else (1, 137))  # by the supervisor's word, if that comes first
    assert not child.is_running()


# With a process of its own

SUPERVISE = """
import sys, rq_ep.serve.__main__
from rq_ep.config import Environment, ServeConfig
from rq_ep.serve.supervisor.supervisor import Supervisor
environment = Environment(rank=1, world_size=2, has_launcher=True)
sys.exit(Supervisor(ServeConfig(model="m"), environment, sys.argv[1:]).run())
"""
LAUNCHER = "import subprocess, sys; subprocess.run(sys.argv[1:])"


@pytest.fixture
def processes(hub: FakeHub, tmp_path: Path) -> Iterator[list[psutil.Process]]:
    """A launcher, a supervisor in a session of its own, as torchrun has it, and a rank's process, which serves."""
    command = [sys.executable, "-c", LAUNCHER, "setsid", sys.executable, "-c", SUPERVISE]
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen([*command, *fake_rank(hub, "serve obey")], stdout=log, stderr=log, cwd=ROOT)
    assert hub.connected.wait(30)
    found = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    assert len(found) == 3
    yield found
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    launcher.wait()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("victim", "text"),
    [("launcher", "rank: its launcher (process {}) has died"), ("supervisor", "rank: its supervisor has died")],
)
def test_no_process_outlives_its_parent(
    victim: str, text: str, processes: list[psutil.Process], tmp_path: Path
) -> None:
    launcher, supervisor, _ = processes
    (launcher if victim == "launcher" else supervisor).kill()
    _, left = psutil.wait_procs(processes, 20)
    assert left == []
    assert (tmp_path / "log").read_text() == text.format(launcher.pid) + "\n"


@pytest.mark.dist
def test_a_signal_to_the_group_that_the_launcher_knows_reaches_the_rank_once(
    processes: list[psutil.Process], tmp_path: Path
) -> None:
    _, supervisor, child = processes
    os.killpg(supervisor.pid, signal.SIGTERM)
    time.sleep(0.2)
    assert child.is_running()
    os.killpg(supervisor.pid, signal.SIGTERM)
    _, left = psutil.wait_procs(processes, 20)
    assert left == []
    assert (tmp_path / "log").read_text() == "rank: a second SIGTERM\n"


@pytest.mark.dist
def test_a_supervisor_is_small_and_shows_nobody_the_token(processes: list[psutil.Process]) -> None:
    libraries = {mapped.path.rpartition("/")[2] for mapped in processes[1].memory_maps()}
    assert not [name for name in libraries if "torch" in name or "multiarray" in name]
    assert processes[1].memory_info().rss < 40e6
    for process in processes:
        assert "token" not in " ".join(process.cmdline()).replace(SUPERVISE, "")
        assert "token" not in process.environ().values()
