"""Integrity of experts: checksums that are compared beside the compute."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from rq_ep.formats import is_intact


class DamagedExpert(RuntimeError):
    """The bytes of an expert no longer match its checksum; the message names it."""


class MissingExpert(RuntimeError):
    """An expert is to serve that its rank neither holds nor has received and verified; the message names it."""


class ChecksumVerifier(Protocol):
    """Compares experts with their checksums."""

    def start(self, packed: Sequence[Tensor]) -> Callable[[], list[bool]]:
        """Start to verify packed experts; the function it returns waits and says which are intact."""
        ...


def checksum_verifier(device: torch.device) -> ChecksumVerifier:
    """The verifier for experts on a device."""
    return StreamVerifier(device) if device.type == "cuda" else ThreadVerifier()


class ThreadVerifier:
    """Verifies on a thread of its own, which starts with the first expert."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checksums")

    def start(self, packed: Sequence[Tensor]) -> Callable[[], list[bool]]:
        return self._thread.submit(lambda: [bool(is_intact(expert)) for expert in packed]).result


class StreamVerifier:
    """Verifies on a CUDA stream of its own; the host waits for that stream alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, packed: Sequence[Tensor]) -> Callable[[], list[bool]]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # on which they have arrived
        with torch.cuda.stream(self._stream):
            on_device_N = torch.stack([is_intact(expert) for expert in packed])
            is_intact_N = torch.empty(len(packed), dtype=torch.bool, pin_memory=True)
            is_intact_N.copy_(on_device_N, non_blocking=True)
            is_done = torch.cuda.Event()
            is_done.record()

        def wait() -> list[bool]:
            is_done.synchronize()
            result: list[bool] = is_intact_N.tolist()
            return result

        return wait
