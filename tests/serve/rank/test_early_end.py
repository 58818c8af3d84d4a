"""Ends of a rank before its time: signals, errors of any thread, the death of its launcher."""

import os
import signal
import threading
from typing import Any

import pytest

from rq_ep.serve import process
from rq_ep.serve.messages import Aborted, Failed, FromRank
from rq_ep.serve.rank import early_end
from rq_ep.serve.rank.early_end import EarlyEnd
from rq_ep.serve.rank.rank_server import fails_after
from tests.serve.running import until


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


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> FakeConnection:
    connection = FakeConnection()

    def exit_failed(reason: str) -> None:
        connection.reasons.append(reason)
        raise SystemExit  # which ends a thread in silence

    monkeypatch.setattr(early_end, "exit_failed", exit_failed)
    monkeypatch.setattr(early_end, "ABORT_TIMEOUT_S", 0.0)
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


def test_ranks_that_do_not_meet_in_time_end_by_name(rank: FakeConnection, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would wait for more than two minutes on a stranger who listens on MASTER_PORT."""
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "2950"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with rank.end.watching(has_launcher=False), fails_after(rank.end, 0.01):
        until(lambda: bool(rank.reasons))
    expected = "the ranks have not met at MASTER_ADDR=node0, MASTER_PORT=2950 within 0.01 s (--rank-timeout)"
    assert rank.reasons == [f"rank 3: {expected}"]
