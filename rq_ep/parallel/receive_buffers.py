"""Buffers for received rows, which the layers of a rank share, and the bounds of their size."""

import torch
from torch import Tensor

from rq_ep.core.arrays import IntArray

# A rank holds so many times the rows of other ranks that a balanced step would bring, within these bounds. If more
# arrive, they are received, computed and returned part by part, in the same buffers.
PART_SLACK = 1.1
MIN_DISPATCH_BYTES = {"cpu": 1 << 22, "cuda": 1 << 26}
MAX_DISPATCH_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
PAIR_BYTES = 48  # of a pair's metadata, and of the indices that bring pairs into order


class ReceiveBuffers:
    """Buffers that grow to the size needed and are kept. A buffer is its taker's until it is taken again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, number: int, num_rows: int, row_size: int, dtype: torch.dtype) -> Tensor:
        """Buffer `number` as rows [num_rows, row_size], with arbitrary contents."""
        num_bytes = num_rows * row_size * dtype.itemsize
        buffer = self._buffers.get(number)
        if buffer is None or len(buffer) < num_bytes:
            self._buffers.pop(number, None)
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
                buffer = self._buffers[number] = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return buffer[:num_bytes].view(dtype).view(num_rows, row_size)


def dispatch_limit(tokens_R: IntArray, top_k: int, row_bytes: int, kind: str) -> int:
    """The default bound on the bytes of other ranks' rows that a rank holds at once; the same on every rank.

    A token whose K choices fall on ranks at random misses a rank with probability ((R - 1) / R)^K. The bound is
    computed in integers, so that all ranks get the same.

    Args:
        tokens_R: [R] tokens of each rank in this step.
        top_k: choices of a token.
        row_bytes: of one row.
        kind: type of the device.
    """
    size = len(tokens_R)
    others = int(tokens_R.sum() - tokens_R.min())
    balanced = others * (size**top_k - (size - 1) ** top_k) // size**top_k
    return min(max(int(PART_SLACK * balanced * row_bytes), MIN_DISPATCH_BYTES[kind]), MAX_DISPATCH_BYTES[kind])


def worst_dispatch_bytes(
    num_tokens: int, top_k: int, num_ranks: int, hidden_size: int, itemsize: int, limit: int
) -> int:
    """Bytes that rows, metadata and sums of one layer take on a rank in the most uneven step of so many tokens a rank.

    Args:
        num_tokens: of each rank.
        top_k: choices of a token.
        num_ranks: R.
        hidden_size: of a row.
        itemsize: bytes of a number in a row.
        limit: bytes of other ranks' rows that are held at once.
    """
    row_bytes = hidden_size * itemsize
    own = num_tokens * row_bytes
    held = min((num_ranks - 1) * own, limit + num_ranks * row_bytes)
    away = min(top_k, num_ranks - 1) * own  # rows sent to others; as many sums come back
    sums = (own + held) // itemsize * 4  # of what is held, in fp32
    return own + held + sums + held + 2 * away + num_ranks * num_tokens * top_k * PAIR_BYTES
