"""Which rows a step has: prompts between rounds of answers, rows that join, leave and give way."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rq_ep.engine.output_processor import OutputProcessor, RequestState
from rq_ep.engine.padded.padded_manager import PaddedManager
from rq_ep.engine.padded.row_groups import DenseForward, RowGroup, SequenceRow
from rq_ep.engine.requests import Output, Request


class Cacheless(RowGroup):
    """A group without tensors."""

    def join(self, other: RowGroup) -> None:
        self.rows += other.rows

    def keep(self, rows: Any) -> None:
        self.rows = list(rows)


class Forward:
    """A model whose answers count up from the prompt's last token, and that remembers its steps."""

    device, recompute_after = torch.device("cpu"), None
    chunk_size = DenseForward.chunk_size

    def __init__(self, takes_rows: bool, takes_chunks: bool) -> None:
        self.takes_rows, self.takes_chunks = takes_rows, takes_chunks
        self.steps: list[dict[str, int]] = []  # request -> how many of its tokens

    def new_cache(self) -> None:
        return None

    def __call__(self, group: RowGroup, num_tokens: int) -> torch.Tensor:
        self.steps.append({row.request.id: num_tokens for row in group.rows})
        for row in group.rows:
            row.num_computed += num_tokens
        last = torch.tensor([row.token_ids[row.num_computed - 1] for row in group.rows])
        return torch.nn.functional.one_hot(last + 1, 100).float()


class Engine:
    """A manager whose steps are made by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, takes_rows: bool = True, takes_chunks: bool = True):
        monkeypatch.setattr("rq_ep.engine.padded.padded_manager.RowGroup", Cacheless)
        self.requests: dict[str, RequestState] = {}
        self.forward: Any = Forward(takes_rows, takes_chunks)
        self.answers: dict[str, list[int]] = {}
        self.ended: list[str] = []
        self.manager = PaddedManager(
            self.forward, step=lambda batches: False, wake_up=threading.Event(),
            outputs=OutputProcessor(self.requests, self._take, lambda name: None),
            max_num_seqs=3, max_num_batched_tokens=8, kv_cache_tokens=room,
            requests=self.requests, on_failure=lambda error: None,
        )  # fmt: skip

    def _take(self, outputs: list[Output]) -> None:
        for output in outputs:
            self.answers.setdefault(output.request_id, []).extend(output.token_ids)
            self.ended += [output.request_id] * (output.finish_reason is not None)

    def submit(self, name: str, num_prompt: int, max_tokens: int, first: int = 1) -> None:
        request = Request(name, list(range(first, first + num_prompt)), max_tokens)
        self.requests[name] = RequestState(request, frozenset() if request.ignore_eos else frozenset({99}))
        self.manager.submit(request)

    def run(self, num_steps: int = 100) -> list[dict[str, int]]:
        before = len(self.forward.steps)
        while num_steps and self.manager.prepare():
            assert self.manager.kv_cache_usage <= 1
            self.manager.run()
            num_steps -= 1
        steps: list[dict[str, int]] = self.forward.steps[before:]
        return steps


def test_short_prompts_start_together_and_a_long_one_takes_turns_with_the_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(monkeypatch, room=1000)
    for name, num_prompt in (("a", 3), ("b", 4), ("c", 20)):
        engine.submit(name, num_prompt, 4)
    steps = engine.run()
    assert steps[:4] == [{"a": 3}, {"b": 4}, {"c": 8}, {"a": 1, "b": 1}]
    assert steps[4:8] == [{"c": 8}, {"a": 1, "b": 1}, {"c": 4}, {"a": 1, "b": 1, "c": 1}]
    assert engine.answers == {"a": [4, 5, 6, 7], "b": [5, 6, 7, 8], "c": [21, 22, 23, 24]}
    assert not engine.manager.has_requests()


def test_an_answer_ends_with_an_end_token_and_a_cancelled_one_leaves_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, room=1000)
    engine.submit("ends", 3, 9, first=95)
    engine.submit("gone", 3, 9)
    engine.submit("stays", 3, 5)
    engine.run(4)
    del engine.requests["gone"]
    engine.run()
    assert (engine.answers["ends"], engine.ended) == ([98, 99], ["ends", "stays"])
    assert engine.answers["stays"] == [4, 5, 6, 7, 8]
    assert len(engine.answers["gone"]) < 9


def test_the_newest_row_gives_way_to_the_others_and_goes_on_when_one_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, room=24)
    engine.submit("old", 4, 12)
    engine.submit("new", 4, 12)
    engine.submit("later", 2, 2)
    steps = engine.run()
    assert steps[:2] == [{"old": 4}, {"new": 4}]
    alone = steps.index({"old": 1})
    assert steps[alone - 1] == {"old": 1, "new": 1}, "both had room until then"
    assert {"new": 8} in steps[alone:], "its prompt and answer are computed anew"
    assert engine.ended == ["later", "old", "new"]
    assert engine.answers["new"] == list(range(5, 17))


def test_rows_that_cannot_be_joined_take_turns_and_prompts_that_cannot_be_cut_stay_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(monkeypatch, room=1000, takes_rows=False, takes_chunks=False)
    for name, num_prompt in (("a", 3), ("b", 20), ("c", 5)):
        engine.submit(name, num_prompt, 3)
    assert engine.run() == [{"a": 3}, {"b": 20}, {"a": 1}, {"b": 1}, {"c": 5}, {"a": 1}, {"b": 1}, {"c": 1}, {"c": 1}]


def test_an_answer_computed_anew_is_not_run_as_a_prompt_where_prompts_stay_whole() -> None:
    forward: Any = SimpleNamespace(takes_chunks=False)
    row = SequenceRow(Request("a", [1, 2, 3], 9), [1, 2, 3, 4, 5], 0.0, num_prefill=5)
    assert DenseForward.chunk_size(forward, row, 2) == 3
    row.num_computed = 3
    assert DenseForward.chunk_size(forward, row, 2) == 1
