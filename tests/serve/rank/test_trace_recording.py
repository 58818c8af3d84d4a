"""A rank's part of a recording; `test_server.py` has whole ones."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from rq_ep.engine.requests import Batch
from rq_ep.moe import EPExperts
from rq_ep.parallel import single_group
from rq_ep.serve.messages import Recorded, RecordingFailed
from rq_ep.serve.rank.trace_recording import CHANGED, NOTHING, TraceRecording
from rq_ep.sim.traces import RoutingTrace
from tests.moe.cases import FAMILIES, round_robin
from tests.serve.running import until


def test_a_recording_that_ends_before_the_next_step_is_answered() -> None:
    results: list[Recorded | RecordingFailed] = []
    model: Any = None  # no step reaches it
    recording = TraceRecording(None, model, single_group(), lambda: Batch([], False), "traces", 10, results.append)
    recording.mark(2)  # 1 came between the same two steps
    until(lambda: bool(results))
    assert results == [RecordingFailed(NOTHING)]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 64 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a file system")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def write(directory: Path, trace: Any) -> Recorded | RecordingFailed:
    """What a client gets for a trace of one rank that was recorded."""
    results: list[Recorded | RecordingFailed] = []
    model: Any = None
    recording = TraceRecording(
        None, model, single_group(), lambda: Batch([], False), str(directory), 10, results.append
    )
    recording._write([(trace, False)])
    return results[0]


def recorded(num_tokens: int) -> RoutingTrace:
    ids_NLK = np.zeros((num_tokens, 1, 1), np.int32)
    return RoutingTrace(ids_NLK, ids_NLK.astype(np.float32), np.array([num_tokens]), 2, (0,))


def test_a_full_disk_is_the_named_error_of_the_recording(full_disk: Path) -> None:
    result = write(full_disk, recorded(100_000))
    assert isinstance(result, RecordingFailed)
    assert str(full_disk) in result.reason
    assert "No space left on device" in result.reason
    assert list(full_disk.iterdir()) == []
    assert isinstance(write(full_disk, recorded(10)), Recorded)


def test_a_deleted_folder_is_made_again(tmp_path: Path) -> None:
    assert isinstance(write(tmp_path / "deleted", recorded(10)), Recorded)


def test_any_error_of_a_recording_is_its_answer(tmp_path: Path) -> None:
    result = write(tmp_path, object())
    assert isinstance(result, RecordingFailed)
    assert f"{tmp_path}" in result.reason
    assert "AttributeError" in result.reason


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = write(tmp_path / "file", recorded(10))
    assert isinstance(result, RecordingFailed)
    assert f"{tmp_path}/file/" in result.reason
    assert "cannot be written" in result.reason


def test_a_recording_ends_by_name_when_the_ranks_of_the_group_change() -> None:
    results: list[Recorded | RecordingFailed] = []
    model = nn.Module()
    group = single_group()
    model.experts = EPExperts(FAMILIES["gated"], round_robin("fp32", 1, 4), lambda counts_RE: None, group)  # type: ignore[arg-type,return-value]
    recording = TraceRecording(None, model, group, lambda: Batch([], False), "traces", 10, results.append)  # type: ignore[arg-type]
    recording.mark(1)
    recording.regroup(1, leads=True)
    assert not results, "nobody waits for it yet"
    recording.mark(2)
    until(lambda: len(results) == 1, 10)
    recording.mark(3)
    recording.regroup(4, leads=True)  # its end was cut off: no rank comes to it again
    assert results == [RecordingFailed(CHANGED)] * 2
