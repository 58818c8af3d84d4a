"""Tokenizers of the kinds that models come with, trained on a few lines of text in many scripts."""

import json
from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Der Lox ist ein Fisch, the cat sat on the mat  and the cat ran.\n\tdef main():\n        return 'cat'\n",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u041a\u043e\u0442 \u0438 \u043a\u043e\u0442.",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u4f60\u597d \U0001f600\U0001f44d\U0001f3fd \ufffd caf\u00e9",
] * 2
ADDED = [
    AddedToken("<tool>", special=False, lstrip=True, rstrip=True, normalized=False),
    AddedToken("\u65e5\u672c", special=False, normalized=True),
    AddedToken("<|im_end|>", special=True, lstrip=True, rstrip=True, normalized=False),
]
SPACE = "\u2581"  # how SentencePiece writes a space


def _trained(tokenizer: Tokenizer, alphabet: list[str], limit: int = 1000) -> dict[str, object]:
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, limit_alphabet=limit, show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>"],
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT, trainer)
    model: dict[str, object] = json.loads(tokenizer.to_str())["model"]
    return model


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens(ADDED)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _sentence_piece(decoder: decoders.Decoder, scheme: str) -> PreTrainedTokenizerFast:
    """Rare characters are written by tokens of their bytes."""
    draft = Tokenizer(models.BPE(unk_token="<unk>"))
    draft.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    model = _trained(draft, [], limit=60)
    pieces = [piece for piece in model["vocab"] if piece not in ("<unk>", "<s>", "</s>")]  # type: ignore[attr-defined]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [tuple(merge) for merge in model["merges"]]  # type: ignore[attr-defined]
    vocab = {name: token_id for token_id, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if isinstance(decoder, decoders.Sequence):
        prepend = [normalizers.Prepend(SPACE)] if scheme != "never" else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    tokenizer.decoder = decoder
    return _finished(tokenizer)


def _llama() -> PreTrainedTokenizerFast:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _sentence_piece(decoders.Sequence(steps), "first")


def _gemma() -> PreTrainedTokenizerFast:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return _sentence_piece(decoders.Sequence(steps), "never")


def _metaspace(scheme: str) -> PreTrainedTokenizerFast:
    steps = [decoders.Metaspace(prepend_scheme=scheme), decoders.ByteFallback(), decoders.Fuse()]
    return _sentence_piece(decoders.Sequence(steps), scheme)


def _plain_metaspace() -> PreTrainedTokenizerFast:
    return _sentence_piece(decoders.Metaspace(prepend_scheme="first"), "first")


def _byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())
    return _finished(tokenizer)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama": _llama,
    "gemma": _gemma,
    "metaspace_first": lambda: _metaspace("first"),
    "metaspace_always": lambda: _metaspace("always"),
    "metaspace_never": lambda: _metaspace("never"),
    "plain_metaspace": _plain_metaspace,
    "byte_level": _byte_level,
}


@cache
def small_tokenizer(kind: str, added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    tokenizer = KINDS[kind]()
    tokenizer.add_tokens(list(added))
    return tokenizer
