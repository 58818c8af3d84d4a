"""The recorded routing is that of the layers' inputs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rq_ep.core.errors import UserError
from rq_ep.moe import RoutingRecorder, StepInfo
from tests.moe import cases
from tests.moe.test_local_experts import local


def test_recorder_keeps_every_token_of_every_step() -> None:
    experts = local(3, 8)
    model = nn.Sequential(experts)
    batches = cases.batches("distinct")
    with RoutingRecorder(model) as recorder:
        for batch in batches:
            experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
    experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK)  # not recorded any more
    trace = recorder.trace()
    assert trace.layers == (3,)
    assert trace.tokens_S.tolist() == [7, 9, 8]
    assert np.array_equal(trace.ids_NLK[:, 0], torch.cat([batch.ids_TK for batch in batches]).numpy())
    assert np.array_equal(trace.weights_NLK[:, 0], torch.cat([batch.weights_TK for batch in batches]).numpy())
    counts_RE = cases.counts_of([cases.Batch(b.hidden_TD, b.ids_TK, b.weights_TK) for b in batches], 8)
    assert np.array_equal(trace.counts(3).sum(axis=(1, 2)), counts_RE)


def test_nothing_to_record_is_an_error() -> None:
    with pytest.raises(UserError, match="no expert-parallel layers"):
        RoutingRecorder(nn.Linear(1, 1))
    with pytest.raises(UserError, match="no step was recorded"):
        RoutingRecorder(local(2, 8)).trace()


def test_a_trace_ends_before_the_step_that_does_not_fit() -> None:
    experts = local(3, 8)
    batches = cases.batches("distinct")  # of 7, 9 and 8 tokens
    with RoutingRecorder(nn.Sequential(experts), max_tokens=15) as recorder:
        for batch in batches:
            experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
    assert recorder.is_full
    assert recorder.trace().tokens_S.tolist() == [7]


def test_empty_steps_count_too() -> None:
    experts = local(3, 8)
    batch = cases.batches("distinct")[0]
    with RoutingRecorder(nn.Sequential(experts), max_tokens=4) as recorder:
        for _ in range(6):
            experts(batch.hidden_TD[:0], batch.ids_TK[:0], batch.weights_TK[:0])
    assert recorder.is_full
    assert recorder.trace().tokens_S.tolist() == [0] * 4


def test_step_infos_become_sequences_and_phases() -> None:
    experts = local(3, 8)
    batches = cases.batches("distinct")
    infos = iter([StepInfo(0, np.arange(7)), StepInfo(1, np.full(9, 4))])
    with RoutingRecorder(nn.Sequential(experts), step_info=lambda: next(infos)) as recorder:
        for batch in batches[:2]:
            experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
    trace = recorder.trace()
    assert trace.phase_S is not None
    assert trace.sequence_N is not None
    assert trace.phase_S.tolist() == [0, 1]
    assert trace.sequence_N.tolist() == [*range(7), *[4] * 9]


@pytest.mark.parametrize("part", [slice(3), (slice(None), slice(1))], ids=["tokens", "experts"])
def test_layers_that_see_different_tokens_or_choose_fewer_experts_make_no_trace(part: Any) -> None:
    first, second = local(3, 8), local(3, 8)
    second.ranks[0].placement = replace(first.placement, index=4)
    batch = cases.batches("distinct")[0]
    with RoutingRecorder(nn.Sequential(first, second)) as recorder:
        first(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
        ids_TK = batch.ids_TK[part]
        second(batch.hidden_TD[: len(ids_TK)], ids_TK, batch.weights_TK[part])
    with pytest.raises(UserError, match="no step was recorded in which every layer"):
        recorder.trace()
