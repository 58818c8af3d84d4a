"""Text in parts: whole characters, cut before stop strings, the same however it is divided."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_ep.serve.http.openai.detokenizer import (
    ByteDetokenizer,
    Detokenizer,
    PrefixDetokenizer,
    StopStrings,
    detokenizers,
)
from tests.serve.http.openai.small_tokenizers import KINDS, TEXT, small_tokenizer


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert len(token_ids) <= PrefixDetokenizer.MAX_WINDOW + 1, "the time of a token does not grow with the text"
        return bytes(token_ids).decode(errors="replace")


class Words:
    """A tokenizer that puts spaces between words, so that a word's text depends on the one before."""

    all_special_ids = (0,)

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool = True
    ) -> str:
        return " ".join(f"w{token_id}" for token_id in token_ids if token_id != 0 or not skip_special_tokens)


def text_of(detokenizer: Detokenizer, token_ids: Sequence[int]) -> str:
    return "".join(detokenizer.push(token_id).text for token_id in token_ids) + detokenizer.flush().text


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_of_models_are_read_by_bytes(kind: str) -> None:
    assert isinstance(detokenizers(small_tokenizer(kind))(), ByteDetokenizer)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_text_is_what_the_tokenizer_decodes_behind_the_prompt(kind: str, data: st.DataObject) -> None:
    tokenizer = small_tokenizer(kind)
    new = detokenizers(tokenizer)
    ids = st.one_of(st.integers(0, 260), st.integers(0, len(tokenizer) + 1))  # the first are special ones and bytes
    prompt, answer = data.draw(st.lists(ids, max_size=8)), data.draw(st.lists(ids, max_size=12))
    before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, prompt + answer))
    assert "\ufffd" in whole or text_of(new(), prompt + answer) == whole
    if kind == "byte_level":  # its decoder replaces what is no UTF-8 as Python does; others replace every byte
        assert text_of(new(), prompt + answer) == whole
    detokenizer = new()
    detokenizer.skip(prompt)
    assert "\ufffd" in before + whole or before + text_of(detokenizer, answer) == whole


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bytes_of_tokens_join_to_the_text(kind: str, data: st.DataObject) -> None:
    tokenizer = small_tokenizer(kind)
    detokenizer = detokenizers(tokenizer)()
    ids = st.one_of(st.integers(0, 260), st.integers(0, len(tokenizer) + 1))
    pushed = [detokenizer.push(token_id) for token_id in data.draw(st.lists(ids, max_size=20))]
    pushed.append(detokenizer.flush())
    text = "".join(part.text for part in pushed)
    assert b"".join(part.bytes_ for part in pushed).decode(errors="replace") == text
    assert "\ufffd" in text or not any("\ufffd" in part.text for part in pushed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", [*TEXT, " two  spaces", "caf\u00e9 \U0001f468\u200d\U0001f469\u200d\U0001f467", "a <tool> \u65e5\u672c b"]
)
def test_text_in_any_script_comes_back(kind: str, text: str) -> None:
    tokenizer = small_tokenizer(kind)
    token_ids = tokenizer.encode(text)
    assert text_of(detokenizers(tokenizer)(), token_ids) == tokenizer.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "byte_level"])
