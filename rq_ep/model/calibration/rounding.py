"""Rounding of weights to a low-bit format: to the nearest number, or calibrated on the expert's inputs (GPTQ)."""

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional as F

from rq_ep.formats import WeightFormat
from rq_ep.formats.gptq import pack_gptq, second_moments
from rq_ep.formats.int4 import Int4
from rq_ep.moe.expert_family import ExpertFamily

# (format, one expert's tensors, its calibration inputs [N, D], family) -> packed expert, uint8 [nbytes]
Rounding = Callable[[WeightFormat, Mapping[str, Tensor], Tensor, ExpertFamily], Tensor]


def nearest(format_: WeightFormat, weights: Mapping[str, Tensor], rows_ND: Tensor, family: ExpertFamily) -> Tensor:
    """Round every weight to the nearest number."""
    return format_.pack(weights, family.layout)


def calibrated(format_: WeightFormat, weights: Mapping[str, Tensor], rows_ND: Tensor, family: ExpertFamily) -> Tensor:
    """Round by GPTQ (arXiv 2210.17323) to int4, where it pays; other formats and experts without inputs, to nearest."""
    if not isinstance(format_, Int4) or not len(rows_ND):
        return nearest(format_, weights, rows_ND, family)
    layout = family.layout
    weights = {name: weight.float() for name, weight in weights.items()}
    rows_ND = rows_ND.to(weights[family.up].device).float()
    up = weights[family.up].T if layout.is_transposed else weights[family.up]
    inner_NF = family.apply_gate(F.linear(rows_ND, up, weights.get(f"{family.up}_bias")))
    moments = {family.up: second_moments(rows_ND), family.down: second_moments(inner_NF)}
    if not all(moment.any() for moment in moments.values()):  # an activation that is zero everywhere
        return nearest(format_, weights, rows_ND, family)
    return pack_gptq(format_, weights, moments, layout)


ROUNDINGS: Mapping[str, Rounding] = {"calibrated": calibrated, "nearest": nearest}
