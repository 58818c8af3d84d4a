"""Results of an evaluation: load, time, bytes and quality of each candidate, and the reference for the quality."""

from dataclasses import asdict, dataclass, field
from math import isnan
from typing import Any

import numpy as np

from rq_ep.core.arrays import FloatArray
from rq_ep.model.evaluation.quality import Estimate


@dataclass(frozen=True)
class Reference:
    """The dense model, and how far its own bf16 lies from its fp32: the noise floor."""

    perplexity: Estimate
    bf16_kl: Estimate | None  # nats per token; None: not measured
    bf16_agreement: Estimate | None


@dataclass(frozen=True)
class Evaluation:
    """Figures of one candidate on the text. A step is one batch; loads are pairs that a rank computes in a layer."""

    label: str
    num_tokens: int  # predicted tokens that the quality figures rest on
    imbalance_mean: float  # max/mean load over ranks, averaged over steps and layers
    imbalance_worst: float  # of all steps and layers
    compute_s_p50: float  # seconds of the slowest rank in a layer, median over steps and layers
    compute_s_p99: float
    predicted_s_p50: float | None  # what a cost model expects instead of `compute_s_p50`
    prediction_error: float | None  # |predicted / measured - 1| of the slowest rank, median over steps and layers
    bytes_R: tuple[int, ...]  # resident experts of all layers, and buffers of borrowed ones
    transfer_bytes: float  # borrowed experts that travel in a layer and step, on average
    dense: Reference
    perplexity: Estimate
    kl: Estimate  # nats per token, dense || this
    agreement: Estimate  # share of tokens with the dense model's most likely next token
    routing_shift_L: tuple[Estimate, ...]  # share of the dense routers' choices not made here; () of encoder-decoders
    greedy_match: Estimate | None  # share of greedy continuations equal to the dense model's, token by token
    sorted_loads_R: FloatArray = field(compare=False)  # mean load of the busiest rank, the next, ...; 1 is the mean

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which knows no NaN: the standard error of a single window is None."""
        values: dict[str, Any] = _plain(asdict(self))
        return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and isnan(value) else value
