import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, MixtralConfig

from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.generation_defaults import end_token_ids, read_sampling_defaults
from rq_ep.model.text.byte_tokenizer import EOS, byte_tokenizer

ABSENT = object()


def folder(path: Path, generation: object = ABSENT, **config: object) -> Path:
    document = {"model_type": "mixtral", "vocab_size": 260, **config}
    (path / "config.json").write_text(json.dumps(document))
    if generation is not ABSENT:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def ends(path: Path, choice: str = "auto", with_tokenizer: bool = True) -> list[int]:
    tokenizer = byte_tokenizer(128) if with_tokenizer else None
    return end_token_ids(path, AutoConfig.from_pretrained(path), tokenizer, choice)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, [5, 6, 7, EOS]),
        ({"eos_token_id": EOS}, {"eos_token_id": [EOS]}, [EOS]),
        ({"eos_token_id": None}, {"eos_token_id": None}, [EOS]),
        ({"eos_token_id": None}, {}, [EOS]),
        ({"temperature": 0.5}, {"eos_token_id": 7}, [7, EOS]),
        (ABSENT, {"eos_token_id": 0}, [0, EOS]),
        (ABSENT, {}, [MixtralConfig().eos_token_id, EOS]),
        ({"eos_token_id": [5]}, {}, [5, EOS]),
    ],
)
def test_an_answer_ends_at_the_tokens_of_both_files_and_of_the_tokenizer(
    tmp_path: Path, generation: object, config: dict[str, Any], expected: list[int]
) -> None:
    assert ends(folder(tmp_path, generation, **config)) == expected
    assert [*ends(tmp_path, with_tokenizer=False), EOS][: len(expected)] == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([5, None], "None: must be a whole number"),
        ("2", "'2': must be a whole number"),
        (True, "True: must be a whole number"),
        (1.0, "1.0: must be a whole number"),
        ([[5]], r"\[5\]: must be a whole number"),
        (-1, "-1: must be at least 0"),
        ([5, 260], "260: must be at most 259"),
        ({"a": 5}, "{'a': 5}: must be a whole number"),
    ],
)
def test_an_end_token_that_is_no_token_is_refused_by_name(tmp_path: Path, value: object, message: str) -> None:
    folder(tmp_path, {"eos_token_id": value})
    with pytest.raises(UserError, match=rf"generation_config\.json: eos_token_id {message}"):
        ends(tmp_path)


def test_the_tokenizers_end_token_must_be_one_of_the_model(tmp_path: Path) -> None:
    folder(tmp_path, vocab_size=258)
    with pytest.raises(UserError, match=r"the tokenizer's end token '<\|eos\|>' 258: must be at most 257"):
        ends(tmp_path)


def test_sampling_defaults_are_the_models_and_what_is_not_applied_is_named(tmp_path: Path) -> None:
    generation = {
        "_from_model_config": True, "transformers_version": "4.51.0", "bos_token_id": 1, "eos_token_id": EOS,
        "pad_token_id": 0, "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0,
        "repetition_penalty": 1.05, "typical_p": 0.9, "max_new_tokens": None, "use_cache": True,
    }  # fmt: skip
    defaults = read_sampling_defaults(folder(tmp_path, generation))
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.6, 0.95, 20)
    assert (defaults.min_p, defaults.repetition_penalty) == (0, 1.05)
    assert defaults.not_applied == {"typical_p": 0.9}
    assert str(defaults) == (
        "requests that do not say get temperature 0.6, top_p 0.95, top_k 20, repetition_penalty 1.05; not supported, "
        "and not applied: typical_p 0.9"
    )


def test_generation_config_chooses_whose_defaults_they_are(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "other").mkdir()
    model = folder(tmp_path / "model", {"temperature": 0.3, "eos_token_id": 5}, eos_token_id=7)
    other = folder(tmp_path / "other", {"top_p": 0.5, "eos_token_id": 6})
    assert read_sampling_defaults(model).temperature == 0.3
    none, chosen = (read_sampling_defaults(model, choice) for choice in ("vllm", str(other)))
    assert (none.temperature, none.top_p, none.not_applied) == (1, 1, {})
    assert (chosen.temperature, chosen.top_p) == (1, 0.5)
    assert ends(model, "vllm") == [5, 7, EOS]
    assert ends(model, str(other)) == [6, 7, EOS]
    with pytest.raises(
        UserError, match=r"nowhere/generation_config\.json: no such file; --generation-config takes auto"
    ):
        read_sampling_defaults(model, str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "generation",
    [{"temperature": -1}, {"temperature": "0.6"}, {"top_p": 1.5}, {"top_p": float("nan")}, []],
)
def test_damaged_sampling_defaults_are_refused_by_name(tmp_path: Path, generation: object) -> None:
    name = next(iter(generation), "expected an object") if isinstance(generation, dict | list) else ""
    with pytest.raises(UserError, match=rf"generation_config\.json: {name}"):
        read_sampling_defaults(folder(tmp_path, generation))
