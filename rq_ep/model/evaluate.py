"""Evaluation: held-out text through the dense model and through expert-parallel ones, in one process, side by side."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp, isnan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from rq_ep.core.arrays import FloatArray
from rq_ep.core.cost import CostModel, LayerCost
from rq_ep.core.placement import Placement
from rq_ep.core.plan import imbalance
from rq_ep.core.strategy import Strategy
from rq_ep.formats import native_format_name
from rq_ep.model.checkpoint import read_config, read_dense, read_tokenizer
from rq_ep.model.identity import model_identity
from rq_ep.model.load import LoadReport, load
from rq_ep.model.placing import layer_cost, place_uniformly
from rq_ep.model.seam import family_of, find_expert_modules
from rq_ep.model.teaching import taught
from rq_ep.model.windows import Texts, check_sequence_length, make_windows
from rq_ep.moe import ExpertBank, LocalExperts, Telemetry
from rq_ep.parallel.default import own_device

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Contender:
    """A row of the comparison: a strategy, on a placement or, without one, on its own for uniform load."""

    label: str
    strategy: Strategy
    placement: Placement | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean over windows of text and its standard error, which is NaN for a single window."""

    mean: float
    error: float

    @classmethod
    def of(cls, per_window: Sequence[float]) -> "Estimate":
        values = np.array(per_window)
        error = float(values.std(ddof=1)) / sqrt(len(values)) if len(values) > 1 else float("nan")
        return cls(float(values.mean()), error)

    def exp(self) -> "Estimate":
        """e to the mean, the error carried along: a perplexity from nats per token."""
        return Estimate(exp(self.mean), exp(self.mean) * self.error)

    def as_dict(self) -> dict[str, float | None]:
        """Plain values, for JSON, which knows no NaN."""
        return {"mean": self.mean, "error": None if isnan(self.error) else self.error}


@dataclass(frozen=True)
class Evaluation:
    """What one contender did on the text. A step is one batch; loads are pairs that a rank computes in a layer."""

    label: str
    num_tokens: int  # predicted tokens that the quality figures rest on
    imbalance_mean: float  # max/mean load over ranks, averaged over steps and layers
    imbalance_worst: float  # of all steps and layers
    compute_s_p50: float  # seconds of the slowest rank in a layer, median over steps and layers
    compute_s_p99: float
    predicted_s_p50: float | None  # what a cost model expects instead of `compute_s_p50`
    prediction_error: float | None  # |predicted / measured - 1| of the slowest rank, median over steps and layers
    bytes_R: tuple[int, ...]  # resident experts of all layers, and the room that borrowed ones took
    transfer_bytes: float  # borrowed experts that travel in a layer and step, on average
    dense_perplexity: Estimate
    perplexity: Estimate
    kl: Estimate  # nats per token, dense || this
    agreement: float  # share of tokens with the dense model's most likely next token
    sorted_loads_R: FloatArray = field(compare=False)  # mean load of the busiest rank, the next, ...; 1 is the mean

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["sorted_loads_R"] = self.sorted_loads_R.tolist()
        return {name: value.as_dict() if isinstance(value, Estimate) else value for name, value in values.items()}


