"""Buffers of experts that come and go: used again while experts move, and the system's again afterwards."""

import ctypes
import mmap
import threading
import weakref
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor


class ExpertBuffers:
    """Buffers for single experts on a device, which the layers of a rank may share.

    A buffer whose tensors are gone is used for the next expert of its size, so that pages are not mapped anew for each.
    The others are unmapped when one of another size is needed, so that a rank never has more than its experts and those
    that arrive took at once. In the heap, which a server keeps for its steps (`keep_freed_memory`), experts that went
    would leave holes among those that stay: a rank that replaced its experts again and again had three times their
    bytes. On a GPU, torch's allocator does all this.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._free: list[mmap.mmap] = []
        self._lock = threading.Lock()  # of those that take; a buffer that comes back, on any thread, is only appended

    def take(self, nbytes: int) -> Tensor:
        """A buffer, uint8 [nbytes], with anything in it."""
        if self.device.type != "cpu":
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        with self._lock:
            mapped = next((mapped for mapped in self._free if len(mapped) == nbytes), None)
            if mapped is None:
                self._free.clear()
            else:
                self._free.remove(mapped)
        if mapped is None:
            mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without them
                    mapped.madvise(mmap.MADV_HUGEPAGE)  # 12 MiB are first written in 3 ms, in pages of 4 KiB in 13 ms
        held = (ctypes.c_ubyte * nbytes).from_buffer(mapped)  # lives as long as any tensor of the buffer
        weakref.finalize(held, self._free.append, mapped).atexit = False
        return torch.from_numpy(np.ctypeslib.as_array(held))

    def release(self) -> None:
        """Unmap the buffers that are not in use."""
        with self._lock:
            self._free.clear()
