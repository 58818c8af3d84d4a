"""Text in parts: whole characters, cut before stop strings, the same however it is divided."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq_ep.serve.http.openai.detokenizer import Detokenizer, StopStrings


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return bytes(token_ids).decode(errors="replace")


class Words:
    """A tokenizer that puts spaces between words, so that a word's text depends on the one before."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(f"w{token_id}" for token_id in token_ids)


@given(st.text(max_size=40))
def test_whole_characters_only(text: str) -> None:
    detokenizer = Detokenizer(Bytes())
    parts = [detokenizer.push([byte]) for byte in text.encode()]
    assert "".join(parts) + detokenizer.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@given(st.lists(st.integers(0, 255), max_size=60), st.integers(1, 7))
def test_bytes_that_are_no_text_come_out_in_the_end(token_ids: list[int], size: int) -> None:
    one, many = Detokenizer(Bytes()), Detokenizer(Bytes())
    singly = "".join(one.push([token_id]) for token_id in token_ids) + one.flush()
    chunks = "".join(many.push(token_ids[at : at + size]) for at in range(0, len(token_ids), size)) + many.flush()
    assert singly == chunks
    assert (singly == "") == (not token_ids)


def test_what_stands_between_tokens_is_kept() -> None:
    detokenizer = Detokenizer(Words())
    assert [detokenizer.push([1]), detokenizer.push([2, 3]), detokenizer.flush()] == ["w1", " w2 w3", ""]


@pytest.mark.parametrize(
    ("parts", "stops", "shown", "ended"),
    [
        (["abc", "def"], [], "abcdef", False),
        (["abc", "def"], ["cd"], "ab", True),
        (["abcdef"], ["ef", "bc"], "a", True),
        (["ab", "ab", "ac"], ["abac"], "ab", True),
        (["a", "b", "a"], ["abc"], "aba", False),
        (["stop"], ["stop"], "", True),
    ],
)
def test_text_ends_before_a_stop_string(parts: list[str], stops: list[str], shown: str, ended: bool) -> None:
    stop_strings, text = StopStrings(stops), ""
    for part in parts:
        shown_part, is_stopped = stop_strings.push(part)
        text += shown_part
        if is_stopped:
            break
    assert (text + stop_strings.flush(), is_stopped) == (shown, ended)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_the_division_into_parts_does_not_matter(text: str, stops: list[str], size: int) -> None:
    matches = [at for stop in stops if (at := text.find(stop)) >= 0]
    stop_strings, shown, is_stopped = StopStrings(stops), "", False
    for at in range(0, len(text), size):
        part, is_stopped = stop_strings.push(text[at : at + size])
        shown += part
        if is_stopped:
            break
    shown += stop_strings.flush()
    assert is_stopped == bool(matches)
    # A longer part may end several stop strings at once and shows the earliest; shorter ones meet the first to end.
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
