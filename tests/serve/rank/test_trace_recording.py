"""A rank's part of a recording; `test_server.py` has whole ones."""

from rq_ep.engine.requests import Batch
from rq_ep.parallel import single_group
from rq_ep.serve.control import Message
from rq_ep.serve.rank.trace_recording import NOTHING, TraceRecording
from tests.serve.running import until


def test_a_recording_that_ends_before_the_next_step_is_answered() -> None:
    told: list[Message] = []
    recording = TraceRecording(None, single_group(), lambda: Batch([], False), "traces", 10, told.append)
    recording.mark(2)  # 1 came between the same two steps
    until(lambda: bool(told))
    assert told == [{"kind": "recorded", "error": NOTHING}]
