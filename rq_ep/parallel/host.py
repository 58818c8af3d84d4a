"""Settings of the C library's allocator and of Python's garbage collector for a process that serves or measures."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

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
