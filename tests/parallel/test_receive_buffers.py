"""Memory for rows: buffers that are kept, and bounds."""

import numpy as np
import torch

from rq_ep.parallel.receive_buffers import (
    MAX_DISPATCH_BYTES,
    MIN_DISPATCH_BYTES,
    ReceiveBuffers,
    dispatch_limit,
    worst_dispatch_bytes,
)


def test_a_buffer_grows_and_is_kept() -> None:
    buffers = ReceiveBuffers(torch.device("cpu"))
    first = buffers.take(0, 3, 4, torch.float32)
    assert (first.shape, buffers.nbytes) == ((3, 4), 48)
    assert buffers.take(0, 4, 4, torch.bfloat16).data_ptr() == first.data_ptr()
    buffers.take(1, 1, 4, torch.float32)
    buffers.take(0, 6, 4, torch.float32)
    assert buffers.nbytes == 96 + 16


def test_the_default_bound_is_a_tenth_more_than_a_balanced_step() -> None:
    """Of four ranks' 1000 tokens with two choices, 1 - (3/4)^2 = 7/16 of the other ranks' tokens come here."""
    tokens_R, row_bytes = np.full(4, 1000), 1 << 13
    assert dispatch_limit(tokens_R, 2, row_bytes, "cpu") == int(1.1 * (3000 * 7 // 16) * row_bytes)
    assert dispatch_limit(tokens_R, 2, 16, "cpu") == MIN_DISPATCH_BYTES["cpu"]
    assert dispatch_limit(tokens_R * 1000, 2, row_bytes, "cpu") == MAX_DISPATCH_BYTES["cpu"]
    assert dispatch_limit(np.array([0, 0, 0, 0]), 8, row_bytes, "cuda") == MIN_DISPATCH_BYTES["cuda"]


def test_the_worst_step_grows_with_its_bound_and_never_beyond_all_rows() -> None:
    sizes = {"num_tokens": 100, "top_k": 4, "num_ranks": 8, "hidden_size": 64, "itemsize": 2}
    few, many, all_rows = (worst_dispatch_bytes(**sizes, limit=limit) for limit in (1 << 12, 1 << 15, 1 << 30))
    assert few < many < all_rows
    assert all_rows == worst_dispatch_bytes(**sizes, limit=7 * 100 * 64 * 2)
    assert all_rows > (8 + 7 + 2 * 4) * 100 * 64 * 2 + 8 * 100 * 64 * 4
