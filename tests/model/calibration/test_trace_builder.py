"""Recorded routing of a transformers model: it is what its routers choose, and adds up to the statistics."""

from pathlib import Path

import numpy as np
import pytest
import torch

import rq_ep
from rq_ep.core.errors import UserError
from rq_ep.core.stats import ExpertStats
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.model.calibration.layer_records import LayerRecord
from rq_ep.model.calibration.trace_builder import RoutingTraceBuilder
from rq_ep.model.load.whole_model import load_whole_model
from rq_ep.model.seam.expert_modules import find_expert_modules
from rq_ep.moe import RoutingRecorder
from rq_ep.sim.traces import RoutingTrace


@pytest.fixture(scope="module")
def recorded(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExpertStats, RoutingTrace]:
    path = tmp_path_factory.mktemp("trace") / "trace.safetensors"
    text = tiny_checkpoint / "text" / "train" / "prose"
    stats = calibrate(tiny_checkpoint, text, max_tokens=2048, sequence_length=64, batch_size=4, trace_path=path)
    return stats, RoutingTrace.load(path)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_trace_adds_up_to_the_statistics(recorded: tuple[ExpertStats, RoutingTrace], num_ranks: int) -> None:
    stats, trace = recorded
    trace.check(stats)
    assert np.array_equal(trace.counts(num_ranks).sum(axis=2), stats.counts)
    assert np.array_equal(trace.tokens_S, stats.tokens)
    assert np.array_equal(trace.phase_S, stats.phase)


def test_a_trace_knows_weights_and_sequences(recorded: tuple[ExpertStats, RoutingTrace]) -> None:
    stats, trace = recorded
    mass_E = np.bincount(trace.ids_NLK[:, 1].ravel(), trace.weights_NLK[:, 1].ravel(), stats.num_experts)
    prefill_N = np.repeat(stats.phase == 0, stats.tokens)
    assert mass_E.sum() == pytest.approx(len(trace.ids_NLK), rel=1e-3)  # this router's weights sum to 1
    assert np.bincount(trace.sequence_N[prefill_N]).tolist() == [64] * 32
    decoded = np.flatnonzero(stats.phase == 1)[0]  # the first position taken from the first batch
    start = int(trace.tokens_S[:decoded].sum())
    assert trace.sequence_N[start : start + 4].tolist() == [0, 1, 2, 3]


def test_recorder_sees_what_the_routers_of_a_loaded_model_choose(tiny_checkpoint: Path) -> None:
    tokens_BT = torch.arange(30).reshape(2, 15)
    dense = load_whole_model(tiny_checkpoint, torch.float32, torch.device("cpu"))
    seen = []
    for experts in find_expert_modules(dense):
        experts.module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1:]))
    with torch.no_grad():
        dense(tokens_BT)
    model = rq_ep.load(tiny_checkpoint, dtype=torch.float32, device="cpu")
    with RoutingRecorder(model) as recorder, torch.no_grad():
        model(tokens_BT)
    trace = recorder.trace()
    assert trace.tokens_S.tolist() == [30]
    for layer, (ids_TK, weights_TK) in enumerate(seen):
        np.testing.assert_array_equal(trace.ids_NLK[:, layer], ids_TK.numpy())
        np.testing.assert_allclose(trace.weights_NLK[:, layer], weights_TK.numpy(), rtol=1e-4)


def test_layers_that_choose_unequal_numbers_of_experts_have_no_trace() -> None:
    records = [LayerRecord(4, 1), LayerRecord(4, 1)]
    for record, top_k in zip(records, (2, 1), strict=True):
        ids_TK = torch.arange(3 * top_k).view(3, top_k) % 4
        record.add(torch.zeros(3, 8), ids_TK, torch.ones(3, top_k), torch.ones(3, top_k))
    builder = RoutingTraceBuilder()
    builder.begin_batch(1, 3)
    with pytest.raises(UserError, match=r"--trace: layers choose \[1, 2\] experts"):
        builder.add_step(0, records, slice(None))


def test_a_negative_weight_counts_as_much_as_a_positive_one() -> None:
    record = LayerRecord(2, 1)
    record.add(torch.zeros(1, 8), torch.tensor([[0, 1]]), torch.tensor([[-0.5, 2.0]]), torch.tensor([[4.0, 1.0]]))
    assert record.importance_E.tolist() == [2.0, 2.0]
    assert record.gate_mass_E.tolist() == [0.5, 2.0]
