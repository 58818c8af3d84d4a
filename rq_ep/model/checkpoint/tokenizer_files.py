"""The tokenizer of a checkpoint, and its processor of images.

The HTTP process reads tokenizers where transformers finds no torch, so this module imports none that needs it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.json_files import read_json_object
from rq_ep.model.checkpoint.lfs_pointers import check_is_no_pointer
from rq_ep.model.text.template_sandbox import TemplateLimitError, bound_chat_templates

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]  # of a model folder, beside its weights
JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint in directory `path`; a `UserError` if there is none, or none that works."""
    directory = Path(path)
    # Without a file, transformers would build an empty tokenizer.
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        raise UserError(f"{path}: no tokenizer; copy {TOKENIZER_FILES[0]} and tokenizer_config.json of the model there")
    for pattern in SMALL_FILES:
        for file in directory.glob(pattern):
            check_is_no_pointer(file)
    for name in JSON_FILES:
        if (directory / name).exists():
            read_json_object(directory / name)
    with transformers_errors(f"the tokenizer of {path}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer.decode(tokenizer.encode("a"))  # settings of a wrong type show with the first text
    templates = tokenizer.chat_template or {}
    bound_chat_templates()
    with transformers_errors(f"the chat template of {path}"):
        for template in templates.values() if isinstance(templates, dict) else [templates]:
            _compile_jinja_template(template)
            _check_limits(tokenizer, template, path)
    return tokenizer


def _check_limits(tokenizer: PreTrainedTokenizerBase, template: str, path: str | Path) -> None:
    """Refuse a chat template that is too much to compute even for one word."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=False)
    except TemplateLimitError as error:
        raise UserError(f"the chat template of {path}: {error}") from None
    except Exception:  # it wants other messages
        return


def read_processor(path: str | Path) -> Any:
    """The processor of text and images of the checkpoint in directory `path`.

    Raises:
        UserError: it has none, or one that does not work here, with the package that is missing.
    """
    from transformers import AutoProcessor  # imports torch

    with transformers_errors(f"the processor of images of {path}"):
        try:
            processor: Any = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        except ImportError as error:
            if "torchvision" not in str(error).lower():
                raise
            raise UserError(
                f"the processor of images of {path} needs torchvision, which is not installed: pip install torchvision"
            ) from None
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{path}: no preprocessor_config.json or processor_config.json for images")
    return processor


@contextmanager
def transformers_errors(what: str | Path) -> Iterator[None]:
    """While open, any error of transformers becomes a one-line `UserError`: model families raise all kinds of them."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if not reason or isinstance(error, LookupError | TypeError | AttributeError | ArithmeticError):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"{what}: transformers refuses it ({reason:.400})") from error
