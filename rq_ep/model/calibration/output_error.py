"""Relative error of an expert's output when its weights are stored in fewer bits."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rq_ep.core.arrays import FloatArray
from rq_ep.formats import WeightFormat, get_format
from rq_ep.model.seam.expert_modules import ExpertsModule
from rq_ep.moe.expert_family import ExpertFamily


@torch.no_grad()
def output_errors_EQ(
    experts: ExpertsModule,
    family: ExpertFamily,
    rows_E: Sequence[Tensor],
    formats: Sequence[WeightFormat],
    packed_expert: Callable[[int, str], Tensor | None] = lambda expert, name: None,
) -> FloatArray:
    """Relative output error of each expert of a layer in each format, computed in fp32.

    It is |f_q(x) - f(x)| / |f(x)| over all rows x (Frobenius norms). An expert without rows, which no calibration token
    chose, is measured on a sample of all others' rows, as many as the largest of them.

    Args:
        experts: of the layer.
        family: their layout and activation.
        rows_E: [E] inputs [N, D] of each expert.
        formats: the Q formats to measure.
        packed_expert: (expert, format name) -> the expert as it was packed in advance; None if each weight is to be
            rounded to the nearest.

    Returns:
        [E, Q]; 0 for an expert on another rank.
    """
    layout, fp32 = family.layout, get_format("fp32")
    error_EQ = np.zeros((len(rows_E), len(formats)))
    any_rows_ND = _sample(rows_E)
    for expert in experts.local_experts:
        weights = {name: weight.float() for name, weight in experts.weights(expert).items()}
        device = weights[family.down].device
        x_ND = (rows_E[expert] if len(rows_E[expert]) else any_rows_ND).to(device).float()
        exact_ND = family.forward(x_ND, fp32, weights)
        exact_norm = exact_ND.double().norm().clamp(min=torch.finfo(torch.float64).tiny)
        for q, format_ in enumerate(formats):
            packed = packed_expert(expert, format_.name)
            views = format_.views(format_.pack(weights, layout) if packed is None else packed.to(device), layout)
            rounded = {name: format_.dequantize(views, name, layout, torch.float32) for name in weights}
            rounded_ND = family.forward(x_ND, fp32, rounded)
            error_EQ[expert, q] = float((rounded_ND - exact_ND).double().norm() / exact_norm)
    return error_EQ


def _sample(rows_E: Sequence[Tensor]) -> Tensor:
    """Of the rows of all experts, at equal distances, at most as many as the expert with the most rows has."""
    rows_ND = torch.cat(list(rows_E))
    most = max(len(rows) for rows in rows_E)
    return rows_ND[:: -(-len(rows_ND) // most)] if most else rows_ND
