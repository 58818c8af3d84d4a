"""However rows travel, the layer computes the same, with borrowed experts too."""

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from rq_ep.moe import EPExperts, Telemetry
from rq_ep.parallel import EPGroup, run_local
from tests.moe import cases
from tests.parallel.test_exchange import MODES, exchange

BORROWING = {"knobs": {"min_tokens_per_gemm": 1, "fallback_ratio": 1.0}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("routing", ["one_hot_expert", "one_rank_empty", "duplicates", "no_tokens"])
def test_every_way_to_move_rows_equals_the_dense_layer(mode: str, routing: str) -> None:
    family = cases.FAMILIES["transposed"]
    ranks = cases.batches(routing)
    num_experts = cases.ROUTINGS[routing][0]
    weights = cases.expert_weights(family, num_experts)
    counts_RE = cases.counts_of(ranks, num_experts)
    layer, planner, _ = cases.planned("llep", BORROWING, family, counts_RE)
    settings = MODES[mode] | ({"max_dispatch_bytes": 5 * cases.D * 4} if "max_dispatch_bytes" in MODES[mode] else {})

    def main(group: EPGroup) -> tuple[torch.Tensor, torch.Tensor]:
        experts = EPExperts(family, layer, planner, group, exchange=exchange(group, **settings))
        cases.fill(experts, weights)
        batch = ranks[group.rank]
        first, again = (experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK) for _ in range(2))
        return first, again

    assert bool(planner(counts_RE).transfers) == (routing != "no_tokens")
    for (first, again), batch in zip(run_local(len(ranks), main), ranks, strict=True):
        cases.check_close(first, cases.expected(family, weights, batch))
        assert torch.equal(first, again), "the same step twice gave different bits"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_row_that_is_not_finite_changes_no_other(mode: str, value: str) -> None:
    family = cases.FAMILIES["transposed"]
    ranks = cases.batches("one_hot_expert")
    num_experts = cases.ROUTINGS["one_hot_expert"][0]
    weights = cases.expert_weights(family, num_experts)
    layer, planner, _ = cases.planned("llep", BORROWING, family, cases.counts_of(ranks, num_experts))
    settings = MODES[mode] | ({"max_dispatch_bytes": 5 * cases.D * 4} if "max_dispatch_bytes" in MODES[mode] else {})

    def main(group: EPGroup) -> tuple[torch.Tensor, torch.Tensor]:
        experts = EPExperts(family, layer, planner, group, exchange=exchange(group, **settings))
        cases.fill(experts, weights)
        batch = ranks[group.rank]
        damaged_TD, damaged_TK = batch.hidden_TD.clone(), batch.weights_TK.clone()
        damaged_TD[0], damaged_TK[1] = float(value), float(value)
        before = experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
        damaged = experts(damaged_TD, batch.ids_TK, damaged_TK)
        after = experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
        assert torch.equal(before, after), "what was received stays in no buffer"
        return before, damaged

    for well, damaged in run_local(len(ranks), main):
        assert torch.equal(damaged[2:], well[2:])
        assert not damaged[:2].isfinite().any()


@pytest.mark.parametrize("routing", ["no_tokens", "one_hot_expert", "one_rank_empty", "more_ranks_than_experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_steps_of_announced_rows_need_no_counts_and_give_the_same_bits(
    variant_of: tuple[str, dict[str, Any]], routing: str, dtype: torch.dtype
) -> None:
    """Every strategy, with borrowed experts too: the same output, and the same counts and loads in the telemetry."""
    name, variant = variant_of
    family, ranks, num_experts = cases.FAMILIES["gated"], cases.batches(routing, dtype), cases.ROUTINGS[routing][0]
    weights = cases.expert_weights(family, num_experts, dtype)
    native = "fp32" if dtype == torch.float32 else "bf16"
    counts_RE = cases.counts_of(ranks, num_experts)
    layer, planner, _ = cases.planned(name, variant, family, counts_RE, (native,))
    telemetry = Telemetry()
    rows_R = np.array([len(batch.hidden_TD) for batch in ranks])

    def main(group: EPGroup) -> tuple[torch.Tensor, torch.Tensor]:
        experts = EPExperts(family, layer, planner, group, telemetry=telemetry)
        cases.fill(experts, weights)
        batch = ranks[group.rank]
        step = batch.hidden_TD, batch.ids_TK, batch.weights_TK
        with patch.object(group, "gather_counts", wraps=group.gather_counts) as gather_counts:
            usual = experts(*step)
            experts.exchange.announce_rows(rows_R)
            small = experts(*step)
            assert gather_counts.call_count == 1
            experts.exchange = exchange(group, max_gathered_bytes=-1)
            experts.exchange.announce_rows(rows_R)
            assert torch.equal(usual, experts(*step))
            assert gather_counts.call_count == 2, "a step that is too large goes the usual way"
        return usual, small

    for usual, small in run_local(len(ranks), main):
        assert torch.equal(usual, small)
    assert np.array_equal(telemetry.counts()[:, 0], [counts_RE.sum(axis=0)] * 3)
    assert len(np.unique(telemetry.loads(), axis=0)) == 1
