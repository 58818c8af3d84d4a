"""Calibration: run a little text, and learn each expert's load, step by step, and how much low bits would hurt it."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, PreTrainedTokenizerBase

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.errors import UserError, check_choice, check_integer
from rq_ep.core.files import check_writable
from rq_ep.core.stats import PHASES, ExpertStats, ModelIdentity
from rq_ep.formats import get_format, native_format_name
from rq_ep.model.checkpoint import read_config, read_tokenizer
from rq_ep.model.dense import read_dense
from rq_ep.model.divergence import Divergence, dropped_LE, quantized_LEQ
from rq_ep.model.identity import model_identity
from rq_ep.model.importance import IMPORTANCES, wanda_E
from rq_ep.model.recorder import LayerRecord, recording
from rq_ep.model.routes import RouteLog
from rq_ep.model.seam import ExpertsModule, family_of, find_expert_modules
from rq_ep.model.sensitivity import output_errors
from rq_ep.model.stored import expert_format, open_checkpoint
from rq_ep.model.teaching import taught
from rq_ep.model.windows import Batch, Texts, Windows, check_sequence_length, make_windows
from rq_ep.parallel.default import own_device

DECODE_STEPS = 8  # taken from every second batch of a domain
MAX_ROWS = 256  # inputs kept of each expert, to measure formats on
MAX_ROW_BYTES = 2 << 30  # of all kept inputs together
ENOUGH_TOKENS, ENOUGH_WINDOWS = 4096, 32  # below, popularity on other text of the same kind is badly predicted

Progress = Callable[[str, int, int], None]  # stage, done, total

log = logging.getLogger(__name__)


@torch.no_grad()
def calibrate(
    model: str | Path | PreTrainedModel,
    texts: Texts,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    formats: Sequence[str] | None = None,
    batch_size: int = 8,
    sequence_length: int = 128,
    max_tokens: int = 32_768,
    importance: str = "output",
    measure_kl: bool = False,
    sensitivity_tokens: int = 2048,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    seed: int = 0,
    trace_path: str | Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> ExpertStats:
    """Run text through a model and record what `place` needs to know of its experts.

    A step is one batch. Every batch is a prefill step; every second one of a domain also gives `DECODE_STEPS` decode
    steps, each of the tokens at one position of its sequences, as if these were decoded together. The text runs through
    the model once; loads, importance and the inputs on which formats are measured all come from that pass.

    An encoder-decoder reads the first half of each sequence and is made to write the second, in one prefill step; its
    decode steps are real ones, of the first tokens written, in which the encoder's experts have no load.

    Args:
        model: checkpoint directory, or a model that is already in memory.
        texts: domain -> texts; or texts (str); or paths (Path) of files and directories, see `windows.read_texts`.
        tokenizer: default: the checkpoint's.
        formats: weight formats to measure; the native one is always among them. Default: native and, unless the
            checkpoint is quantized already, int8.
        batch_size: sequences in a batch.
        sequence_length: tokens in a sequence.
        max_tokens: tokens to run in all, shared evenly by the domains.
        importance: how much an expert matters, one of `importance.IMPORTANCES`. `drop` takes a pass over
            `sensitivity_tokens` for every expert: for small models.
        measure_kl: also measure what each expert's formats do to the model's answers, a pass for each of them; `place`
            then goes by this instead of importance and error. For small models.
        sensitivity_tokens: tokens of such a pass, at least one batch.
        dtype: to compute in; default: as the weights are stored.
        device: auto, cpu or cuda; a model in memory stays where it is.
        seed: chooses the places that windows of text are taken from.
        trace_path: also write what the router chose for every token of the same steps, a `RoutingTrace`, there.
        progress: called with (stage, done, total) while it runs.

    Raises:
        UserError: no such checkpoint, a model without experts that we can serve, no text, an unknown format, a model
            whose experts give infinite or undefined outputs.
    """
    check_choice("--importance", importance, IMPORTANCES)
    check_integer("--sensitivity-tokens", sensitivity_tokens, 1)
    network, identity, native = _open(model, dtype, device)
    if tokenizer is None:
        if not network.name_or_path:
            raise UserError("tokenizer: a model that was not loaded from a checkpoint brings none; give one")
        tokenizer = read_tokenizer(network.name_or_path)
    if formats is None:
        formats = ("int8",) if get_format(native).is_native else ()
    names = tuple(dict.fromkeys((native, *formats)))
    others = [get_format(name) for name in names[1:]]
    is_seq2seq = bool(network.config.is_encoder_decoder)
    check_sequence_length(sequence_length, network.config, low=2 if is_seq2seq else 1)
    if trace_path is not None:
        if is_seq2seq:
            raise UserError("--trace: layers of an encoder and a decoder see different tokens; leave it out")
        check_writable(trace_path)
    routes = None if trace_path is None else RouteLog()
    experts = find_expert_modules(network)
    num_experts = experts[0].num_experts
    layout = family_of(experts[0].module).layout
    out_axis = layout.out_axis("down_proj")
    hidden_size, intermediate_size = (layout.shapes["down_proj"][axis] for axis in (out_axis, 1 - out_axis))
    windows = make_windows(
        texts, tokenizer, sequence_length=sequence_length, max_tokens=max_tokens, batch_size=batch_size, seed=seed
    )
    _warn_if_small(windows)

    max_rows = max(1, min(MAX_ROWS, MAX_ROW_BYTES // (4 * hidden_size * num_experts * len(experts))))
    steps: list[_Step] = []
    modules = [found.module for found in experts]
    num_passes = len(windows.batches) * (1 + DECODE_STEPS if is_seq2seq else 1)
    with recording(modules, num_experts, rows_per_batch=-(-max_rows // num_passes)) as records:
        for i, batch in enumerate(windows.batches):
            with_decode = i // len(windows.domains) % 2 == 0  # the domains take turns
            if is_seq2seq:
                steps.extend(_seq2seq_steps(network, batch, records, with_decode))
            else:
                # Without the language model's head, which nobody asks for here.
                network.base_model(batch.tokens_BT.to(network.device), use_cache=False)
                steps.extend(_steps(batch, records, with_decode, routes))
            progress("routing", i + 1, len(windows.batches))
    _check_finite(experts, records)
    layers = tuple(found.layer for found in experts)
    if routes is not None and trace_path is not None:
        routes.trace(num_experts, layers, identity).save(trace_path)
    error_LEQ = np.zeros((len(experts), num_experts, len(names)))  # of the native format: none
    for i, (module, record) in enumerate(zip(modules, records, strict=True)):
        if others:
            error_LEQ[i, :, 1:] = output_errors(module, layout, record.kept_rows(), others)
        progress("formats", i + 1, len(experts))
    asks_again = importance == "drop" or (measure_kl and bool(others))
    num_batches = max(1, sensitivity_tokens // (batch_size * sequence_length))
    divergence = Divergence(network, windows.batches[:num_batches]) if asks_again else None
    kl_LEQ = None
    if measure_kl and divergence is not None:
        kl_LEQ = np.zeros_like(error_LEQ)
        tick = _ticks(progress, "formats, expert by expert", kl_LEQ[..., 1:].size)
        kl_LEQ[..., 1:] = quantized_LEQ(divergence, experts, layout, others, tick)

    return ExpertStats(
        counts=np.stack([step.counts_LE for step in steps]),
        tokens=np.array([step.tokens for step in steps], np.int64),
        phase=np.array([step.phase for step in steps], np.int64),
        domain=np.array([step.domain for step in steps], np.int64),
        formats=names,
        native_format=native,
        expert_bytes={name: get_format(name).nbytes(layout) for name in names},
        importance=_importance_LE(importance, experts, records, divergence, progress),
        visits=np.stack([record.visits_E for record in records]),
        gate_mass=np.stack([record.gate_mass_E for record in records]),
        error=error_LEQ,
        kl=kl_LEQ,
        model=identity,
        layers=layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        top_k=records[0].topk_ids_TK.shape[1],
        expert_groups=getattr(network.config, "n_group", None) or None,
        importance_definition=IMPORTANCES[importance],
        num_tokens=windows.num_tokens,
        domains=windows.domains,
        source="calibration",
    )


class _Step(NamedTuple):
    """One step of the record."""

    phase: int
    domain: int
    tokens: int
    counts_LE: IntArray


def _steps(batch: Batch, records: Sequence[LayerRecord], with_decode: bool, routes: RouteLog | None) -> Iterator[_Step]:
    """The batch that has just run as a prefill step, and single positions of it as decode steps."""
    shape = batch.tokens_BT.shape
    if routes is not None:
        routes.begin((shape[0], shape[1]))
    ids_LBTK = [record.topk_ids_TK.reshape(*shape, -1) for record in records]

    def step(phase: str, positions: slice) -> _Step:
        counts_LE = [record.counts_E(ids_BTK[:, positions]) for record, ids_BTK in zip(records, ids_LBTK, strict=True)]
        tokens = batch.tokens_BT[:, positions].numel()
        if routes is not None:
            routes.add(PHASES.index(phase), records, positions)
        return _Step(PHASES.index(phase), batch.domain, tokens, np.stack(counts_LE))

    yield step("prefill", slice(None))
    if with_decode:
        for position in np.unique(np.linspace(0, shape[1] - 1, DECODE_STEPS + 1).astype(int)[1:]):
            yield step("decode", slice(position, position + 1))


def _seq2seq_steps(network: Any, batch: Batch, records: Sequence[LayerRecord], with_decode: bool) -> Iterator[_Step]:
    """Run a batch through encoder and decoder as a prefill step, and the decoder's first tokens one by one.

    Single positions of the prefill step would not do: capacity drops tokens of a sequence, but none that come alone.
    """
    arguments, written_BW = taught(network.config, batch.tokens_BT.to(network.device))

    def step(phase: str, tokens_BW: torch.Tensor, before_LE: IntArray) -> _Step:
        return _Step(PHASES.index(phase), batch.domain, tokens_BW.numel(), _visits(records) - before_LE)

    before_LE = _visits(records)
    encoded = network.get_encoder()(arguments["input_ids"])
    network(encoder_outputs=encoded, decoder_input_ids=written_BW, use_cache=False)
    yield step("prefill", written_BW, before_LE)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for tokens_B1 in written_BW.split(1, dim=1)[: DECODE_STEPS if with_decode else 0]:
        before_LE = _visits(records)
        network(encoder_outputs=encoded, decoder_input_ids=tokens_B1, past_key_values=cache, use_cache=True)
        yield step("decode", tokens_B1, before_LE)


def _visits(records: Sequence[LayerRecord]) -> IntArray:
    """[L, E] pairs recorded so far."""
    return np.stack([record.visits_E for record in records])


def _open(
    model: str | Path | PreTrainedModel, dtype: torch.dtype | None, device: str
) -> tuple[PreTrainedModel, ModelIdentity | None, str]:
    """The model, ready to run; its identity, if it lies on disk; the format its experts are stored in."""
    if isinstance(model, PreTrainedModel):
        network, path = model, str(model.name_or_path)
        down_proj: Any = find_expert_modules(model)[0].module.down_proj
        native = native_format_name(down_proj.dtype)
    else:
        path = str(model)
        network = read_dense(path, dtype or "auto", own_device(device))
        native = expert_format(open_checkpoint(path), read_config(path).dtype or network.dtype)
    network.eval()
    identity = model_identity(path) if Path(path, "config.json").is_file() else None
    return network, identity, native


def _importance_LE(
    name: str,
    experts: Sequence[ExpertsModule],
    records: Sequence[LayerRecord],
    divergence: Divergence | None,
    progress: Progress,
) -> FloatArray:
    """[L, E] what `importance.IMPORTANCES` calls `name`."""
    if name == "drop":
        assert divergence is not None
        tick = _ticks(progress, "dropping, expert by expert", sum(found.num_experts for found in experts))
        return dropped_LE(divergence, experts, tick)
    of_record: dict[str, Callable[[ExpertsModule, LayerRecord], FloatArray]] = {
        "output": lambda found, record: record.importance_E,
        "gate-mass": lambda found, record: record.gate_mass_E,
        "load": lambda found, record: record.visits_E.astype(np.float64),
        "wanda": lambda found, record: wanda_E(
            found.module, family_of(found.module), record.kept_rows(), record.visits_E
        ),
    }
    return np.stack([of_record[name](found, record) for found, record in zip(experts, records, strict=True)])


def _ticks(progress: Progress, stage: str, total: int) -> Callable[[], None]:
    """Each call reports one more step of a stage."""
    numbers = count(1)
    return lambda: progress(stage, next(numbers), total)


def _check_finite(experts: Sequence[ExpertsModule], records: Sequence[LayerRecord]) -> None:
    for found, record in zip(experts, records, strict=True):
        wrong = np.flatnonzero(~np.isfinite(record.importance_E))
        if wrong.size:
            raise UserError(
                f"layer {found.layer}: expert {wrong[0]} gives infinite or undefined outputs on this text: check the "
                "model, or compute in float32 with --dtype"
            )


def _warn_if_small(windows: Windows) -> None:
    if windows.num_tokens < ENOUGH_TOKENS or windows.num_windows < ENOUGH_WINDOWS:
        log.warning(
            "a small sample: %d tokens in %d windows; with less than %d tokens or %d windows, popularity of experts "
            "on other text is badly predicted: give more text or raise --max-tokens",
            windows.num_tokens, windows.num_windows, ENOUGH_TOKENS, ENOUGH_WINDOWS,
        )  # fmt: skip
