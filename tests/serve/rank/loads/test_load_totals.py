"""Sums of the load while serving."""

from typing import Any

import numpy as np
import pytest

from rq_ep.core.plan import DispatchPlan, WeightTransfer
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.moe.telemetry import LayerCall, PhaseTimer
from rq_ep.serve.http.views.history import _percentile_ms
from rq_ep.serve.http.views.load_view import LoadView
from rq_ep.serve.rank.loads import recent_pairs
from rq_ep.serve.rank.loads.load_totals import LoadTotals
from rq_ep.serve.rank.loads.recent_pairs import RecentPairs

REPLICAS = Replicas.of([Replica(0, 0, "bf16"), Replica(1, 0, "bf16"), Replica(1, 1, "int8")])


def timer() -> PhaseTimer:
    times = iter([0.0, 1.0, 3.0])
    timer = PhaseTimer(lambda: next(times), None)
    timer.mark("plan")
    timer.mark("dispatch")
    return timer


def test_sums_are_those_of_the_steps_and_start_anew() -> None:
    totals = LoadTotals(lambda: (0, 1))
    assert totals.take() is None
    plan = DispatchPlan(REPLICAS, np.array([[3, 1, 0], [0, 2, 2]]), (WeightTransfer(0, 0, 1, "bf16"),))
    counts_RE = np.array([[4, 0], [2, 2]])
    for layer in (5, 2, 5):
        totals.record(LayerCall(layer, 0, counts_RE, plan, timer(), {}, lambda: np.array([0, 70])))
    nothing = DispatchPlan(REPLICAS, np.zeros((2, 3), np.int64))
    totals.record(LayerCall(2, 0, np.zeros((2, 2), np.int64), nothing, timer(), {}, lambda: np.zeros(2, np.int64)))
    sums = totals.take()
    assert sums is not None
    assert (sums["layers"], sums["num_calls_L"]) == ([2, 5], [1, 2])
    assert sums["pairs_LR"] == [[3, 5], [6, 10]]
    assert sums["counts_LE"] == [[6, 2], [12, 4]]
    assert sums["formats_L"] == [{"bf16": 6, "int8": 2}, {"bf16": 12, "int8": 4}]
    assert sums["imbalance_L"] == [pytest.approx(1.25), pytest.approx(1.25)]
    assert (sums["seconds"]["plan"], sums["seconds"]["dispatch"]) == (3.0, 6.0)
    assert (sums["borrowed_experts"], sums["borrowed_bytes"]) == (3, 210)
    assert totals.take() is None


def test_a_step_that_is_cut_off_counts_once_and_holes_do_not_count_as_ranks() -> None:
    replicas = Replicas.of([Replica(rank, rank, "bf16") for rank in range(3)])
    counts_RE, pairs_RP = np.array([[3, 0, 1], [0, 0, 0], [0, 0, 0]]), np.array([[3, 0, 1], [0, 0, 0], [0, 0, 0]])

    def call(layer: int) -> LayerCall:
        return LayerCall(layer, 0, counts_RE, DispatchPlan(replicas, pairs_RP), timer(), {}, lambda: np.zeros(3, int))

    totals = LoadTotals(lambda: (0, 2), awaits_ends=True)
    totals.record(call(2))
    totals.discard()
    totals.record(call(2))
    totals.record(call(5))
    assert totals.take() is None, "the step has not ended"
    totals.between_steps()
    sums = totals.take()
    assert sums is not None
    assert (sums["layers"], sums["num_calls_L"]) == ([2, 5], [1, 1])
    assert sums["imbalance_L"] == [1.5, 1.5], "3 of 4 pairs on one of two ranks"


def test_any_rank_knows_which_experts_were_chosen_lately() -> None:
    pairs, plan = RecentPairs(), DispatchPlan(REPLICAS, np.array([[0, 0, 2], [0, 0, 0]]))
    assert pairs.counts_LE(1) is None
    for layer in [5] * (2 * recent_pairs.EVERY) + [2]:
        pairs.record(LayerCall(layer, 0, np.array([[0, 200], [0, 0]]), plan, timer(), {}, lambda: np.zeros(2, int)))
    assert pairs.counts_LE(3) is None
    counts_LE = pairs.counts_LE(2)
    assert counts_LE is not None
    assert counts_LE.tolist() == [[0, 200], [0, 398]], "one step of eight, the older counts less"


def loads_of(layers: dict[int, tuple[list[int], float, int]]) -> dict[str, Any]:
    """As `take` gives them: pairs of the ranks, imbalance and calls by layer."""
    return {
        "layers": list(layers),
        "pairs_LR": [pairs for pairs, _, _ in layers.values()],
        "counts_LE": [[sum(pairs), 0] for pairs, _, _ in layers.values()],
        "imbalance_L": [imbalance for _, imbalance, _ in layers.values()],
        "num_calls_L": [calls for _, _, calls in layers.values()],
    }


def test_a_step_may_be_cut_between_its_layers() -> None:
    now_s = [0.0]
    view_of_loads = LoadView(lambda: now_s[0])
    view_of_loads.add(loads_of({3: ([3, 1], 1.5, 1)}))
    view_of_loads.add(loads_of({3: ([2, 2], 1.0, 3), 5: ([6, 2], 1.5, 4)}))
    view = view_of_loads.view()
    assert (view["layers"], view["total"]["pairs_LR"]) == ([3, 5], [[5, 3], [6, 2]])
    assert view["recent"]["counts_LE"] == [[8, 0], [8, 0]]
    assert view["recent"]["imbalance_L"] == [(1.5 + 3 * 1.0) / 4, 1.5]
    now_s[0] = 100.0
    view_of_loads.add(loads_of({5: ([1, 0], 2.0, 1)}))
    view = view_of_loads.view()
    assert view["recent"]["pairs_LR"] == [[0, 0], [1, 0]]
    assert view["recent"]["balancedness"] == (1 + 0.5) / 2
    assert view["total"]["pairs_LR"] == [[5, 3], [7, 2]]


def test_percentiles_are_observed_values() -> None:
    assert _percentile_ms([], 0.5) is None
    assert _percentile_ms([0.002], 0.99) == 2
    assert _percentile_ms([i / 1000 for i in range(1, 101)], 0.99) == pytest.approx(99)
    assert _percentile_ms([0.003, 0.001, 0.002], 0.5) == pytest.approx(2)
