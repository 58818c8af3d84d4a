"""Listening to a model at work: a little text runs through it once, and what its experts did is kept."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, PreTrainedTokenizerBase

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.stats import PHASES, ModelIdentity
from rq_ep.formats import native_format_name
from rq_ep.model.calibration.layer_records import LayerRecord, Step, recording
from rq_ep.model.calibration.resume import SAVE_EVERY_S, Halfway
from rq_ep.model.calibration.route_log import RouteLog
from rq_ep.model.checkpoint.checkpoint_files import read_config
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.checkpoint.quantized_checkpoint import expert_format, open_checkpoint
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.model.load.ranks import together
from rq_ep.model.load.sharded_model import read_spread
from rq_ep.model.load.whole_model import read_dense
from rq_ep.model.seam.expert_modules import ExpertsModule, find_expert_modules
from rq_ep.model.text.teacher_forcing import taught
from rq_ep.model.text.windows import Batch, Texts, Windows, check_sequence_length, make_windows
from rq_ep.moe.expert_family import ExpertFamily
from rq_ep.parallel import EPGroup
from rq_ep.parallel.default_group import own_device

DECODE_STEPS = 8  # taken from every second batch of a domain
MAX_ROWS = 256  # inputs kept of each expert, to measure formats on
MAX_ROW_BYTES = 2 << 30  # of all kept inputs together
ENOUGH_TOKENS, ENOUGH_WINDOWS = 4096, 32  # below, popularity on other text of the same kind is badly predicted

Progress = Callable[[str, int, int], None]  # stage, done, total

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model that is listened to."""

    network: PreTrainedModel
    identity: ModelIdentity | None  # if it lies on disk
    native: str  # the format its experts are stored in
    experts: tuple[ExpertsModule, ...]
    family: ExpertFamily
    group: EPGroup | None = None  # the ranks that its experts are spread over; None: all of it is in this process

    @classmethod
    def open(
        cls, model: str | Path | PreTrainedModel, dtype: torch.dtype | None, device: str, group: EPGroup | None = None
    ) -> "Subject":
        """
        Args:
            model: checkpoint directory, or a model that is already in memory.
            dtype: to compute in; default: as the weights are stored.
            device: auto, cpu or cuda; a model in memory, or a group, stays where it is.
            group: ranks to spread the experts of a checkpoint over; all of them call this. Default: this process alone.

        Raises:
            UserError: no such checkpoint, or one that cannot be served.
        """
        experts: tuple[ExpertsModule, ...]
        if isinstance(model, PreTrainedModel):
            network, experts, group = model.eval(), find_expert_modules(model), None
            path = str(model.name_or_path)
            down_proj: Any = experts[0].module.down_proj
            native = native_format_name(down_proj.dtype)
        else:
            path = str(model)
            if group is None or group.size == 1:
                network = read_dense(path, dtype or "auto", own_device(device))
                experts, group = find_expert_modules(network), None
            else:
                network, experts = read_spread(path, dtype, group)
            native = expert_format(open_checkpoint(path), read_config(path).dtype or network.dtype)
        identity = model_identity(path) if Path(path, "config.json").is_file() else None
        return cls(network, identity, native, experts, experts[0].family, group)

    @property
    def is_seq2seq(self) -> bool:
        return bool(self.network.config.is_encoder_decoder)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.group is None or self.group.rank == 0


@dataclass(frozen=True)
class Heard:
    """What the experts did on the text."""

    windows: Windows
    steps: list[Step]
    records: list[LayerRecord]  # of each MoE layer


