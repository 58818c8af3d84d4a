import json
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_ep.core.errors import UserError
from rq_ep.model.settings import WindowSettings
from rq_ep.model.text import windows
from rq_ep.model.text.byte_tokenizer import byte_tokenizer
from rq_ep.model.text.windows import make_windows, read_texts

TOKENIZER = byte_tokenizer(512)


def sample(texts: windows.Texts, **settings: int) -> windows.Windows:
    defaults = {"sequence_length": 8, "max_tokens": 96, "batch_size": 2}
    return make_windows(texts, TOKENIZER, WindowSettings(**(defaults | settings)))


def test_domains_share_the_tokens_and_take_turns() -> None:
    sampled = sample({"a": ["a" * 1000], "b": ["b" * 400, "b" * 600], "c": ["c" * 1000]})
    assert sampled.domains == ("a", "b", "c")
    assert [batch.domain for batch in sampled.batches] == [0, 1, 2, 0, 1, 2]
    assert (sampled.num_windows, sampled.num_tokens) == (12, 96)
    for batch in sampled.batches:
        assert batch.tokens_BT.shape == (2, 8)
        assert bytes(batch.tokens_BT.flatten().tolist()).decode() == sampled.domains[batch.domain] * 16


def test_windows_come_from_all_over_the_text() -> None:
    text = "".join(f"{number:07d} " for number in range(1000))
    numbers = [int(bytes(row.tolist())[:7]) for batch in sample({"n": [text]}).batches for row in batch.tokens_BT]
    assert len(set(numbers)) == 12
    assert max(numbers) - min(numbers) > 500


def test_seed_chooses_the_windows() -> None:
    text = {"n": ["".join(map(str, range(5000)))]}
    first, again, other = (sample(text, seed=seed).batches[0].tokens_BT for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@settings(max_examples=100, deadline=None)
@given(documents=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=12))
def test_short_documents_are_joined_and_nothing_is_repeated(documents: list[str]) -> None:
    total = sum(len(document.encode()) for document in documents)
    if total < 8:
        with pytest.raises(UserError, match="does not fill one window"):
            sample({"d": documents}, max_tokens=10_000)
        return
    sampled = sample({"d": documents}, max_tokens=10_000)
    assert sampled.num_windows == total // 8
    used = torch.cat([batch.tokens_BT.flatten() for batch in sampled.batches]).bincount(minlength=256)
    there = torch.tensor(list("".join(documents).encode())).bincount(minlength=256)
    assert (used <= there).all()


def test_a_domain_too_short_for_a_window_is_left_out_and_named(caplog) -> None:
    sampled = sample({"long": ["x" * 100], "short": ["y"]})
    assert sampled.domains == ("long",)
    assert {batch.domain for batch in sampled.batches} == {0}
    assert "short" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"sequence_length": 0}, "--sequence-length 0"), ({"batch_size": 0}, "--batch-size 0"),
     ({"max_tokens": 15}, "--max-tokens 15.*16 in all"), ({"seed": -1}, "--seed -1"),
     ({"max_tokens": 1e3}, "--max-tokens 1000.0: must be a whole number")],
)  # fmt: skip
def test_impossible_sizes_are_refused(settings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample({"a": ["a" * 100], "b": ["b" * 100]}, **settings)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Two domains, nested directories, a binary file, JSON lines, and a file beside the directories."""
    for name, data in {
        "prose/one.txt": b"one", "prose/deep/two.md": "zw\u00f6lf".encode(), "code/three.py": b"3",
        "code/image.bin": b"\x00\x01", "code/latin.txt": b"\xe4\xf6", "four.txt": b"four", "empty.txt": b"",
        "chat/talk.jsonl": b'{"text": "five", "id": 5}\n\n{"text": "six"}\n',
    }.items():  # fmt: skip
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "library"


def test_directories_are_domains(library: Path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    assert read_texts([library]) == {
        "chat": ["five", "six"], "code": ["3"], "deep": ["zw\u00f6lf"], "library": ["four"], "prose": ["one"],
    }  # fmt: skip
    assert "skipped 2 files" in caplog.text


def test_files_given_by_themselves_are_domains_and_strings_are_text(library: Path) -> None:
    assert read_texts([library / "prose" / "one.txt", library / "chat" / "talk.jsonl", "plain"]) == {
        "one": ["one"], "talk": ["five", "six"], "text": ["plain"],
    }  # fmt: skip
    assert read_texts(library / "four.txt") == {"four": ["four"]}
    assert read_texts({"x": iter(["a", ""]), "y": [], "z": "one text"}) == {"x": ["a"], "z": ["one text"]}
    assert read_texts(text for text in ("b", "c")) == {"text": ["b", "c"]}


@pytest.mark.parametrize("texts", [[1], ["a", None], {"x": [b"bytes"]}, {"x": [Path("here")]}])
def test_files_that_are_not_text_are_refused(texts) -> None:
    with pytest.raises(UserError, match="must be a text"):
        read_texts(texts)


@pytest.mark.parametrize(("content", "message"), [(b"", "no text to run in"), (b"a", "does not fill one window of 8")])
def test_a_file_without_enough_text_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "short.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        sample(file, max_tokens=10_000)
    assert f"--text {file}" in str(refused.value)


@pytest.mark.parametrize("texts", [[], "", {}, {"x": []}, iter(())])
def test_no_text_is_refused(texts) -> None:
    with pytest.raises(UserError, match="no text to run"):
        read_texts(texts)


def test_long_files_are_cut_at_a_whole_character_or_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(windows, "MAX_FILE_BYTES", 20)
    (tmp_path / "a.txt").write_text("x" * 19 + "\u00e4")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "1"}) + "\n" + json.dumps({"text": "2" * 50}))
    assert read_texts([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == {"a": ["x" * 19], "b": ["1"]}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [("absent.txt", None, "absent.txt: no such file"), ("image.bin", b"\0", "no text"), ("empty.txt", b"", "no text"),
     ("bad.jsonl", b'{"text": 1}', "line 1"), ("worse.jsonl", b'{"text": "ok"}\nx', "line 2"),
     ("deep.jsonl", b"[" * 10**5, "line 1"), ("latin.txt", b"\xe4", "no text")],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_texts(tmp_path / name)
