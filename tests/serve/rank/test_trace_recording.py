"""A rank's part of a recording; `test_server.py` has whole ones."""

from typing import Any

from rq_ep.engine.requests import Batch
from rq_ep.parallel import single_group
from rq_ep.serve.messages import Recorded, RecordingFailed
from rq_ep.serve.rank.trace_recording import NOTHING, TraceRecording
from tests.serve.running import until


def test_a_recording_that_ends_before_the_next_step_is_answered() -> None:
    results: list[Recorded | RecordingFailed] = []
    model: Any = None  # no step reaches it
    recording = TraceRecording(None, model, single_group(), lambda: Batch([], False), "traces", 10, results.append)
    recording.mark(2)  # 1 came between the same two steps
    until(lambda: bool(results))
    assert results == [RecordingFailed(NOTHING)]
