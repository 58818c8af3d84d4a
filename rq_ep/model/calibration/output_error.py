"""How much an expert's output suffers when its weights are stored in fewer bits."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rq_ep.core.arrays import FloatArray
from rq_ep.formats import WeightFormat, get_format
from rq_ep.model.seam.expert_modules import ExpertsModule
from rq_ep.moe.expert_family import ExpertFamily


@torch.no_grad()
def output_errors(
    experts: ExpertsModule,
    family: ExpertFamily,
    rows: Sequence[Tensor],
    formats: Sequence[WeightFormat],
    packed: Callable[[int, str], Tensor | None] = lambda expert, name: None,
) -> FloatArray:
    """Relative output error of each expert of a layer in each format, computed in fp32.

    It is |f_q(x) - f(x)| / |f(x)| over the rows x together (Frobenius norms). An expert without rows, which no
    calibration token chose, is measured on the rows of all others.

    Args:
        experts: of the layer.
        family: their layout and activation.
        rows: [E] inputs [n, D] of each expert.
        formats: the Q formats to measure.
        packed: (expert, format name) -> the expert as it was packed in advance; None where each weight is to be rounded
            to the nearest.

    Returns:
        [E, Q]; 0 of an expert that is not held here.
    """
    layout, exact_format = family.layout, get_format("fp32")
    error_EQ = np.zeros((len(rows), len(formats)))
    for expert in experts.held:
        weights = {name: weight.float() for name, weight in experts.weights(expert).items()}
        device = weights[family.down].device
        x_ND = (rows[expert] if len(rows[expert]) else torch.cat(list(rows))).to(device).float()
        exact_ND = family.forward(x_ND, exact_format, weights)
        size = exact_ND.double().norm().clamp(min=torch.finfo(torch.float64).tiny)
        for q, format_ in enumerate(formats):
            buffer = packed(expert, format_.name)
            views = format_.views(format_.pack(weights, layout) if buffer is None else buffer.to(device), layout)
            rounded = {name: format_.dequantize(views, name, layout, torch.float32) for name in weights}
            found_ND = family.forward(x_ND, exact_format, rounded)
            error_EQ[expert, q] = float((found_ND - exact_ND).double().norm() / size)
    return error_EQ
