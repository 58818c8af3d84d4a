"""Refusing in advance what would not fit: the weights of this process against the memory of its device."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.formats import ExpertLayout, get_format
from rq_ep.model.seam import ExpertsModule


def expert_bytes(placement: Placement, layout: ExpertLayout, ranks: Sequence[int]) -> dict[str, int]:
    """Weight format -> bytes of the experts that a placement gives to `ranks`, over all layers."""
    held = Counter(replica.format for layer in placement.layers for replica in layer.replicas if replica.rank in ranks)
    return {name: number * get_format(name).nbytes(layout) for name, number in held.items()}


def check_fits(
    model: PreTrainedModel,
    experts: Sequence[ExpertsModule],
    resident: Mapping[str, int],
    rank: int,
    device: torch.device,
) -> None:
    """Raise a `UserError` with the numbers unless a rank's weights fit its device.

    Args:
        model: on the meta device, with all of its experts.
        experts: its routed experts.
        resident: bytes of the experts that the rank will hold, by format.
    """
    routed = sum(parameter.nbytes for module in experts for parameter in module.module.parameters())
    others = sum(parameter.nbytes for parameter in model.parameters()) - routed
    needed, available = others + sum(resident.values()), available_bytes(device)
    if available is not None and needed > available:
        raise UserError(
            f"rank {rank} needs {_gib(needed)} for weights ({_gib(sum(resident.values()))} of experts), but {device} "
            f"has {_gib(available)}: start more ranks, or place with lower-bit --formats and a smaller --budget"
        )


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU, all memory of the machine for a CPU; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"
