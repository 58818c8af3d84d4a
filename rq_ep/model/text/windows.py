"""Windows of tokens, sampled from text, that calibration and evaluation run through a model.

A window is `sequence_length` tokens without padding. A batch holds windows of one domain, and the domains take turns,
so that the first batches cover all of them. Axes: B windows of a batch, T tokens of a window.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rq_ep.core.errors import UserError, check_integer
from rq_ep.model.max_positions import max_positions
from rq_ep.model.settings import WindowSettings

# Domain -> texts; or texts of one domain (str); or files and directories of them (Path).
Texts = Mapping[str, Iterable[str]] | Iterable[str | Path] | Path

MAX_FILE_BYTES = 8 << 20  # of one file; enough for any sample, and no file fills the memory
DEFAULT_DOMAIN = "text"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WindowBatch:
    """Windows of one domain that run through the model together."""

    tokens_BT: Tensor  # int64 [windows, sequence length]
    domain: int


@dataclass(frozen=True)
class Windows:
    """A sample of the text, in the order in which it is run."""

    batches: tuple[WindowBatch, ...]
    domains: tuple[str, ...]

    @property
    def num_windows(self) -> int:
        return sum(len(batch.tokens_BT) for batch in self.batches)

    @property
    def num_tokens(self) -> int:
        return sum(batch.tokens_BT.numel() for batch in self.batches)


def make_windows(texts: Texts, tokenizer: PreTrainedTokenizerBase, settings: WindowSettings) -> Windows:
    """Sample windows from all over the text, equally many from each domain as far as it reaches.

    However large the text, only as much as is needed is tokenized.

    Args:
        texts: domain -> texts, texts, or paths; see `read_texts`.
        tokenizer: of the model that is to run them; special tokens are not added.
        settings: size of the sample. A window is one sequence; the last windows may be fewer than a batch.

    Raises:
        UserError: there is not even one window of text.
    """
    length = settings.sequence_length
    by_domain = read_texts(texts)
    if settings.max_tokens < length * len(by_domain):
        raise UserError(
            f"--max-tokens {settings.max_tokens}: {len(by_domain)} domains ({', '.join(by_domain)}) need at least one "
            f"window of {length} tokens each, {length * len(by_domain)} in all"
        )
    windows_per_domain = settings.max_tokens // length // len(by_domain)
    batches_by_domain: list[list[WindowBatch]] = []
    domains: list[str] = []
    for name, documents in by_domain.items():
        tokens_BT = _sample(documents, tokenizer, length, windows_per_domain, np.random.default_rng(settings.seed))
        if len(tokens_BT):
            batches = tokens_BT.split(settings.batch_size)
            batches_by_domain.append([WindowBatch(batch_BT, len(domains)) for batch_BT in batches])
            domains.append(name)
        else:
            log.warning("domain %s is left out: less than one window of %d tokens", name, length)
    if not domains:
        raise UserError(
            f"{_paths_of(texts) or 'the text'} does not fill one window of {length} tokens: give more of it, or a "
            "smaller --sequence-length" + _hint_of_paths(by_domain)
        )
    in_turns = chain.from_iterable(zip_longest(*batches_by_domain))
    return Windows(tuple(batch for batch in in_turns if batch is not None), tuple(domains))


def _hint_of_paths(by_domain: Mapping[str, Sequence[str]]) -> str:
    names = [text for text in chain.from_iterable(by_domain.values()) if os.path.exists(text)]
    return f"; {names[0]!r} is taken as the text itself: give a file as pathlib.Path" if names else ""


def check_sequence_length(length: int, config: PretrainedConfig, low: int = 1) -> None:
    """Raise a `UserError` unless a model reads sequences of `length` tokens, and no fewer than `low` are asked for."""
    limit = max_positions(config)
    check_integer("--sequence-length", length, low)
    if limit is not None and length > limit:
        raise UserError(f"--sequence-length {length}: this model reads at most {limit} tokens")


def read_texts(texts: Texts) -> dict[str, list[str]]:
    """Read texts: domain -> documents that are not empty, sorted by domain.

    A str is a text, a Path a file or a directory, read with everything below it. The domain of a file in a directory is
    the name of the directory it lies in, that of a file given by itself its own name. A .jsonl file holds one document
    a line, under "text". Files that are not UTF-8 text are skipped, with a warning.

    Raises:
        UserError: a path does not exist, or there is no text at all.
    """
    by_domain: dict[str, list[str]] = {}
    for domain, text in _documents(texts):
        if not isinstance(text, str):
            raise UserError(f"texts: {text!r:.60}: must be a text (str) or a path (Path)")
        if text:
            by_domain.setdefault(domain, []).append(text)
    if not by_domain:
        where = f" in {paths}" if (paths := _paths_of(texts)) else ""
        raise UserError(f"there is no text to run{where}: give .txt, .md, source code or .jsonl, in UTF-8")
    return dict(sorted(by_domain.items()))


def _paths_of(texts: Texts) -> str:
    """The flag with the paths that were given for it; empty where none was."""
    items = [texts] if isinstance(texts, Path) else texts
    paths = [str(item) for item in items if isinstance(item, Path)] if isinstance(items, Sequence) else []
    return f"--text {' '.join(paths):.200}" if paths else ""


def _documents(texts: Texts) -> Iterator[tuple[str, str]]:
    """(domain, text) of every document."""
    if isinstance(texts, Mapping):
        for domain, documents in texts.items():
            yield from ((str(domain), text) for text in ([documents] if isinstance(documents, str) else documents))
    else:
        for item in [texts] if isinstance(texts, str | Path) else texts:
            try:
                yield from _read_path(item) if isinstance(item, Path) else [(DEFAULT_DOMAIN, item)]
            except OSError as error:
                raise UserError(f"--text {error.filename or item}: cannot be read ({error.strerror})") from None


def _read_path(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_dir():
        files = [(file.parent.resolve().name, file) for file in sorted(path.rglob("*")) if file.is_file()]
    elif path.exists():
        files = [(path.stem, path)]
    else:
        raise UserError(f"--text {path}: no such file or directory")
    skipped = []
    for domain, file in files:
        text = _read_file(file)
        if text is None:
            skipped.append(file)
        elif file.suffix == ".jsonl":
            yield from ((domain, document) for document in _json_lines(file, text))
        else:
            yield domain, text
    if skipped:
        log.warning("%s: skipped %d files that are not UTF-8 text, such as %s", path, len(skipped), skipped[0].name)


def _read_file(path: Path) -> str | None:
    """The first `MAX_FILE_BYTES` of a file, or None if they are not text."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES)
    if b"\0" in data:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        cut = len(data) == MAX_FILE_BYTES and error.start > MAX_FILE_BYTES - 4
        return data[: error.start].decode() if cut else None


