"""Settings of the C library's allocator, of Python's garbage collector and of threads, on the host of a rank."""

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

T = TypeVar("T")

BACKGROUND_NICENESS = 10  # a tenth of a core where all are busy
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h


def keep_freed_memory() -> bool:
    """Set glibc's malloc to keep freed memory for the process. Returns False where there is another C library.

    By default glibc returns large blocks at once, so that every step gets fresh pages, which the kernel has to fill
    with zeros: with two ranks and a layer of D = F = 1024 that was 14 % of the CPU time of a step of 4096 tokens. The
    process stays as large as its largest step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    # One arena: those of other threads hold no large blocks.
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_ARENA_MAX: 1}
    return all([mallopt(name, value) for name, value in settings.items()])


@contextmanager
def short_collections() -> Iterator[None]:
    """Freeze the objects that exist, so that Python's garbage collections look at new ones alone.

    With torch and transformers loaded a full collection takes some 0.2 s, in which all ranks wait.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def num_usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def all_cores(num_sharing: int) -> Iterator[None]:
    """While open, torch computes with this process's part of the cores, if that is more than it was given.

    Launchers give each rank one thread, which is right for steps and leaves cores idle while weights are packed.

    Args:
        num_sharing: processes that share the cores.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(num_threads, num_usable_cores() // num_sharing))
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def made_in_background(make: Callable[[], T]) -> T:
    """What `make` returns, which is called where the threads that it starts have a low priority.

    On Linux, where each thread has a priority of its own. Not for threads of Python: one that waits for a core while it
    holds the interpreter's lock holds up all others.
    """
    with ThreadPoolExecutor(1, initializer=_lower_priority) as thread:  # one that may not raise its own again
        return thread.submit(make).result()


def _lower_priority() -> None:
    if sys.platform == "linux":
        with suppress(OSError):  # a sandbox may forbid it
            own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(own, BACKGROUND_NICENESS))
