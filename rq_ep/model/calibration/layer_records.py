"""Recording the experts of a model during forward passes: routing, norms of outputs, and a sample of inputs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rq_ep.core.arrays import FloatArray, IntArray

# (hidden_TD, topk_ids_TK, topk_weights_TK) -> out_TD
ExpertsForward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Step(NamedTuple):
    """One step of calibration."""

    phase: int
    domain: int
    tokens: int
    counts_LE: IntArray


@dataclass
class LayerRecord:
    """What one experts module did since recording began. N counts the rows that are kept of an expert."""

    num_experts: int
    rows_per_batch: int  # inputs to keep of each expert and batch
    topk_ids_TK: IntArray = field(init=False)  # of the last forward pass
    topk_weights_TK: FloatArray = field(init=False)
    importance_E: FloatArray = field(init=False)
    gate_mass_E: FloatArray = field(init=False)
    visits_E: IntArray = field(init=False)
    rows: list[list[Tensor]] = field(init=False)  # [E] inputs [N, D], a tensor for each batch

    def __post_init__(self) -> None:
        self.topk_ids_TK = np.zeros((0, 0), np.int64)
        self.topk_weights_TK = np.zeros((0, 0))
        self.importance_E = np.zeros(self.num_experts)
        self.gate_mass_E = np.zeros(self.num_experts)
        self.visits_E = np.zeros(self.num_experts, np.int64)
        self.rows = [[] for _ in range(self.num_experts)]

    def counts_E(self, topk_ids: IntArray) -> IntArray:
        """[E] routed pairs among `topk_ids`."""
        return np.bincount(topk_ids.ravel(), minlength=self.num_experts)

    def kept_rows(self) -> list[Tensor]:
        """[E] inputs [N, D] that were kept of each expert."""
        return [torch.cat(rows) for rows in self.rows]

    def add(self, hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, norms_TK: Tensor) -> None:
        """Add one forward pass; `norms_TK` are those of every expert's output before it is weighted."""
        ids_TK = topk_ids_TK.cpu().numpy()
        weights_TK = topk_weights_TK.double().cpu().numpy()
        self.topk_ids_TK, self.topk_weights_TK = ids_TK, weights_TK
        weights_TK = np.abs(weights_TK)  # gemma4 scales experts, by negative numbers too
        weighted_norms_TK = weights_TK * norms_TK.double().cpu().numpy()
        self.visits_E += self.counts_E(ids_TK)
        self.gate_mass_E += np.bincount(ids_TK.ravel(), weights_TK.ravel(), self.num_experts)
        self.importance_E += np.bincount(ids_TK.ravel(), weighted_norms_TK.ravel(), self.num_experts)
        for expert, rows in enumerate(self.rows):
            tokens = np.flatnonzero((ids_TK == expert).any(axis=1))
            sample = torch.from_numpy(tokens[:: max(1, -(-len(tokens) // self.rows_per_batch))])
            rows.append(hidden_TD[sample.to(hidden_TD.device)].cpu())


@contextmanager
def recording(modules: Sequence[nn.Module], num_experts: int, rows_per_batch: int) -> Iterator[list[LayerRecord]]:
    """While open, every forward pass of the experts `modules` is added to its record; results stay the same.

    The module's own forward method is called once, with every routed pair as a token of its own and of weight one; the
    weighted sum over a token's pairs is computed here. So this works for any family and any experts implementation.
    """
    records = [LayerRecord(num_experts, rows_per_batch) for _ in modules]
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module, record in zip(modules, records, strict=True):
            module.__dict__["forward"] = _recorded(module.forward, record)  # hides the method of the class
        yield records
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.__dict__["forward"]
            if forward is not None:  # an attribute hid the method before, as accelerate's does
                module.__dict__["forward"] = forward


def _recorded(plain_forward: ExpertsForward, record: LayerRecord) -> ExpertsForward:
    def forward(hidden_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        num_tokens, top_k = topk_ids_TK.shape
        topk_ids_N1 = topk_ids_TK.reshape(-1, 1)
        hidden_ND = hidden_TD.repeat_interleave(top_k, dim=0)
        out_ND = plain_forward(hidden_ND, topk_ids_N1, topk_weights_TK.new_ones(topk_ids_N1.shape))
        out_TKD = out_ND.view(num_tokens, top_k, -1)
        record.add(hidden_TD, topk_ids_TK, topk_weights_TK, out_TKD.float().norm(dim=-1))
        return (out_TKD * topk_weights_TK[..., None]).sum(dim=1).to(hidden_TD.dtype)

    return forward