def _json_lines(path: Path, text: str) -> Iterator[str]:
    lines = text.split("\n")
    whole = lines if path.stat().st_size <= MAX_FILE_BYTES else lines[:-1]
    for number, line in enumerate(whole, 1):
        if line.strip():
            try:
                document = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                document = None
            if not isinstance(document, str):
                raise UserError(f'{path}, line {number}: expected an object with a string "text"')
            yield document


def _sample(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    max_windows: int,
    generator: np.random.Generator,
) -> Tensor:
    """[B, T] at most `max_windows` windows, cut from pieces of about that length in random order."""
    starts = [document[:length] for document in documents[:16]]
    num_tokens = sum(map(len, _tokenize(starts, tokenizer)))
    piece_length = max(1, round(length * sum(map(len, starts)) / max(num_tokens, 1)))  # characters
    positions = [(i, start) for i, document in enumerate(documents) for start in range(0, len(document), piece_length)]
    in_random_order = (positions[i] for i in generator.permutation(len(positions)))
    tokens: list[int] = []
    while len(tokens) < max_windows * length and (chosen := list(islice(in_random_order, 64))):
        pieces = [documents[i][start : start + piece_length] for i, start in chosen]
        tokens.extend(chain.from_iterable(_tokenize(pieces, tokenizer)))
    num_windows = min(max_windows, len(tokens) // length)
    return torch.tensor(tokens[: num_windows * length], dtype=torch.long).view(num_windows, length)


def _tokenize(pieces: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
