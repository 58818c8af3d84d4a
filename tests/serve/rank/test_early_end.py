"""Ends of a rank before its time: signals, errors of any thread, the death of its launcher."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rq_ep.serve import process
from rq_ep.serve.messages import Aborted, Bye, Failed, FromRank
from rq_ep.serve.rank import early_end
from rq_ep.serve.rank.early_end import EarlyEnd
from rq_ep.serve.rank.group_start import fails_after
from rq_ep.serve.rank.supervisor_link import SupervisorLink
from rq_ep.serve.supervisor.rank_start import (
    EndFailed,
    Ending,
    HubAddress,
    Leave,
    PassSignal,
    Serving,
    from_line,
    to_line,
)
from tests.serve.running import until

HUB = HubAddress(("127.0.0.1", 1), "token")


class FakeConnection:
    """Keeps what a rank sends, and why it ends."""

    def __init__(self) -> None:
        self.sent: list[FromRank] = []
        self.reasons: list[str] = []
        self.end = EarlyEnd(3)
        client: Any = self
        self.end.client = client

    def send(self, message: FromRank) -> None:
        self.sent.append(message)

    def close(self) -> None:
        self.sent.append(Bye())


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> FakeConnection:
    connection = FakeConnection()

    def exit_failed(reason: str) -> None:
        connection.reasons.append(reason)
        raise SystemExit  # which ends a thread in silence

    monkeypatch.setattr(early_end, "exit_failed", exit_failed)
    monkeypatch.setattr(early_end, "exit_quickly", lambda status: exit_failed(f"status {status}"))
    monkeypatch.setattr(early_end, "ABORT_TIMEOUT_S", 0.0)
    monkeypatch.setattr(early_end, "DELIVERY_S", 0.0)
    monkeypatch.setattr(process, "LAUNCHER_TICK_S", 0.01)
    return connection


def test_a_signal_while_loading_ends_the_rank_at_once(rank: FakeConnection) -> None:
    with rank.end.watching(has_launcher=False):
        signal.raise_signal(signal.SIGTERM)
        until(lambda: bool(rank.reasons))
    assert rank.sent == [Aborted("SIGTERM", was_loading=True)]
    assert rank.reasons == ["rank 3: aborted by SIGTERM while the model was loading"]


def test_the_first_signal_asks_to_drain_and_the_second_one_aborts(rank: FakeConnection) -> None:
    before = signal.getsignal(signal.SIGINT)
    with rank.end.watching(has_launcher=False):
        rank.end.signals.may_drain = True
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: rank.end.signals.are_received)
        assert rank.sent == []
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: bool(rank.reasons))
    assert rank.sent == [Aborted("SIGINT", was_loading=False)]
    assert rank.reasons == ["rank 3: aborted by a second SIGINT"]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_that_ends_any_thread_ends_the_rank_by_name(rank: FakeConnection) -> None:
    def work() -> None:
        raise TypeError("None is no token")

    with rank.end.watching(has_launcher=False):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert rank.sent == [Failed("TypeError: None is no token", is_consequence=False)]
    assert rank.reasons == ["rank 3: TypeError: None is no token"]


def test_a_rank_ends_when_its_launcher_has_died(rank: FakeConnection, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = [50, 50]
    monkeypatch.setattr(os, "getppid", lambda: parents.pop() if parents else 1)
    with rank.end.watching(has_launcher=True):
        until(lambda: bool(rank.reasons))
    assert rank.sent == [Failed("its launcher (process 50) has died", is_consequence=False)]


@pytest.fixture
def supervisor(rank: FakeConnection) -> Iterator[socket.socket]:
    """The other end of the link of the rank, which serves."""
    ours, theirs = socket.socketpair()
    link = SupervisorLink(theirs)
    client, rank.end = rank.end.client, EarlyEnd(3, link)
    rank.end.client = client
    with rank.end.watching(has_launcher=False):
        rank.end.serving(HUB)
        assert from_line(ours.recv(1000)) == Serving(HUB)
        yield ours
    for end in (ours, link._lines, theirs):
        end.close()


def test_a_signal_to_all_processes_counts_once_beside_the_one_that_the_supervisor_passes_on(
    rank: FakeConnection, supervisor: socket.socket
) -> None:
    """Slurm signals every process of a step."""
    supervisor.sendall(to_line(PassSignal("SIGTERM")))
    until(lambda: rank.end.signals.are_received)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    assert rank.reasons == []
    supervisor.sendall(to_line(PassSignal("SIGINT")))
    until(lambda: bool(rank.reasons))
    assert rank.reasons == ["rank 3: aborted by a second SIGINT"]
    assert from_line(supervisor.recv(1000)) == Ending(), "it is not to be started again"


@pytest.mark.parametrize(
    ("command", "reason", "is_ending"),
    [
        (EndFailed("its launcher (process 7) has died"), "its launcher (process 7) has died", True),
        (None, f"its supervisor (process {os.getppid()}) has died", False),
    ],
)
def test_a_rank_ends_as_its_supervisor_says_and_with_it(
    command: EndFailed | None, reason: str, is_ending: bool, rank: FakeConnection, supervisor: socket.socket
) -> None:
    if command is None:
        supervisor.shutdown(socket.SHUT_WR)
    else:
        supervisor.sendall(to_line(command))
    until(lambda: bool(rank.reasons))
    assert rank.sent == [Failed(reason, is_consequence=False)]
    assert rank.reasons == [f"rank 3: {reason}"]
    assert rank.end.is_failing, "the group goes on, and the HTTP process has not died"
    if is_ending:
        assert from_line(supervisor.recv(1000)) == Ending()


def test_a_rank_that_is_to_leave_says_good_bye(rank: FakeConnection, supervisor: socket.socket) -> None:
    supervisor.sendall(to_line(Leave()))
    until(lambda: bool(rank.reasons))
    assert rank.sent == [Bye()]
    assert rank.reasons == ["status 0"]
    assert from_line(supervisor.recv(1000)) == Ending()


def test_ranks_that_do_not_meet_in_time_end_by_name(rank: FakeConnection, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would wait for more than two minutes on a stranger who listens on MASTER_PORT."""
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "2950"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with rank.end.watching(has_launcher=False), fails_after(rank.end, 0.01):
        until(lambda: bool(rank.reasons))
    expected = "the ranks have not met at MASTER_ADDR=node0, MASTER_PORT=2950 within 0.01 s (--rank-timeout)"
    assert rank.reasons == [f"rank 3: {expected}"]
