"""Settings of the allocator, of the garbage collector and of threads."""

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch

from rq_ep.parallel.host import BACKGROUND_NICENESS, all_cores, made_in_background, short_collections


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has these settings")
def test_freed_memory_is_used_again() -> None:
    """In a process of its own: forty blocks, one after another, soon get pages that are mapped already."""
    code = """
import resource, torch
from rq_ep.parallel.host import keep_freed_memory
is_glibc = keep_freed_memory()
torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(1 << 24)
print(is_glibc, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    is_glibc, faults = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout.split()
    assert is_glibc == "False" or int(faults) < 10 * (1 << 26) // 4096


def test_collections_leave_out_older_objects() -> None:
    """Inside, cycles that existed before are kept; those made meanwhile go."""

    class Link:
        number = 0

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            Link.number += 1

    with short_collections():
        frozen = gc.get_freeze_count()
        Link()
        gc.collect()
        assert Link.number == 1
        assert frozen > 10_000
    assert gc.get_freeze_count() == 0


def test_weights_are_packed_on_all_cores_and_steps_keep_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8), raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with all_cores(num_sharing=2):
            assert torch.get_num_threads() == 4
        with all_cores(num_sharing=16):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="only there each thread has a priority of its own")
def test_threads_that_are_made_in_the_background_have_a_low_priority() -> None:
    found: list[int] = []
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def make() -> threading.Thread:
        started = threading.Thread(
            target=lambda: found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        )
        started.start()
        return started

    made_in_background(make).join()
    assert found == [max(own, BACKGROUND_NICENESS)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
    with pytest.raises(ZeroDivisionError):
        made_in_background(lambda: 1 / 0)