def test_a_space_at_the_start_of_an_answer_is_kept(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    detokenizer = detokenizers(tokenizer)()
    detokenizer.skip(tokenizer.encode("the cat"))
    lox = tokenizer.convert_tokens_to_ids("\u2581Lox")
    assert detokenizer.peek(lox) == (" Lox", b" Lox")
    assert detokenizer.push(lox).text == " Lox"


@pytest.mark.parametrize("kind", KINDS)
def test_characters_that_are_u_fffd_spoil_none_behind_them(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    text = "a" + 5 * "\ufffd" + "\u4f60\U0001f601\ufffd\u00e9\ufffd"
    by_bytes = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
    token_ids = tokenizer.encode(text) if kind in ("byte_level", "plain_metaspace") else by_bytes
    assert text_of(detokenizers(tokenizer)(), token_ids).removeprefix(" ") == tokenizer.decode(token_ids)
    assert text_of(PrefixDetokenizer(Bytes()), list(text.encode())) == text


@pytest.mark.parametrize("num_begun", [1, 2, 3])
def test_a_character_that_the_prompt_begins_is_shown_when_it_is_complete(num_begun: int) -> None:
    tokenizer = small_tokenizer("llama")
    token_ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "\U0001f600".encode()]
    for detokenizer in (detokenizers(tokenizer)(), PrefixDetokenizer(tokenizer)):
        detokenizer.skip([*tokenizer.encode("the cat"), *token_ids[:num_begun]])
        assert text_of(detokenizer, token_ids[num_begun:]) == "\U0001f600"


def test_an_added_token_of_a_byte_level_vocabulary_is_its_own_text() -> None:
    """The library's decoder takes these characters for bytes, and the text for what is no UTF-8."""
    tokenizer = small_tokenizer("byte_level", ("na\u00efve",))
    assert text_of(detokenizers(tokenizer)(), tokenizer.encode("a na\u00efve cat")) == "a na\u00efve cat"


@given(st.text(max_size=40))
def test_whole_characters_only(text: str) -> None:
    detokenizer = PrefixDetokenizer(Bytes())
    parts = [detokenizer.push(byte).text for byte in text.encode()]
    assert "".join(parts) + detokenizer.flush().text == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@given(st.lists(st.integers(0, 255), max_size=60))
def test_bytes_that_are_no_text_come_out_in_the_end(token_ids: list[int]) -> None:
    detokenizer = PrefixDetokenizer(Bytes())
    pushed = [*map(detokenizer.push, token_ids), detokenizer.flush()]
    text = "".join(part.text for part in pushed)
    assert (text == "") == (not token_ids)
    assert b"".join(part.bytes_ for part in pushed).decode() == text


def test_what_stands_between_tokens_is_kept() -> None:
    detokenizer = PrefixDetokenizer(Words())
    assert text_of(detokenizer, [1, 2, 0, 3]) == "w1 w2 w3"
    assert text_of(PrefixDetokenizer(Words()), list(range(1, 99))) == Words().decode(
        [*range(1, 99)], skip_special_tokens=True
    )
    detokenizer.skip([4] + 50 * [0])
    assert (detokenizer.peek(5), detokenizer.peek(0)) == ((" w5", b" w5"), ("w0", b""))
    assert text_of(detokenizer, [5]) == " w5"


@pytest.mark.parametrize(
    ("parts", "stops", "shown", "ended"),
    [
        (["abc", "def"], [], "abcdef", False),
        (["abc", "def"], ["cd"], "ab", True),
        (["abcdef"], ["ef", "bc"], "a", True),
        (["abcdef"], ["abcde", "bc"], "a", True),
        (["abcdef"], ["bc", "abc"], "", True),
        (["ab", "ab", "ac"], ["abac"], "ab", True),
        (["a", "b", "a"], ["abc"], "aba", False),
        (["stop"], ["stop"], "", True),
    ],
)
def test_text_ends_before_a_stop_string(parts: list[str], stops: list[str], shown: str, ended: bool) -> None:
    assert cut(parts, stops) == (shown, ended)


def cut(parts: Sequence[str], stops: Sequence[str]) -> tuple[str, bool]:
    stop_strings, shown = StopStrings(stops), ""
    for part in parts:
        shown_part, is_stopped = stop_strings.push(part)
        shown += shown_part
        if is_stopped:
            return shown + stop_strings.flush(), True
    return shown + stop_strings.flush(), False


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_the_division_into_parts_does_not_matter(text: str, stops: list[str], size: int) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = (text[: min(ends)[1]], True) if ends else (text, False)
    assert cut([text[at : at + size] for at in range(0, len(text), size)], stops) == expected


def test_a_stop_string_is_shown_where_it_is_asked_for() -> None:
    stop_strings = StopStrings(["cd"], shows=True)
    assert stop_strings.push("abc") == ("ab", False)
    assert stop_strings.push("de") == ("cd", True)


def test_a_stop_string_may_begin_before_it_may_end_the_text() -> None:
    stop_strings = StopStrings(["cd"])
    assert stop_strings.push("cdabc", may_stop=False) == ("cdab", False)
    assert stop_strings.push("de") == ("", True)
