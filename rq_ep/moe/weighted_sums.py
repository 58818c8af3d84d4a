"""Weighted sums of rows: on a CPU compiled, in one pass over the values, where PyTorch's operations take three."""

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from rq_ep.core.arrays import IntArray

Floats = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]  # of bf16, of fp32

_BITS = {torch.bfloat16: torch.uint16, torch.float32: torch.uint32}


def add_rows(out_MD: Tensor, row_N: Tensor, values_ND: Tensor, weight_N: Tensor) -> None:
    """Add weighted values to rows, in fp32; the values of one row are added in their order.

    Args:
        out_MD: [M, D] fp32, changed in place.
        row_N: int64, the row of each value.
        values_ND: [N, D] in any floating dtype.
        weight_N: fp32.
    """
    if out_MD.device.type == "cuda":  # index_add_ adds atomically there, in any order; this one sorts first
        out_MD.index_put_((row_N,), values_ND.float().mul_(weight_N[:, None]), accumulate=True)
        return
    if values_ND.dtype not in _BITS:
        values_ND = values_ND.float()
    bits_ND = values_ND.view(_BITS[values_ND.dtype]).numpy()
    _add(out_MD.numpy(), row_N.numpy(), bits_ND, weight_N.numpy(), np.uint32(32 - 8 * bits_ND.itemsize))


@njit(cache=True, nogil=True)
def _add(out_MD: Floats, row_N: IntArray, bits_ND: Bits, weight_N: Floats, shift: np.uint32) -> None:
    """Sum row by row, so that a sum stays in the cache until it is complete. Bits shifted left are those of fp32."""
    end_M = np.zeros(len(out_MD) + 1, np.int64)
    for row in row_N:
        end_M[row + 1] += 1
    for row in range(len(out_MD)):
        end_M[row + 1] += end_M[row]
    order_N = np.empty(len(row_N), np.int64)
    for n in range(len(row_N)):
        order_N[end_M[row_N[n]]] = n
        end_M[row_N[n]] += 1
    start = 0
    for row in range(len(out_MD)):
        for n in order_N[start : end_M[row]]:
            weight = weight_N[n]
            for d in range(out_MD.shape[1]):
                value = np.uint32(np.uint32(bits_ND[n, d]) << shift).view(np.float32)
                out_MD[row, d] += value * weight
        start = end_M[row]