@torch.no_grad()
def compare(
    path: str | Path,
    texts: Texts,
    contenders: Sequence[Contender],
    *,
    num_ranks: int,
    batch_size: int = 8,
    sequence_length: int = 128,
    max_tokens: int = 16_384,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    seed: int = 0,
    machine: CostModel | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> list[Evaluation]:
    """Run the same windows of text through the dense model and through every contender, batch by batch in turns.

    An encoder-decoder reads the first half of each window and writes the second, which it is told token by token.

    All ranks live in this process and compute one at a time, so a rank's seconds are its own; on the CPU they are
    those of its thread, which other processes do not stretch. The first batch is run once before anything is measured.

    Args:
        path: checkpoint directory.
        texts: held-out text; see `windows.read_texts`.
        contenders: what to compare; each holds its own copy of the model while this runs.
        num_ranks: ranks that share the experts; a batch's tokens are dealt to them in equal runs.
        batch_size: sequences in a batch.
        sequence_length: tokens in a sequence.
        max_tokens: tokens to run in all, shared evenly by the domains.
        dtype: to compute in. In fp32 what remains is the error of the formats; in bf16 rounding adds its own.
        device: auto, cpu or cuda.
        seed: chooses the places that windows of text are taken from.
        machine: predicts the seconds that are measured.
        progress: called with (stage, done, total) while it runs.

    Raises:
        UserError: no such checkpoint, no text, a placement for another model or another number of ranks, a machine
            that does not know these experts.
    """
    stored_dtype: Any = read_config(path).dtype or torch.bfloat16
    identity = model_identity(path)
    for contender in contenders:
        if contender.placement is not None:
            contender.placement.check_serves(identity, num_ranks, f"the placement of {contender.label}")
    dense = read_dense(path, dtype, own_device(device))
    experts = find_expert_modules(dense)
    family = family_of(experts[0].module)
    stored_format = native_format_name(stored_dtype)
    check_sequence_length(sequence_length, dense.config, low=2)  # a token that is predicted, after one that is read
    windows = make_windows(
        texts, read_tokenizer(path), sequence_length=sequence_length, max_tokens=max_tokens,
        batch_size=batch_size, seed=seed,
    )  # fmt: skip
    runs = []
    for done, contender in enumerate(contenders):
        progress("loading", done, len(contenders))
        placement = contender.placement or place_uniformly(
            contender.strategy, experts, family.layout, stored_format, num_ranks, identity
        )
        cost = layer_cost(machine, family, placement, contender.strategy)
        telemetry = Telemetry(clock=time.thread_time if dense.device.type == "cpu" else None)
        model = load(
            path, placement, contender.strategy, num_local_ranks=num_ranks, dtype=dtype, device=device,
            telemetry=telemetry,
        )  # fmt: skip
        runs.append(_Run(contender.label, model, telemetry, cost))
    for run in runs:
        arguments, _ = taught(dense.config, windows.batches[0].tokens_BT.to(dense.device))
        run.model(**arguments, use_cache=False)
        run.telemetry.clear()
    dense_nll: list[float] = []
    num_predicted = 0
    for done, batch in enumerate(windows.batches):
        arguments, tokens_BT = taught(dense.config, batch.tokens_BT.to(dense.device))
        num_predicted += tokens_BT[:, 1:].numel()
        dense_BTV = dense(**arguments, use_cache=False).logits
        dense_nll += _nll(dense_BTV, tokens_BT)
        for run in runs:
            run.quality.add(dense_BTV, run.model(**arguments, use_cache=False).logits, tokens_BT)
        progress("evaluating", done + 1, len(windows.batches))
    return [run.result(num_predicted, Estimate.of(dense_nll).exp()) for run in runs]


def evaluate(
    path: str | Path, texts: Texts, placement: Placement | None, strategy: Strategy, **settings: Any
) -> Evaluation:
    """`compare` for a single contender; `settings` are those of `compare`, `num_ranks` among them."""
    contender = Contender(strategy.name, strategy, placement)
    return compare(path, texts, [contender], **settings)[0]


@dataclass
class _Quality:
    """Window by window, how far logits are from the dense model's."""

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)

    def add(self, dense_BTV: Tensor, logits_BTV: Tensor, tokens_BT: Tensor) -> None:
        self.nll += _nll(logits_BTV, tokens_BT)
        for dense_TV, logits_TV in zip(dense_BTV, logits_BTV, strict=True):
            # In doubles: the figure can be a billionth, and one window at a time bounds the memory.
            expected_TV, found_TV = (logits[:-1].double().log_softmax(-1) for logits in (dense_TV, logits_TV))
            kl_T = (expected_TV.exp() * (expected_TV - found_TV)).sum(-1)
            self.kl.append(kl_T.mean().item())
            self.agreement.append((expected_TV.argmax(-1) == found_TV.argmax(-1)).double().mean().item())


@dataclass
class _Run:
    """A contender at work."""

    label: str
    model: PreTrainedModel
    telemetry: Telemetry
    cost: LayerCost | None
    quality: _Quality = field(default_factory=_Quality)

    def result(self, num_predicted: int, dense_perplexity: Estimate) -> Evaluation:
        report: LoadReport = self.model.rq_ep  # type: ignore[assignment]
        layers = [layer for layer in report.layers if isinstance(layer, LocalExperts)]
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
            bytes_R=tuple(_bytes_held(banks) for banks in zip(*(layer.banks for layer in layers), strict=True)),
            transfer_bytes=float(self.telemetry.transfer_bytes().sum(axis=-1).mean()),
            dense_perplexity=dense_perplexity,
            perplexity=Estimate.of(self.quality.nll).exp(),
            kl=Estimate.of(self.quality.kl),
            agreement=float(np.mean(self.quality.agreement)),
            sorted_loads_R=np.sort(relative_NR, axis=1)[:, ::-1].mean(axis=0),
        )


def _bytes_held(banks: Sequence[ExpertBank]) -> int:
    """Bytes of one rank's experts in all layers, and of the largest room for borrowed ones, which ranks that are
    processes share between layers."""
    return sum(bank.nbytes for bank in banks) + max(bank.spare.nbytes for bank in banks)


def _nll(logits_BTV: Tensor, tokens_BT: Tensor) -> list[float]:
    """Nats per token of each window."""
    losses: list[float] = [
        F.cross_entropy(logits_TV[:-1].float(), tokens_T[1:]).item()
        for logits_TV, tokens_T in zip(logits_BTV, tokens_BT, strict=True)
    ]
    return losses
