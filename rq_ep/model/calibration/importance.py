"""Importance of experts by their weights: Wanda's score (arXiv 2306.11695). `IMPORTANCES` lists all definitions.

Axes: N inputs kept of an expert, I inputs of a matrix.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.formats import ExpertLayout
from rq_ep.model.seam.expert_modules import ExpertsModule
from rq_ep.moe.expert_family import ExpertFamily


@torch.no_grad()
def wanda_E(experts: ExpertsModule, family: ExpertFamily, rows_E: Sequence[Tensor], visits_E: IntArray) -> FloatArray:
    """[E] Wanda's score, summed over an expert's weights; 0 for an expert without inputs, or on another rank.

    Args:
        experts: of a layer.
        family: of its experts.
        rows_E: [E] inputs [N, D] that were kept of each expert.
        visits_E: [E] inputs there were; the norms are scaled to that number.
    """
    layout = family.layout
    scores_E = np.zeros(len(rows_E))
    for expert in experts.local_experts:
        if len(kept_ND := rows_E[expert]):
            weights = {name: weight.float() for name, weight in experts.weights(expert).items()}
            hidden_ND = kept_ND.to(weights[family.up].device).float()
            inner_NF = family.apply_gate(_linear(hidden_ND, weights, family.up, layout))
            pairs = ((hidden_ND, family.up), (inner_NF, family.down))
            score = sum(_matrix_score(x_NI, weights[name], layout.out_axis(name)) for x_NI, name in pairs)
            scores_E[expert] = score * np.sqrt(visits_E[expert] / len(kept_ND))
    return scores_E


def _linear(x_ND: Tensor, weights: Mapping[str, Tensor], name: str, layout: ExpertLayout) -> Tensor:
    weight = weights[name].T if layout.is_transposed else weights[name]
    return F.linear(x_ND, weight, weights.get(f"{name}_bias"))


def _matrix_score(x_NI: Tensor, weight: Tensor, out_axis: int) -> float:
    """Sum of |weight| * norm of its input over one matrix."""
    return float(weight.abs().sum(out_axis) @ x_NI.norm(dim=0))
