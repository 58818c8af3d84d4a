"""What a model folder says of generation: the tokens that end an answer, and what sampling a request gets by default.

The HTTP process reads it too, so this module imports none that imports torch, and transformers only for types.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rq_ep.core.errors import check_integer, check_number
from rq_ep.model.checkpoint.json_files import read_json_object

if TYPE_CHECKING:  # slow to import: the HTTP process answers /health before
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

GENERATION_CONFIG = "generation_config.json"
AUTO, VLLM = "auto", "vllm"  # choices of --generation-config, as vLLM names them; any other is a directory
# Keys that do not change which tokens are chosen, and values that change nothing
HARMLESS = r"_token_id$|^_|version$|^(output_|return_)|^use_cache$"
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (True,),
    "length_penalty": (1,),
    "min_p": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "typical_p": (1,),
}


@dataclass(frozen=True)
class SamplingDefaults:
    """The sampling of requests that do not say; `not_applied` are settings of the model that the server has not."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    not_applied: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        others = {"top_k": self.top_k, "min_p": self.min_p, "repetition_penalty": self.repetition_penalty}
        given = "".join(f", {name} {value:g}" for name, value in others.items() if value != NEUTRAL[name][0])
        text = f"requests that do not say get temperature {self.temperature:g}, top_p {self.top_p:g}{given}"
        if self.not_applied:
            names = ", ".join(f"{name} {value!r:.40}" for name, value in self.not_applied.items())
            text += f"; not supported, and not applied: {names}"
        return text


def read_sampling_defaults(model: str | Path, choice: str = AUTO) -> SamplingDefaults:
    """The defaults of sampling, by `generation_config.json`.

    Args:
        model: the model's directory.
        choice: of `--generation-config`: "auto", the model's; "vllm", none; or a directory that has one.

    Raises:
        UserError: the file is damaged, or a value is out of range.
    """
    document = read_generation_config(model, choice)
    if choice == VLLM:
        return SamplingDefaults()
    file = _file(model, choice)
    limits = {
        "temperature": (0.0, 2.0), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "repetition_penalty": (0.01, 100.0),
    }  # fmt: skip
    applied: dict[str, Any] = {
        name: check_number(f"{file}: {name}", document[name], *limits[name])
        for name in limits
        if document.get(name) is not None
    }
    if document.get("top_k") is not None:
        applied["top_k"] = max(check_integer(f"{file}: top_k", document["top_k"], -1), 0)
    others = {name: value for name, value in document.items() if name not in applied and not re.search(HARMLESS, name)}
    others = {name: value for name, value in others.items() if value not in (None, *NEUTRAL.get(name, ()))}
    return SamplingDefaults(**applied, not_applied=others)


def end_token_ids(
    model: str | Path,
    config: "PretrainedConfig",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    choice: str = AUTO,
) -> list[int]:
    """The tokens that end an answer: those of `generation_config.json`, of `config.json`, and the tokenizer's.

    None of them need name any.

    Args:
        model: the model's directory.
        config: of the model.
        tokenizer: of the model; None: it is left out.
        choice: of `--generation-config`.

    Raises:
        UserError: one is no token of the model's vocabulary.
    """
    vocab_size = config.get_text_config().vocab_size
    found = {
        check_integer(name, token_id, 0, vocab_size - 1): None
        for name, value in _named_end_tokens(Path(model), config, tokenizer, choice)
        for token_id in (value if isinstance(value, list) else [] if value is None else [value])
    }
    return list(found)


def read_generation_config(model: str | Path, choice: str = AUTO) -> dict[str, Any]:
    """`generation_config.json` of a model, which need not have one, or of the directory that was chosen."""
    file = _file(model, choice)
    if choice in (AUTO, VLLM) and not (file.exists() or file.is_symlink()):
        return {}
    return read_json_object(file, f"--generation-config takes {AUTO}, {VLLM} or a directory that has one")


def _file(model: str | Path, choice: str) -> Path:
    return Path(model if choice in (AUTO, VLLM) else choice) / GENERATION_CONFIG


def _named_end_tokens(
    model: Path, config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase | None", choice: str
) -> Iterator[tuple[str, Any]]:
    raw = read_json_object(model / "config.json")
    text = raw.get("text_config")
    named = False
    documents = (
        (_file(model, choice), read_generation_config(model, choice)),
        (model / "config.json", raw),
        (f"{model}/config.json: text_config", text if isinstance(text, dict) else {}),
    )
    for where, document in documents:
        if "eos_token_id" in document:
            named = True
            yield f"{where}: eos_token_id", document["eos_token_id"]
    if not named:  # then the family has one
        yield f"{model}/config.json: eos_token_id by default", getattr(config.get_text_config(), "eos_token_id", None)
    if tokenizer is not None:
        yield f"{model}: the tokenizer's end token {tokenizer.eos_token!r:.40}", tokenizer.eos_token_id