@torch.no_grad()
def listen(
    subject: Subject,
    texts: Texts,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    sequence_length: int = 128,
    max_tokens: int = 32_768,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    routes: RouteLog | None = None,
    halfway_path: str | Path | None = None,
    save_every_s: float = SAVE_EVERY_S,
    progress: Progress = lambda stage, done, total: None,
) -> Heard:
    """Run text through a model, once.

    A step is one batch. Every batch is a prefill step; every second one of a domain also gives `DECODE_STEPS` decode
    steps, each of the tokens at one position of its sequences, as if these were decoded together.

    An encoder-decoder reads the first half of each sequence and is made to write the second, in one prefill step; its
    decode steps are real ones, of the first tokens written, in which the encoder's experts have no load.

    Where the experts are spread over ranks, all of them call this, run the same text and hear the same.

    Args:
        subject: the model.
        texts: domain -> texts; or texts (str); or paths (Path) of files and directories, see `windows.read_texts`.
        tokenizer: default: the checkpoint's.
        batch_size: sequences in a batch.
        sequence_length: tokens in a sequence.
        max_tokens: tokens to run in all, shared evenly by the domains.
        seed: chooses the places that windows of text are taken from.
        max_rows: inputs to keep of each expert, as far as `MAX_ROW_BYTES` allow.
        routes: told every token's routes; not of an encoder-decoder.
        halfway_path: file to keep what has been heard in, so that the same call can go on after it was stopped; it is
            gone in the end. Not with `routes`.
        save_every_s: seconds between two writings of it.
        progress: called with (stage, done, total) while it runs.

    Raises:
        UserError: no text or tokenizer, sizes that do not fit, experts that give infinite or undefined outputs.
    """
    network = subject.network
    check_sequence_length(sequence_length, network.config, low=2 if subject.is_seq2seq else 1)
    windows = together(
        subject.group,
        lambda: make_windows(
            texts, tokenizer or _tokenizer_of(subject), sequence_length=sequence_length, max_tokens=max_tokens,
            batch_size=batch_size, seed=seed,
        ),
    )  # fmt: skip
    if subject.is_first:
        _warn_if_small(windows)

    num_experts = subject.experts[0].num_experts
    all_experts = num_experts * len(subject.experts)
    max_rows = max(1, min(max_rows, MAX_ROW_BYTES // (4 * subject.family.hidden_size * all_experts)))
    num_passes = len(windows.batches) * (1 + DECODE_STEPS if subject.is_seq2seq else 1)
    assert routes is None or halfway_path is None
    halfway = None
    if halfway_path is not None:
        settings = (subject.identity, str(network.dtype), num_passes, max_rows)
        halfway = Halfway(halfway_path, windows, settings, save_every_s)
    steps: list[Step] = []
    modules = [found.module for found in subject.experts]
    with recording(modules, num_experts, rows_per_batch=-(-max_rows // num_passes)) as records:
        first = 0 if halfway is None else halfway.resume(steps, records)
        _check_alike(subject.group, first, halfway_path)
        for i, batch in enumerate(windows.batches[first:], first):
            with_decode = i // len(windows.domains) % 2 == 0  # the domains take turns
            if subject.is_seq2seq:
                steps.extend(_seq2seq_steps(network, batch, records, with_decode))
            else:
                # Without the language model's head, which nobody asks for here.
                network.base_model(batch.tokens_BT.to(network.device), use_cache=False)
                steps.extend(_steps(batch, records, with_decode, routes))
            if halfway is not None and subject.is_first:
                halfway.save(i + 1, steps, records)
            progress("routing", i + 1, len(windows.batches))
    _check_finite(subject.experts, records)
    if halfway is not None and subject.is_first:
        halfway.remove()
    return Heard(windows, steps, records)


def _steps(batch: Batch, records: Sequence[LayerRecord], with_decode: bool, routes: RouteLog | None) -> Iterator[Step]:
    """The batch that has just run as a prefill step, and single positions of it as decode steps."""
    shape = batch.tokens_BT.shape
    if routes is not None:
        routes.begin((shape[0], shape[1]))
    ids_LBTK = [record.topk_ids_TK.reshape(*shape, -1) for record in records]

    def step(phase: str, positions: slice) -> Step:
        counts_LE = [record.counts_E(ids_BTK[:, positions]) for record, ids_BTK in zip(records, ids_LBTK, strict=True)]
        tokens = batch.tokens_BT[:, positions].numel()
        if routes is not None:
            routes.add(PHASES.index(phase), records, positions)
        return Step(PHASES.index(phase), batch.domain, tokens, np.stack(counts_LE))

    yield step("prefill", slice(None))
    if with_decode:
        for position in np.unique(np.linspace(0, shape[1] - 1, DECODE_STEPS + 1).astype(int)[1:]):
            yield step("decode", slice(position, position + 1))


def _seq2seq_steps(network: Any, batch: Batch, records: Sequence[LayerRecord], with_decode: bool) -> Iterator[Step]:
    """Run a batch through encoder and decoder as a prefill step, and the decoder's first tokens one by one.

    Single positions of the prefill step would not do: capacity drops tokens of a sequence, but none that come alone.
    """
    arguments, written_BW = taught(network.config, batch.tokens_BT.to(network.device))

    def step(phase: str, tokens_BW: torch.Tensor, before_LE: IntArray) -> Step:
        return Step(PHASES.index(phase), batch.domain, tokens_BW.numel(), _visits(records) - before_LE)

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


def _tokenizer_of(subject: Subject) -> PreTrainedTokenizerBase:
    if not subject.network.name_or_path:
        raise UserError("tokenizer: a model that was not loaded from a checkpoint brings none; give one")
    return read_tokenizer(subject.network.name_or_path)


def _check_alike(group: EPGroup | None, first: int, path: str | Path | None) -> None:
    """Raise unless all ranks go on after the same batch."""
    done = [first] if group is None else group.all_gather_object(first)
    if len(set(done)) > 1:
        raise UserError(
            f"{path}: rank {int(np.argmin(done))} does not find it, but rank {int(np.argmax(done))} does: put it where "
            "all ranks see it, or remove it"
        )


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
