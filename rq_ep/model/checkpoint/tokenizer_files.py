"""The tokenizer of a checkpoint, for the HTTP process too: of our modules, none that it imports brings torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rq_ep.core.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint in directory `path`; a `UserError` if there is none, or none that works."""
    directory = Path(path)
    # Without a file transformers would make up an empty tokenizer.
    if directory.is_dir() and not any((directory / name).exists() for name in TOKENIZER_FILES):
        raise UserError(f"{path}: no tokenizer; copy {TOKENIZER_FILES[0]} and tokenizer_config.json of the model there")
    with transformers_errors(f"the tokenizer of {path}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    return tokenizer


@contextmanager
def transformers_errors(what: str | Path) -> Iterator[None]:
    """Tell in one line why transformers cannot use what a checkpoint holds; every family fails in its own way."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what}: transformers refuses it ({reason:.400})") from error
