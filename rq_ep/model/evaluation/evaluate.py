"""Evaluation: held-out text through the dense model and through expert-parallel ones, in one process, side by side."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rq_ep.core.arrays import FloatArray
from rq_ep.core.cost import CostModel, LayerCost
from rq_ep.core.errors import check_integer
from rq_ep.core.placement import Placement
from rq_ep.core.plan import imbalance
from rq_ep.core.strategy import Strategy
from rq_ep.model.checkpoint.checkpoint_files import read_config
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.checkpoint.quantized_checkpoint import expert_format, open_checkpoint
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.model.evaluation.quality import Estimate, Quality, continuations, nll, routing_shift, watching_choices
from rq_ep.model.load.attach import layer_cost, place_uniformly
from rq_ep.model.load.load_model import LoadReport, load
from rq_ep.model.load.whole_model import read_dense
from rq_ep.model.seam.expert_modules import family_of, find_expert_modules
from rq_ep.model.text.teacher_forcing import taught
from rq_ep.model.text.windows import Batch, Texts, check_sequence_length, make_windows
from rq_ep.moe import ExpertBank, LocalExperts, Telemetry
from rq_ep.parallel.default_group import own_device
from rq_ep.parallel.host import short_collections

Progress = Callable[[str, int, int], None]  # stage, done, total

MAX_CONTINUED = 16  # windows that are continued greedily


@dataclass(frozen=True)
class Contender:
    """A row of the comparison: a strategy, on a placement or, without one, on its own for uniform load."""

    label: str
    strategy: Strategy
    placement: Placement | None = None


@dataclass(frozen=True)
class Reference:
    """The dense model that all are compared with, and how far its own bf16 lies from its fp32: the noise floor."""

    perplexity: Estimate
    bf16_kl: Estimate | None  # nats per token; None: not asked for
    bf16_agreement: Estimate | None


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
    dense: Reference
    perplexity: Estimate
    kl: Estimate  # nats per token, dense || this
    agreement: Estimate  # share of tokens with the dense model's most likely next token
    routing_shift_L: tuple[Estimate, ...]  # share of the dense routers' choices not made here; () of encoder-decoders
    greedy_match: Estimate | None  # share of greedy continuations equal to the dense model's, token by token
    sorted_loads_R: FloatArray = field(compare=False)  # mean load of the busiest rank, the next, ...; 1 is the mean

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, which knows no NaN: a standard error of one window is None."""
        values: dict[str, Any] = _plain(asdict(self))
        return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and isnan(value) else value


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
    packed_experts: str | Path | None = None,
    noise_floor: bool = True,
    greedy_tokens: int = 32,
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
        packed_experts: directory that `rq-ep quantize` wrote, as in `load`.
        noise_floor: also compare the dense model in bf16 with itself in fp32, which takes a further copy of it.
        greedy_tokens: length of the greedy continuations that are compared, of at most 16 windows; 0: none.
        progress: called with (stage, done, total) while it runs.

    Raises:
        UserError: no such checkpoint, no text, a placement for another model or another number of ranks, a machine
            that does not know these experts.
    """
    check_integer("--greedy-tokens", greedy_tokens)
    stored_dtype: Any = read_config(path).dtype or torch.bfloat16
    identity = model_identity(path)
    for contender in contenders:
        if contender.placement is not None:
            contender.placement.check_serves(identity, num_ranks, f"the placement of {contender.label}")
    dense = read_dense(path, dtype, own_device(device))
    experts = find_expert_modules(dense)
    family = family_of(experts[0].module)
    stored_format = expert_format(open_checkpoint(path), stored_dtype)
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
            telemetry=telemetry, packed_experts=packed_experts,
        )  # fmt: skip
        runs.append(_Run(contender.label, model, telemetry, cost))
    noise = _Noise.of(path, dtype, dense.device) if noise_floor else None
    _warm_up(dense, runs, windows.batches, greedy_tokens, progress)

    dense_nll: list[float] = []
    num_predicted = 0
    # An encoder-decoder's capacity drops tokens before its experts are asked, and other tokens where choices shift.
    has_choices = not dense.config.is_encoder_decoder
    with ExitStack() as stack:
        dense_choices = stack.enter_context(watching_choices([found.module for found in experts]))
        choices = [stack.enter_context(watching_choices(run.layers)) for run in runs]
        stack.enter_context(short_collections())
        for done, batch in enumerate(windows.batches):
            arguments, tokens_BT = taught(dense.config, batch.tokens_BT.to(dense.device))
            num_predicted += tokens_BT[:, 1:].numel()
            dense_BTV = dense(**arguments, use_cache=False).logits
            dense_nll += nll(dense_BTV, tokens_BT)
            for run, found_choices in zip(runs, choices, strict=True):
                run.quality.add(dense_BTV, run.model(**arguments, use_cache=False).logits, tokens_BT)
                if has_choices:
                    run.add_shift(routing_shift(dense_choices, found_choices, len(tokens_BT)))
            if noise is not None:
                noise.add(dense_BTV, noise.model(**arguments, use_cache=False).logits, tokens_BT)
            progress("evaluating", done + 1, len(windows.batches))
    reference = Reference(
        Estimate.of(dense_nll).exp(),
        None if noise is None else Estimate.of(noise.quality.kl),
        None if noise is None else Estimate.of(noise.quality.agreement),
    )
    return [run.result(num_predicted, reference) for run in runs]


def _warm_up(
    dense: PreTrainedModel, runs: "Sequence[_Run]", batches: Sequence[Batch], greedy_tokens: int, progress: Progress
) -> None:
    """Run the first batch, which nobody measures, and let all continue the beginnings of the first windows."""
    tokens_BT = torch.cat([batch.tokens_BT for batch in batches[:MAX_CONTINUED]])[:MAX_CONTINUED].to(dense.device)
    prompts_BT = tokens_BT[:, : tokens_BT.shape[1] // 2]
    expected_BW = continuations(dense, prompts_BT, greedy_tokens) if greedy_tokens else None
    arguments, _ = taught(dense.config, batches[0].tokens_BT.to(dense.device))
    for done, run in enumerate(runs):
        progress("warming up", done, len(runs))
        run.model(**arguments, use_cache=False)
        if expected_BW is not None:
            found_BW = continuations(run.model, prompts_BT, greedy_tokens)
            run.greedy_matches = (found_BW == expected_BW).all(dim=1).double().tolist()
        run.telemetry.clear()


@dataclass
class _Noise:
    """The dense model once more, in the other of fp32 and bf16."""

    model: PreTrainedModel
    is_exact: bool  # this one is in fp32
    quality: Quality = field(default_factory=Quality)

    @classmethod
    def of(cls, path: str | Path, dtype: torch.dtype, device: torch.device) -> "_Noise":
        """For a dense model in `dtype`."""
        is_exact = dtype != torch.float32
        return cls(read_dense(path, torch.float32 if is_exact else torch.bfloat16, device), is_exact)

    def add(self, dense_BTV: Tensor, logits_BTV: Tensor, tokens_BT: Tensor) -> None:
        pair = (logits_BTV, dense_BTV) if self.is_exact else (dense_BTV, logits_BTV)
        self.quality.add(*pair, tokens_BT)


@dataclass
class _Run:
    """A contender at work."""

    label: str
    model: PreTrainedModel
    telemetry: Telemetry
    cost: LayerCost | None
    quality: Quality = field(default_factory=Quality)
    shift_L: list[list[float]] = field(default_factory=list)  # window by window
    greedy_matches: list[float] = field(default_factory=list)

    @property
    def layers(self) -> list[LocalExperts]:
        report: LoadReport = self.model.rq_ep  # type: ignore[assignment]
        return [layer for layer in report.layers if isinstance(layer, LocalExperts)]

    def add_shift(self, shift_L: list[list[float]]) -> None:
        self.shift_L = [[*seen, *new] for seen, new in zip(self.shift_L or [[]] * len(shift_L), shift_L, strict=True)]

    def result(self, num_predicted: int, dense: Reference) -> Evaluation:
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
            bytes_R=tuple(_bytes_held(banks) for banks in zip(*(layer.banks for layer in layers), strict=True)),
            transfer_bytes=float(self.telemetry.transfer_bytes().sum(axis=-1).mean()),
            dense=dense,
            perplexity=Estimate.of(self.quality.nll).exp(),
            kl=Estimate.of(self.quality.kl),
            agreement=Estimate.of(self.quality.agreement),
            routing_shift_L=tuple(map(Estimate.of, self.shift_L)),
            greedy_match=Estimate.of(self.greedy_matches) if self.greedy_matches else None,
            sorted_loads_R=np.sort(relative_NR, axis=1)[:, ::-1].mean(axis=0),
        )


def _bytes_held(banks: Sequence[ExpertBank]) -> int:
    """Bytes of one rank's experts in all layers, and of the largest room for borrowed ones, which ranks that are
    processes share between layers."""
    return sum(bank.nbytes for bank in banks) + max(bank.borrow_buffers.nbytes for bank in banks)
