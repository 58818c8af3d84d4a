"""The simulator: counts are divided without loss, balance is measured per step, strategies differ as expected."""

from dataclasses import replace

import numpy as np
import pytest

from rq_ep.core.cost import LayerShape
from rq_ep.core.plan import spread_over_sources
from rq_ep.core.stats import ExpertStats
from rq_ep.costs.roofline import MACHINES
from rq_ep.placing.place import place
from rq_ep.sim.simulator import simulate
from rq_ep.strategies import make_strategy
from tests.sim.test_traces import trace_of

SIZES = {"bf16": 1000, "int8": 504}


def test_counts_are_divided_evenly_and_completely() -> None:
    counts_SLE = np.random.default_rng(0).integers(0, 50, (3, 2, 7))
    counts_SLRE = spread_over_sources(counts_SLE, 4)
    np.testing.assert_array_equal(counts_SLRE.sum(axis=2), counts_SLE)
    assert (counts_SLRE.max(axis=2) - counts_SLRE.min(axis=2)).max() <= 1
    per_rank = counts_SLRE.sum(axis=3)
    assert (per_rank.max(axis=2) - per_rank.min(axis=2)).max() <= 1  # remainders take turns
    np.testing.assert_array_equal(counts_SLRE, spread_over_sources(counts_SLE, 4))


def stats_of(counts_SLE: np.ndarray) -> ExpertStats:
    return ExpertStats(counts_SLE, ("bf16", "int8"), "bf16", SIZES, top_k=2)


def test_balance_is_per_step_and_layer_then_averaged() -> None:
    counts_SLE = np.array([[[20, 0], [10, 10]], [[0, 20], [10, 10]], [[0, 0], [0, 0]]])
    placement = place(stats_of(counts_SLE + 1), 2, strategy="standard")
    result = simulate(make_strategy("standard"), placement, counts_SLE, "bf16")
    np.testing.assert_array_equal(result.imbalance_SL, [[2, 1], [2, 1], [np.nan, np.nan]])
    assert result.imbalances.mean() == 1.5
    assert result.loads_LR.tolist() == [[20, 20], [20, 20]]
    assert result.layer_s_SL is None


def test_nothing_seen_is_balanced() -> None:
    counts_SLE = np.zeros((2, 1, 4), np.int64)
    placement = place(stats_of(counts_SLE + 1), 2, strategy="standard")
    assert simulate(make_strategy("standard"), placement, counts_SLE, "bf16").imbalances.tolist() == [1.0]


def test_strategies_on_a_skewed_record() -> None:
    popularity = 1 / np.arange(1, 17)
    popularity /= popularity.sum()
    counts_SLE = np.random.default_rng(0).multinomial(2000, popularity, size=(40, 2))
    calibration, held_out = stats_of(counts_SLE[:24]), counts_SLE[24:]
    simulations = {}
    cost = MACHINES["h200"].layer(LayerShape(64, 64, SIZES))
    for name in ("standard", "eplb", "llep", "rq"):
        strategy = make_strategy(name, **({"min_tokens_per_gemm": 32} if name == "llep" else {}))
        placement = place(calibration, 4, strategy=name)
        simulations[name] = simulate(strategy, placement, held_out, "bf16", cost)
    balance = {name: float(result.imbalances.mean()) for name, result in simulations.items()}
    assert balance["standard"] > 2
    assert balance["rq"] < 1.1 < balance["eplb"] < balance["standard"]
    assert balance["llep"] < 1.1
    assert simulations["llep"].transfers_SL.min() > 0
    assert not any(simulations[name].transfers_SL.any() for name in ("standard", "eplb", "rq"))
    assert 0 < simulations["rq"].low_precision_share < 0.3
    assert simulations["standard"].low_precision_share == 0
    assert all(result.loads_LR.sum() == held_out.sum() for result in simulations.values())
    assert all((result.layer_s_SL > 0).all() for result in simulations.values())


def test_a_recorded_trace_comes_one_step_at_a_time() -> None:
    trace = trace_of([7, 0, 2, 12])
    chosen_S = np.array([0, 2, 3])
    together = trace.counts(3)[chosen_S]
    np.testing.assert_array_equal(np.stack(list(trace.steps(chosen_S, 3))), together)
    in_turns = replace(trace, sequence_N=np.arange(21) % 5)
    np.testing.assert_array_equal(np.stack(list(in_turns.steps(chosen_S, 3))), in_turns.counts(3)[chosen_S])
    placement = place(stats_of(together.sum(axis=2)), 3, strategy="eplb")
    seen = []
    result = simulate(
        make_strategy("eplb"), placement, trace.steps(chosen_S, 3), "bf16", on_step=lambda: seen.append(1)
    )
    assert result.imbalance_SL.shape == (3, 2)
    assert len(seen) == 3
    np.testing.assert_array_equal(result.loads_LR.sum(axis=1), together.sum(axis=(0, 2, 3)))


def test_a_thousand_ranks() -> None:
    counts_SLE = np.random.default_rng(0).integers(0, 900, (2, 1, 256))
    placement = place(stats_of(counts_SLE), 1024, 1000, strategy="eplb", num_redundant_experts=768)
    result = simulate(make_strategy("eplb"), placement, counts_SLE, "bf16")
    assert result.loads_LR.shape == (1, 1024)
    assert result.imbalances.mean() == pytest.approx(placement.certificate["predicted"])
