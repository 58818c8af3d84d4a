"""Candidates of an evaluation: a strategy on a placement, loaded on ranks in this process, and what is measured of it.

Axes: B windows, T tokens of a window, V vocabulary, W tokens of a continuation, N layers of all steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from rq_ep.core.cost import LayerCost
from rq_ep.core.placement import Placement
from rq_ep.core.plan import imbalance
from rq_ep.core.strategy import Strategy
from rq_ep.model.evaluation.evaluation_result import Evaluation, Reference
from rq_ep.model.evaluation.quality import Estimate, Quality
from rq_ep.model.load.load_report import report_of
from rq_ep.moe import ExpertBank, LocalExperts, Telemetry


@dataclass(frozen=True)
class Candidate:
    """A row of the comparison: a strategy, on a placement or, without one, on its own for uniform load."""

    label: str
    strategy: Strategy
    placement: Placement | None = None


@dataclass
class CandidateRun:
    """A candidate that is loaded, and what was measured of it so far."""

    label: str
    model: PreTrainedModel
    telemetry: Telemetry
    cost: LayerCost | None
    quality: Quality = field(default_factory=Quality)
    shift_L: list[list[float]] = field(default_factory=list)  # window by window
    greedy_matches: list[float] = field(default_factory=list)

    @property
    def layers(self) -> list[LocalExperts]:
        return [layer for layer in report_of(self.model).layers if isinstance(layer, LocalExperts)]

    def add_shift(self, shift_L: Sequence[Sequence[float]]) -> None:
        """Add each layer's routing shift on a batch, window by window."""
        before_L = self.shift_L or [[]] * len(shift_L)
        self.shift_L = [[*before, *new] for before, new in zip(before_L, shift_L, strict=True)]

    def add_continuations(self, expected_BW: Tensor, continued_BW: Tensor) -> None:
        """Compare greedy continuations with the dense model's."""
        self.greedy_matches = (continued_BW == expected_BW).all(dim=1).double().tolist()

    def result(self, num_predicted: int, dense: Reference) -> Evaluation:
        """All figures, on `num_predicted` tokens."""
        layers = self.layers
        loads_NR = self.telemetry.loads().reshape(-1, len(layers[0].banks))
        imbalance_N = np.array([imbalance(loads_R) for loads_R in loads_NR])
        slowest_s = self.telemetry.seconds("compute").max(axis=-1)
        predicted_s = None if self.cost is None else self.telemetry.predicted_seconds(self.cost).max(axis=-1)
        relative_NR = loads_NR / loads_NR.mean(axis=1, keepdims=True)
        return Evaluation(
            label=self.label,
            num_tokens=num_predicted,
            imbalance_mean=float(imbalance_N.mean()),
            imbalance_worst=float(imbalance_N.max()),
            compute_s_p50=float(np.quantile(slowest_s, 0.5)),
            compute_s_p99=float(np.quantile(slowest_s, 0.99)),
            predicted_s_p50=None if predicted_s is None else float(np.quantile(predicted_s, 0.5)),
            prediction_error=None if predicted_s is None else float(np.median(abs(predicted_s / slowest_s - 1))),
            bytes_R=tuple(_bank_bytes(banks) for banks in zip(*(layer.banks for layer in layers), strict=True)),
            transfer_bytes=float(self.telemetry.transfer_bytes().sum(axis=-1).mean()),
            dense=dense,
            perplexity=Estimate.of(self.quality.nll).exp(),
            kl=Estimate.of(self.quality.kl),
            agreement=Estimate.of(self.quality.agreement),
            routing_shift_L=tuple(map(Estimate.of, self.shift_L)),
            greedy_match=Estimate.of(self.greedy_matches) if self.greedy_matches else None,
            sorted_loads_R=np.sort(relative_NR, axis=1)[:, ::-1].mean(axis=0),
        )


def _bank_bytes(banks: Sequence[ExpertBank]) -> int:
    """Bytes of one rank's experts in all layers, and of the largest buffer for borrowed ones.

    Ranks that are processes share that buffer between layers.
    """
    return sum(bank.nbytes for bank in banks) + max(bank.borrow_buffers.nbytes for bank in banks)
