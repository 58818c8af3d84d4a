"""Memory check before loading: the most that a rank will need, against the memory of its device."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.strategy import Strategy
from rq_ep.formats import ExpertLayout, get_format
from rq_ep.model.seam.expert_modules import ExpertsModule
from rq_ep.moe import ExpertFamily
from rq_ep.moe.expert_bank import MAX_CONVERTED
from rq_ep.moe.expert_compute import workspace_bytes
from rq_ep.parallel.receive_buffers import dispatch_limit, worst_dispatch_bytes


@dataclass(frozen=True)
class RankBytes:
    """The memory that one rank needs of its device, by purpose; None if it is not known in advance."""

    others: int  # weights that are not routed experts
    experts: int  # resident ones
    borrowed: int  # room for experts borrowed for a step, which the layers share
    repacked: int  # experts kept in the format they are lent in
    step: int | None  # rows, notes, sums and intermediate results of the largest step
    arriving: int = 0  # experts that arrive while the placement is replaced

    @property
    def total(self) -> int:
        return self.others + self.experts + self.borrowed + self.repacked + self.arriving + (self.step or 0)

    def __str__(self) -> str:
        parts = [f"{_gib(self.others + self.experts)} for weights ({_gib(self.experts)} of experts)"]
        parts.append(f"{_gib(self.borrowed)} to borrow")
        if self.repacked:
            parts.append(f"{_gib(self.repacked)} to lend in another format")
        if self.arriving:
            parts.append(f"{_gib(self.arriving)} for experts that arrive")
        parts.append("steps of unknown size" if self.step is None else f"{_gib(self.step)} for the largest step")
        return ", ".join(parts)


def expert_bytes(placement: Placement, layout: ExpertLayout, ranks: Sequence[int]) -> dict[str, int]:
    """Weight format -> bytes of the experts that a placement gives to `ranks`, over all layers."""
    held = Counter(replica.format for layer in placement.layers for replica in layer.replicas if replica.rank in ranks)
    return {name: number * get_format(name).nbytes(layout) for name, number in held.items()}


def borrowed_bytes(
    strategy: Strategy, placement: Placement, layout: ExpertLayout, movable_formats: Sequence[str] | None = None
) -> int:
    """Bytes of the experts that a rank borrows in a step at most, whatever moves if there are `movable_formats`."""
    if not strategy.lends:
        return 0
    number = max(
        layer.num_experts - (0 if movable_formats is not None else len(layer.replicas.on_rank(rank)))
        for layer in placement.layers
        for rank in range(placement.topology.num_ranks)
    )
    if strategy.max_borrowed is not None:
        number = min(number, strategy.max_borrowed)
    names = travelling_formats(strategy, placement) | {*(movable_formats or ())}
    return number * max(get_format(name).nbytes(layout) for name in names)


def arriving_bytes(placement: Placement, ranks: Sequence[int], room: int) -> int:
    """Bytes that `ranks` may hold beside their resident experts while the placement is replaced.

    These are what the budget of each leaves free at first and, beside it, room for what arrives.
    """
    budget_R = placement.budget_bytes_R or placement.bytes_R
    return sum(max(budget_R[rank] - placement.bytes_R[rank], 0) + room for rank in ranks)


def most_layer_bytes(placement: Placement, layout: ExpertLayout, ranks: Sequence[int]) -> int:
    """Bytes of the experts of one layer on `ranks` at most: they are there twice while a layer is copied."""
    sizes = {name: get_format(name).nbytes(layout) for name in placement.formats}
    return max(
        sum(sizes[replica.format] for replica in layer.replicas if replica.rank in ranks) for layer in placement.layers
    )


def travelling_formats(strategy: Strategy, placement: Placement) -> set[str]:
    """Every format that an expert may be stored or lent in; beyond its cap, experts are lent as they are stored."""
    sent = strategy.transient_format
    return {*placement.formats} if sent is None else {*placement.formats, sent}


def step_bytes(
    family: ExpertFamily, top_k: int, num_ranks: int, num_tokens: int, dtype: torch.dtype, kind: str, limit: int | None
) -> int:
    """Bytes of a rank's largest step: every rank has `num_tokens`, and all of them may choose this rank's experts.

    Args:
        family: of the experts.
        top_k: experts of a token.
        num_ranks: R.
        num_tokens: of each rank.
        dtype: of the rows.
        kind: type of the device.
        limit: bytes of other ranks' rows held at once; None: as the exchange chooses.
    """
    row_bytes = family.hidden_size * dtype.itemsize
    if limit is None:
        limit = dispatch_limit(np.full(num_ranks, num_tokens), top_k, row_bytes, kind)
    rows = worst_dispatch_bytes(num_tokens, top_k, num_ranks, family.hidden_size, dtype.itemsize, limit)
    return rows + workspace_bytes(family, dtype, num_ranks * num_tokens * top_k, kind)


def rank_bytes(
    model: PreTrainedModel,
    experts: Sequence[ExpertsModule],
    resident: Mapping[str, int],
    placement: Placement,
    strategy: Strategy,
    layout: ExpertLayout,
    step: int | None,
    movable_formats: Sequence[str] | None = None,
    arriving: int = 0,
) -> RankBytes:
    """The memory that a rank will need.

    Args:
        model: on the meta device, with all of its experts.
        experts: its routed experts.
        resident: bytes of the experts that the rank will hold, by format.
        placement: of all experts.
        strategy: that may borrow some.
        layout: of an expert.
        step: bytes of the largest step, if it is known.
        movable_formats: that experts may be stored in besides, if the placement may be replaced.
        arriving: bytes of experts that arrive meanwhile.
    """
    routed = sum(parameter.nbytes for module in experts for parameter in module.module.parameters())
    sent = strategy.transient_format
    repacked = 0
    if sent is not None and {*placement.formats, *(movable_formats or ())} != {sent}:
        repacked = MAX_CONVERTED * len(experts) * get_format(sent).nbytes(layout)
    return RankBytes(
        others=sum(parameter.nbytes for parameter in model.parameters()) - routed,
        experts=sum(resident.values()),
        borrowed=borrowed_bytes(strategy, placement, layout, movable_formats),
        repacked=repacked,
        step=step,
        arriving=arriving,
    )


def check_fits(needed: RankBytes, rank: int, device: torch.device) -> None:
    """Raise a `UserError` with the numbers unless what a rank needs fits its device."""
    available = available_bytes(device)
    if available is not None and needed.total > available:
        of_rebalancing = ", or lower --rebalance-room" if needed.arriving else ""
        raise UserError(
            f"rank {rank} needs {_gib(needed.total)}: {needed}; but {device} has {_gib(available)}: start more ranks, "
            "place with lower-bit --formats and a smaller --budget, let the strategy borrow fewer experts "
            f"(max_borrowed), or lower --max-num-batched-tokens or --max-dispatch-bytes{of_rebalancing}"
        )


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU, all memory of the machine for a CPU; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def spare_bytes(free: int | None, device: torch.device, num_sharing: int) -> int | None:
    """Memory that a rank which serves may fill besides: half of what is free, and not known where that is not.

    Args:
        free: bytes, by `free_bytes`.
        device: a GPU, which the rank has for itself, or a CPU.
        num_sharing: ranks that share the memory of a CPU.
    """
    return None if free is None else free // (2 if device.type == "cuda" else 2 * num_sharing)


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that its rank could still fill, or of a CPU's machine; None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return kib * 1024


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"
