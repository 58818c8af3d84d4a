"""Tokens with their scores: their texts and bytes are the text of the answer, and none hides another."""

import math
from collections.abc import Sequence
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rq_ep.engine.requests import LOWEST_LOGPROB, Output, Score
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.chunks import Chunk, TextChunker
from rq_ep.serve.http.openai.detokenizer import PrefixDetokenizer, detokenizers
from rq_ep.serve.http.openai.logprobs import chat_logprobs, completion_logprobs
from tests.serve.http.openai.small_tokenizers import KINDS, small_tokenizer


def answer_chunks(
    tokenizer: PreTrainedTokenizerFast,
    prompt_ids: Sequence[int],
    token_ids: list[int],
    *,
    size: int = 1,
    stops: Sequence[str] = (),
    echo: bool = False,
    reason: str = "length",
    top_ids: Sequence[int] = (),
) -> list[Chunk]:
    """The chunks of an answer that comes in outputs of `size` tokens."""
    text = TextChunker(detokenizers(tokenizer)(), stops)
    score = Score(-1.0, list(top_ids), [-float(at) for at in range(len(top_ids))])
    chunks = []
    if echo:
        ends = None if token_ids else reason
        chunks.append(text.echo(prompt_ids, [None] + [score] * (len(prompt_ids) - 1), ends))
    else:
        text.skip(prompt_ids)
    for at in range(0, len(token_ids), size):
        part = token_ids[at : at + size]
        ends = reason if at + size >= len(token_ids) else None
        chunks.append(text.chunk(Output("r", part, ends, scores=[score] * len(part))))
        if chunks[-1].finish_reason is not None:
            break
    return chunks


def ids_of(tokenizer: PreTrainedTokenizerFast) -> st.SearchStrategy[list[int]]:
    """Special tokens, bytes and others; some are outside the vocabulary."""
    return st.lists(st.one_of(st.integers(0, 260), st.integers(0, len(tokenizer) + 1)), min_size=1, max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=st.integers(1, 4), reason=st.sampled_from(["length", "stop"]))
def test_tokens_and_their_bytes_join_to_the_text(kind: str, data: st.DataObject, size: int, reason: str) -> None:
    tokenizer = small_tokenizer(kind)
    prompt_ids, token_ids = data.draw(ids_of(tokenizer)), data.draw(ids_of(tokenizer))
    whole = answer_chunks(tokenizer, prompt_ids, token_ids, size=100, echo=True, reason=reason)
    chunks = answer_chunks(tokenizer, prompt_ids, token_ids, size=size, echo=True, reason=reason)
    text = "".join(chunk.text for chunk in chunks)
    assert text == "".join(chunk.text for chunk in whole)
    scored = [token for chunk in chunks for token in chunk.tokens]
    assert scored == [token for chunk in whole for token in chunk.tokens]
    logprobs = completion_logprobs(scored)
    assert "".join(logprobs["tokens"]) == text
    assert logprobs["text_offset"] == [0, *accumulate(map(len, logprobs["tokens"][:-1]))]
    assert b"".join(token.added.bytes_ for token in scored).decode(errors="replace") == text
    shown = prompt_ids + (token_ids if reason == "length" else token_ids[:-1])
    decoded = tokenizer.decode(shown, skip_special_tokens=True)
    assert "\ufffd" in decoded or text == decoded


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=st.integers(1, 4))
def test_a_stop_string_cuts_at_its_first_character_wherever_tokens_end(
    kind: str, data: st.DataObject, size: int
) -> None:
    tokenizer = small_tokenizer(kind)
    prompt_ids = tokenizer.encode("the cat")
    token_ids = tokenizer.encode(data.draw(st.text("cat \u4f60\u0438\U0001f600\ufffd", max_size=12)) + "x")
    text = "".join(chunk.text for chunk in answer_chunks(tokenizer, prompt_ids, token_ids))
    begin = data.draw(st.integers(0, max(len(text) - 1, 0)))
    stop = text[begin : begin + data.draw(st.integers(1, 4))]
    chunks = answer_chunks(tokenizer, prompt_ids, token_ids, size=size, stops=[stop])
    assert "".join(chunk.text for chunk in chunks) == text[: text.index(stop)]
    assert chunks[-1].finish_reason == "stop"
    scored = [token for chunk in chunks for token in chunk.tokens]
    assert "".join(token.added.text for token in scored).startswith(text[: text.index(stop)])
    assert all(token.offset < text.index(stop) for token in scored)


