"""The bytes that each token adds to a text, derived from the decoder of a tokenizer."""

import json
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

# Decoders that treat every token by itself, but for the bytes of a character and a space at the start of the text.
SENTENCE_PIECE = re.compile(r"((Replace|Metaspace) ?)*(ByteFallback ?)?(Fuse( Strip)?)?")
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
ANCHOR = "a"  # a token before another one, which thus does not start the text

# Byte-level vocabularies (GPT-2) write a byte as a character: itself where it is printable, else one from 256 on.
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTE_OF = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + number): byte for number, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))
}


class TokenText(NamedTuple):
    """What a token adds to a text, and the bytes that it stands for, which need not be whole characters."""

    text: str
    bytes_: bytes


NO_TEXT = TokenText("", b"")


class TokenEntry(NamedTuple):
    """The bytes of a token at the start of a text and after it, its text if they are whole characters, and its name.

    Only special tokens have a name.
    """

    first: bytes
    later: bytes
    whole: TokenText | None
    name: str = ""


class TokenTable(dict[int, TokenEntry]):
    """Token id -> what it adds to a text, found when it is first asked for. Special tokens and unknown ids add nothing.

    Args:
        tokenizer: of the `tokenizers` library.
        is_byte_level: whether the characters of its vocabulary stand for bytes.
        marks: names of special tokens that add themselves.
    """

    def __init__(self, tokenizer: Any, is_byte_level: bool, marks: Collection[str] = ()) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._special = {token.content for token in self._added.values() if token.special} - set(marks)
        self._is_byte_level = is_byte_level
        self._has_byte_tokens = b"ByteFallback" in tokenizer.decoder.__getstate__()

    @classmethod
    def of(cls, tokenizer: Any, marks: Collection[str] = ()) -> "TokenTable | None":
        """The table of a tokenizer of transformers; None if its decoder is not known to treat tokens by themselves."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or backend.decoder is None:
            return None
        steps = list(_steps(json.loads(backend.decoder.__getstate__())))
        kinds = " ".join(step["type"] for step in steps)
        if kinds != "ByteLevel" and not SENTENCE_PIECE.fullmatch(kinds):
            return None
        if any(step["type"] == "Strip" and (step["start"], step["stop"]) not in {(0, 0), (1, 0)} for step in steps):
            return None
        return cls(backend, kinds == "ByteLevel", marks)

    def __missing__(self, token_id: int) -> TokenEntry:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token in self._special:
            entry = TokenEntry(b"", b"", NO_TEXT, token or "")
        else:
            first, later = self._bytes(token_id, token)
            entry = TokenEntry(first, later, _whole(later))
        self[token_id] = entry
        return entry

    def _bytes(self, token_id: int, token: str) -> tuple[bytes, bytes]:
        if self._is_byte_level:
            # An added token is matched as it is written: its characters do not stand for bytes.
            is_bytes = token_id not in self._added and all(character in BYTE_OF for character in token)
            bytes_ = bytes(BYTE_OF[character] for character in token) if is_bytes else token.encode()
            return bytes_, bytes_
        if self._has_byte_tokens and (match := BYTE_TOKEN.fullmatch(token)) and (byte := int(match[1], 16)) >= 0x80:
            return bytes([byte]), bytes([byte])
        decode = self._tokenizer.decoder.decode
        return decode([token]).encode(), decode([ANCHOR, token]).removeprefix(decode([ANCHOR])).encode()


def _steps(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The decoders of a sequence of them, in order."""
    if state["type"] == "Sequence":
        for step in state["decoders"]:
            yield from _steps(step)
    else:
        yield state


def _whole(bytes_: bytes) -> TokenText | None:
    try:
        return TokenText(bytes_.decode(), bytes_)
    except UnicodeDecodeError:
        return None
