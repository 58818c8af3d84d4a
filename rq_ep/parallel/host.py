"""What a process that serves or measures tells its C library and its Python, so that they do not hold it up."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of malloc.h


def keep_freed_memory() -> bool:
    """Tell the C library to keep what a process frees, for the process itself. Returns whether it could be told.

    glibc hands large blocks back at once, so that every step meets fresh pages, each of which the kernel has to fill
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
    """Keep all that is there out of Python's garbage collections, so that each looks at what is new alone.

    With torch and transformers loaded a full one takes some 0.2 s, in whichever step it falls, and all ranks wait.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
