"""How much each expert matters: the definitions to choose from. How often an expert is used is only one of them."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.formats import ExpertLayout
from rq_ep.model.calibration.divergence import DROPPED
from rq_ep.model.seam.expert_modules import ExpertsModule
from rq_ep.moe.expert_family import ExpertFamily

# `drop` asks the model again for every expert; the others come out of the one pass over the text.
IMPORTANCES: Mapping[str, str] = {
    "output": "sum over routed calibration pairs of (gate weight * L2 norm of the expert's output)",
    "gate-mass": "sum of the gate weights of routed calibration pairs",
    "load": "routed calibration pairs",
    "wanda": "sum over weights of |weight| * L2 norm of its input over calibration pairs (arXiv 2306.11695)",
    "drop": DROPPED,
}


@torch.no_grad()
def wanda_E(experts: ExpertsModule, family: ExpertFamily, rows: Sequence[Tensor], visits_E: IntArray) -> FloatArray:
    """[E] Wanda's score, added up over an expert's weights; 0 of one that nobody visited, or that is not held here.

    Args:
        experts: of a layer.
        family: of its experts.
        rows: [E] inputs [n, D] that were kept of each expert.
        visits_E: [E] inputs there were: norms are scaled to them.
    """
    layout = family.layout
    scores_E = np.zeros(len(rows))
    for expert in experts.held:
        if len(kept_ND := rows[expert]):
            weights = {name: weight.float() for name, weight in experts.weights(expert).items()}
            hidden_ND = kept_ND.to(weights[family.up].device).float()
            inner_NF = family.apply_gate(_linear(hidden_ND, weights, family.up, layout))
            pairs = ((hidden_ND, family.up), (inner_NF, family.down))
            score = sum(float(_score(x_NI, weights[name], layout.out_axis(name))) for x_NI, name in pairs)
            scores_E[expert] = score * np.sqrt(visits_E[expert] / len(kept_ND))
    return scores_E


def _linear(x_ND: Tensor, weights: Mapping[str, Tensor], name: str, layout: ExpertLayout) -> Tensor:
    weight = weights[name].T if layout.is_transposed else weights[name]
    return F.linear(x_ND, weight, weights.get(f"{name}_bias"))


def _score(x_NI: Tensor, weight: Tensor, out_axis: int) -> Tensor:
    """Sum of |weight| * norm of its input over one matrix."""
    return weight.abs().sum(out_axis) @ x_NI.norm(dim=0)
