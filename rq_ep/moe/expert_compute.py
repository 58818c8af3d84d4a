"""Grouped expert computation: rows through the experts they are routed to, weighted and summed row by row.

Axes: G groups of a grouped GEMM, one for each local replica that has pairs.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rq_ep.moe.expert_family import ExpertFamily
from rq_ep.moe.grouped_gemm import Stack, multiply
from rq_ep.moe.output_norms import add_norms
from rq_ep.moe.weighted_sums import add_rows
from rq_ep.parallel import Received

# Bytes of intermediate results; more pairs than fit are computed one part after another.
MAX_WORKSPACE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}


class GroupedExperts(NamedTuple):
    """Local replicas whose experts lie in one stack: the groups of a grouped GEMM."""

    stack: Stack
    slots: list[int]  # where each replica lies, ascending
    replicas: list[int]  # numbers of the local replicas, each with at least one pair


def add_outputs(
    partial_MD: Tensor,
    received: Received,
    grouped: GroupedExperts,
    family: ExpertFamily,
    max_bytes: int | None = None,
    norms_VE: Tensor | None = None,
) -> None:
    """Add the weighted outputs of replicas to their rows, in the order of the pairs.

    Args:
        partial_MD: [M, D] fp32 sums, changed in place.
        received: rows and pairs.
        grouped: the replicas to compute.
        family: layout and activation.
        max_bytes: bound of the workspace; default by device.
        norms_VE: sums of `OutputNorms` to add to; default: the step is not sampled.
    """
    spans = [(received.offsets[replica], received.offsets[replica + 1]) for replica in grouped.replicas]
    row_N = _gather(received.row_N, spans)
    weight_N = _gather(received.weight_N, spans)
    ends_G = list(accumulate(end - start for start, end in spans))
    limit = max_bytes or MAX_WORKSPACE_BYTES[partial_MD.device.type]
    step = max(1, limit // _row_bytes(family, received.rows_MD.dtype))
    for start in range(0, len(row_N), step):
        rows = row_N[start : start + step]
        ends = [min(max(end - start, 0), len(rows)) for end in ends_G]
        up_NF = multiply(received.rows_MD.index_select(0, rows), grouped.stack, grouped.slots, ends, family.up)
        out_ND = multiply(family.apply_gate(up_NF), grouped.stack, grouped.slots, ends, family.down)
        add_rows(partial_MD, rows, family.normalized(out_ND), weight_N[start : start + step])
        if norms_VE is not None:
            experts = [received.experts[replica] for replica in grouped.replicas]
            add_norms(norms_VE, experts, ends, out_ND, weight_N[start : start + step])


def _gather(values_N: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    if all(end == start for (_, end), (start, _) in pairwise(spans)):
        return values_N[spans[0][0] : spans[-1][1]]
    return torch.cat([values_N[start:end] for start, end in spans])


def workspace_bytes(family: ExpertFamily, dtype: torch.dtype, num_pairs: int, kind: str) -> int:
    """Bytes of intermediate results that so many pairs take on a device of type `kind`."""
    return min(num_pairs * _row_bytes(family, dtype), MAX_WORKSPACE_BYTES[kind])


def _row_bytes(family: ExpertFamily, dtype: torch.dtype) -> int:
    """Workspace of one pair: its row, both matrices' outputs, the gate's, and the weighted output in fp32."""
    up_size = family.layout.shapes[family.up][family.layout.out_axis(family.up)]
    return (2 * family.hidden_size + 2 * up_size) * dtype.itemsize + 4 * family.hidden_size
