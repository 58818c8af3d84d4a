"""The planner process: a real one decides, saves, dies and comes back; none outlives its parent's pipe."""

import pickle
import sys
import threading
import time
from io import BytesIO
from pathlib import Path

import psutil
import pytest

from rq_ep.core.placement import Placement
from rq_ep.rebalancing.rebalancer import Decision, Rebalancer, decide
from rq_ep.serve.rank.rebalance.planner_process import (
    NICENESS,
    Answer,
    PlannerFailure,
    PlannerProcess,
    SaveRequest,
    serve,
)
from rq_ep.strategies import make_strategy
from tests.rebalancing.cases import problem_of, steps_SLE
from tests.serve.rank.rebalance.test_rebalance_controller import BEFORE
from tests.serve.running import until

pytestmark = pytest.mark.slow


def answer_of(planner: PlannerProcess) -> Answer:
    end_s = time.monotonic() + 120
    while (answer := planner.take()) is None:
        assert time.monotonic() < end_s
        time.sleep(0.01)
    return answer


def test_a_process_of_its_own_decides_as_this_one_would(tmp_path: Path) -> None:
    rebalancer = Rebalancer(problem_of(steps_SLE(0, 1, 0)), make_strategy("rq"), BEFORE)
    for counts_LE in steps_SLE(1, 64, 0):
        rebalancer.observe(counts_LE)
    request = rebalancer.request()
    planner = PlannerProcess()
    try:
        planner.ask(request)
        assert not planner.is_free
        answer, expected = answer_of(planner), decide(request)
        assert planner.is_free
        assert isinstance(answer, Decision)
        assert answer.placement is not None
        assert (answer.reason, answer.rounds) == (expected.reason, expected.rounds)

        child = psutil.Process(planner._process.pid)  # type: ignore[union-attr]
        assert child.nice() == min(psutil.Process().nice() + NICENESS, 19)
        assert not any("libtorch" in mapped.path for mapped in child.memory_maps())
        planner.ask(SaveRequest(answer.placement, str(tmp_path / "saved.json")))
        until((tmp_path / "saved.json").exists)
        assert Placement.load(tmp_path / "saved.json").to_dict() == answer.placement.to_dict()
        planner.ask(SaveRequest(answer.placement, str(tmp_path)))
        failure = answer_of(planner)
        assert isinstance(failure, PlannerFailure)
        assert not failure.of_decision

        child.kill()
        planner.ask(request)
        failure = answer_of(planner)
        assert isinstance(failure, PlannerFailure)
        assert failure.of_decision
        planner.ask(request)
        assert isinstance(answer_of(planner), Decision), "it is started again"
        left = planner._process
        assert left is not None
        left.stdin.close()  # type: ignore[union-attr]  # as when the parent dies
        assert left.wait(10) == 0
    finally:
        planner.close()


def test_an_answer_to_a_parent_that_has_died_is_no_error(tmp_path: Path) -> None:
    class Gone(BytesIO):
        def flush(self) -> None:
            raise BrokenPipeError

    request = SaveRequest(BEFORE, str(tmp_path / "saved.json"))
    ended = threading.Event()

    def end() -> None:
        ended.set()
        threading.Event().wait()  # as a process that has ended does nothing more

    thread = threading.Thread(target=serve, args=(BytesIO(pickle.dumps(request)), Gone(), end), daemon=True)
    thread.start()
    until(lambda: ended.is_set() and (tmp_path / "saved.json").exists())
    thread.join(0.1)
    assert thread.is_alive(), "the end of its input ends it"


def test_a_silent_process_can_be_ended() -> None:
    planner = PlannerProcess([sys.executable, "-c", "import time; time.sleep(600)"])
    planner.ask(SaveRequest(BEFORE, "unused"))
    until(lambda: planner._process is not None)
    assert planner.take() is None
    assert planner.is_free, "nobody waits for what is saved"
    planner.kill("it took too long")
    assert answer_of(planner) == PlannerFailure("it took too long", of_decision=False)
    planner.close()


def test_a_process_that_cannot_be_started_fails_the_request() -> None:
    planner = PlannerProcess(["/nowhere/python"])
    planner.ask(SaveRequest(BEFORE, "unused"))
    failure = answer_of(planner)
    assert isinstance(failure, PlannerFailure)
    assert "cannot be started ([Errno 2]" in failure.reason
    planner.close()
