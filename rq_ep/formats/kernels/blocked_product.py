"""Rows times a matrix whose weights are made a block of output channels at a time: unpacked, or widened to fp32.

Most CPUs without arithmetic in bf16 or fp16 (AVX2, say) multiply in it five to ten times as slowly as in fp32. There, a
block that stays in the cache is widened, unless rows are so few that reading the weights twice costs more.

Axes: N rows, O output channels, I inputs.
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from rq_ep.formats.kernels.unpack import scale_channels

# Weights that are made at a time: on a CPU a block that stays in the cache, on a GPU one that fills the machine.
_BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
_ROWS_ON_THE_RIGHT = range(12, 128)  # in bf16 on a CPU, so few rows are multiplied faster from this side
_MIN_WIDENED_ROWS = 8
_TRIAL_SHAPE = (64, 256, 512)  # rows, outputs, inputs: a millisecond at most

# Weights [end - start, I] of the output channels from start to end, and factors [end - start] of theirs, or None.
MakeWeights = Callable[[int, int], tuple[Tensor, Tensor | None]]


def blocked_product(x_NI: Tensor, num_out: int, make_weights: MakeWeights) -> Tensor:
    """Rows [N, I] times a matrix of `num_out` channels: [N, O] in the rows' dtype."""
    out_NO = x_NI.new_empty(len(x_NI), num_out)
    if not len(x_NI):
        return out_NO
    operand_NI = x_NI.float() if is_widened(x_NI) else x_NI
    for start, end in _blocks(num_out, _BLOCK_ELEMENTS[x_NI.device.type] // x_NI.shape[1]):
        weight_OI, scale_O = make_weights(start, end)
        block_NO = _matmul(operand_NI, weight_OI.to(operand_NI.dtype))
        out_NO[:, start:end] = block_NO if scale_O is None else scale_channels(block_NO, scale_O)
    return out_NO


def is_widened(x_NI: Tensor) -> bool:
    """Whether rows [N, I] are multiplied in fp32 although they are not in it."""
    return x_NI.device.type == "cpu" and len(x_NI) >= _MIN_WIDENED_ROWS and not has_fast_products(x_NI.dtype)


@cache
def has_fast_products(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in `dtype` at least as fast as in fp32 after widening; measured once, in 10 ms."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    rows, num_out, num_in = _TRIAL_SHAPE
    x_NI, weight_OI = torch.ones(rows, num_in, dtype=dtype), torch.ones(num_out, num_in, dtype=dtype)
    return _seconds(lambda: F.linear(x_NI, weight_OI)) <= _seconds(lambda: F.linear(x_NI.float(), weight_OI.float()))


def _seconds(product: Callable[[], Tensor]) -> float:
    """Of the fastest of a few calls."""

    def times() -> Iterator[float]:
        for _ in range(4):
            start = perf_counter()
            product()
            yield perf_counter() - start

    return min(times())


def _blocks(size: int, limit: int) -> list[tuple[int, int]]:
    """Spans of about equal size, none above `limit` (but at least 1)."""
    step = -(-size // -(-size // max(1, limit)))
    return list(pairwise((*range(0, size, step), size)))


def _matmul(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    if x_NI.device.type == "cpu" and x_NI.dtype == torch.bfloat16 and len(x_NI) in _ROWS_ON_THE_RIGHT:
        return (weight_OI @ x_NI.T).T
    return F.linear(x_NI, weight_OI)
