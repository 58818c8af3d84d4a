"""Buffers of experts that come and go."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rq_ep.formats import ExpertBuffers

NBYTES = 1 << 16


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_experts_that_went_leave_no_holes_in_the_heap() -> None:
    """In a process of its own that keeps its heap: half of the experts are replaced, fifty times, on another thread."""
    code = """
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch
from rq_ep.formats import ExpertBuffers
from rq_ep.parallel.host import keep_freed_memory

def resident_mib():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) >> 10

keep_freed_memory()
torch.ones(1 << 20).sum()
before, buffers = resident_mib(), ExpertBuffers()
experts = [buffers.take(4 << 20).fill_(1) for _ in range(16)]
with ThreadPoolExecutor(1) as mover:
    for step in range(50):
        for slot in range(step % 2, 16, 2):
            nbytes = (4 if (step + slot) % 3 else 2) << 20
            experts[slot] = mover.submit(lambda: buffers.take(nbytes).fill_(1)).result()
del experts[8:]
buffers.release()
print(resident_mib() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 8 * 4 + 6


def test_a_buffer_is_used_again_once_nothing_looks_at_it() -> None:
    buffers = ExpertBuffers()
    first = buffers.take(NBYTES)
    address, view = first.data_ptr(), first.view(2, -1)[1]
    del first
    other = buffers.take(NBYTES)
    assert other.data_ptr() != address  # a view is left
    del view
    assert buffers.take(NBYTES).data_ptr() == address


def test_buffers_of_another_size_are_given_back_first() -> None:
    buffers = ExpertBuffers()
    buffers.take(NBYTES)
    assert len(buffers._free) == 1
    held = buffers.take(2 * NBYTES)
    assert not buffers._free
    assert held.shape == (2 * NBYTES,)
    held.fill_(7)
    del held
    buffers.release()
    assert not buffers._free


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_buffers_are_made_of_huge_pages() -> None:
    buffer = ExpertBuffers().take(8 << 20)
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]
    for mapping in mappings:
        start, end = (int(address, 16) for address in mapping.split(maxsplit=1)[0].split("-"))
        if start <= buffer.data_ptr() < end:
            assert " hg" in mapping.partition("VmFlags:")[2]
            return
    pytest.fail("the buffer is not mapped")