@pytest.mark.parametrize("kind", ["llama", "metaspace_first", "gemma"])
def test_tokens_that_differ_by_a_space_are_two_alternatives(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    cat, space_cat = tokenizer.convert_tokens_to_ids(["cat", "\u2581cat"])
    (chunk,) = answer_chunks(tokenizer, tokenizer.encode("the"), [space_cat], top_ids=[cat, space_cat])
    assert chunk.text == " cat"
    assert completion_logprobs(chunk.tokens)["top_logprobs"] == [{"cat": 0.0, " cat": -1.0}]


def test_tokens_that_read_alike_are_told_apart_by_their_ids() -> None:
    tokenizer = small_tokenizer("byte_level")
    first_halves = tokenizer.convert_tokens_to_ids(["\u00c3", "\u00c4", "\u00c5"])  # of bytes c3, c4, c5
    cat = tokenizer.convert_tokens_to_ids("cat")
    (chunk,) = answer_chunks(tokenizer, [cat], [first_halves[1], cat], size=2, top_ids=[*first_halves, cat, 2])
    tokens = completion_logprobs(chunk.tokens)
    names = [f"token_id:{token_id}" for token_id in first_halves]
    assert tokens["tokens"] == ["", "\ufffdcat"]
    assert tokens["top_logprobs"][0] == {names[0]: 0.0, "": -1.0, names[2]: -2.0, "cat": -3.0, "</s>": -4.0}
    assert tokens["top_logprobs"][1]["\ufffdcat"] == -3.0
    assert len(tokens["top_logprobs"][1]) == 5
    entry = chat_logprobs(chunk.tokens)["content"][0]
    assert entry["bytes"] == [0xC4]
    assert [alternative["bytes"] for alternative in entry["top_logprobs"]] == [[0xC3], [0xC4], [0xC5], [*b"cat"], []]


def test_the_end_of_an_answer_within_a_character_belongs_to_its_last_token() -> None:
    tokenizer = small_tokenizer("llama")
    first, second, _ = (tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "\u4f60".encode())
    prompt_ids = [*tokenizer.encode("the"), first]
    (chunk,) = answer_chunks(tokenizer, prompt_ids, [], echo=True)
    assert chunk.text == "the\ufffd"
    assert completion_logprobs(chunk.tokens)["tokens"] == ["the", "\ufffd"]
    chunks = answer_chunks(tokenizer, prompt_ids, [second], echo=True)
    assert [chunk.text for chunk in chunks] == ["the", "\ufffd"]
    assert [token.added.bytes_ for chunk in chunks for token in chunk.tokens] == [b"the", b"\xe4", b"\xbd"]


def test_tokens_of_a_tokenizer_whose_decoder_is_not_known_join_to_the_text() -> None:
    text = TextChunker(PrefixDetokenizer(small_tokenizer("byte_level")), [])
    token_ids = small_tokenizer("byte_level").encode("caf\u00e9 \U0001f601")[:-1]  # it ends within a character
    score = Score(-1.0, [], [])
    chunk = text.chunk(Output("r", token_ids, "length", scores=[score] * len(token_ids)))
    assert chunk.text == "caf\u00e9 \ufffd"
    assert b"".join(token.added.bytes_ for token in chunk.tokens).decode() == chunk.text


@pytest.mark.parametrize("shape", [completion_logprobs, chat_logprobs])
def test_log_probabilities_are_numbers_that_json_has(shape: object) -> None:
    tokenizer = small_tokenizer("llama")
    text = TextChunker(detokenizers(tokenizer)(), [])
    scores = [Score(-math.inf, [300, 301], [-0.5, -math.inf]), Score(math.nan, [], [])]
    possible, impossible = text.chunk(Output("r", [300, 300], "length", scores=scores)).tokens
    assert str(LOWEST_LOGPROB) in str(shape([possible]))  # type: ignore[operator]
    assert "inf" not in str(shape([possible]))  # type: ignore[operator]
    with pytest.raises(ApiError, match="not finite"):
        shape([impossible])  # type: ignore[operator]
