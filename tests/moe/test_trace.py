"""What is recorded is what the layers were given."""

import numpy as np
import pytest
import torch
from torch import nn

from rq_ep.core.errors import UserError
from rq_ep.moe import RoutingRecorder
from tests.moe import cases
from tests.moe.test_local import local


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


def test_nothing_to_record_is_said() -> None:
    with pytest.raises(UserError, match="no expert-parallel layers"):
        RoutingRecorder(nn.Linear(1, 1))
    with pytest.raises(UserError, match="no step was recorded"):
        RoutingRecorder(local(2, 8)).trace()
