"""Ruin and recreate over layers: it improves a greedy beginning inside every limit, and never makes it worse."""

from dataclasses import replace

import numpy as np
import pytest

import rq_ep.solver.search.ruin_recreate as ruin_recreate_module
from rq_ep.core.rules import Rules, Selection
from rq_ep.core.topology import Topology
from rq_ep.solver.objective.calibration_steps import calibration_steps
from rq_ep.solver.search.ruin_recreate import ruin_and_recreate
from rq_ep.solver.search.search_state import SearchContext, SearchState, Solution
from tests.solver.instances import problem, skewed

NUM_EXPERTS, NUM_RANKS, NUM_LAYERS = 8, 4, 3


def state_of(apart: int = 1, **limits: object) -> SearchState:
    """A state whose first layer has every expert twice, `apart` ranks from each other, and leaves others no bytes."""
    counts_SLE = np.stack([skewed(NUM_EXPERTS, 4000, seed, 12) for seed in range(NUM_LAYERS)], axis=1)
    once_ER = np.arange(NUM_EXPERTS)[:, None] % NUM_RANKS == np.arange(NUM_RANKS)
    held_LER = np.stack([once_ER] * NUM_LAYERS)
    held_LER[0] |= np.roll(once_ER, apart, axis=1)
    budget = tuple((1000 * held_LER.sum(axis=(0, 1))).tolist())
    limited = replace(problem(counts_SLE, NUM_RANKS, budget, ("bf16",)), **limits)  # type: ignore[arg-type]
    initial = Solution(held_LER, np.zeros(held_LER.shape[:2], np.int64))
    return SearchState(SearchContext.of(limited, 0, None), calibration_steps(limited, 12), initial)


def test_layers_get_what_they_need_of_the_bytes() -> None:
    state, before = state_of(), state_of()
    reported: list[float] = []
    ruin_and_recreate(state, reported.append)
    assert state.value < before.value - 0.1
    assert [len(layer.index.ranks_P) for layer in before.layers] == [16, 8, 8]
    assert min(len(layer.index.ranks_P) for layer in state.layers) > 8
    assert (state.free_R >= 0).all()
    np.testing.assert_array_equal(1000 * state.held_LER.sum(axis=(0, 1)) + state.free_R, [8000] * NUM_RANKS)
    assert state.held_LER.any(axis=2).all()
    assert reported == sorted(reported)
    again = state_of()
    ruin_and_recreate(again, lambda fraction: None)
    np.testing.assert_array_equal(again.held_LER, state.held_LER)


def test_an_iteration_that_does_not_gain_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of()
    before = state.held_LER, state.free_R.copy(), state.limits[0].move_budget.copy(), state.value
    monkeypatch.setattr(ruin_recreate_module, "LEAST_GAIN", 10.0)
    ruin_and_recreate(state, lambda fraction: None)
    np.testing.assert_array_equal(state.held_LER, before[0])
    np.testing.assert_array_equal(state.free_R, before[1])
    np.testing.assert_array_equal(state.limits[0].move_budget, before[2])
    assert state.value == pytest.approx(before[3], abs=1e-4)


def test_rules_hold() -> None:
    state = state_of(rules=Rules(fixed=(Selection(layers=(0,), experts=(0, 4), ranks=(0, 1)),)))
    ruin_and_recreate(state, lambda fraction: None)
    assert state.held_LER[0, [0, 4], :2].all()
    spread = state_of(apart=2, topology=Topology(NUM_RANKS, 2), rules=Rules(spread_nodes=True))
    before_LER = spread.held_LER
    ruin_and_recreate(spread, lambda fraction: None)
    assert (spread.held_LER != before_LER).any()
    on_node_LEH = spread.held_LER.reshape(NUM_LAYERS, NUM_EXPERTS, 2, 2).sum(axis=3)
    assert (on_node_LEH.max(axis=2) <= -(-on_node_LEH.sum(axis=2) // 2)).all()


def test_moves_are_counted() -> None:
    state = state_of()
    before_LER, move_budget = state.held_LER, np.array([3000])
    state.limits = [
        limits._replace(present_ER=held_ER, move_budget=move_budget)
        for limits, held_ER in zip(state.limits, before_LER, strict=True)
    ]
    ruin_and_recreate(state, lambda fraction: None)
    moved = int((state.held_LER & ~before_LER).sum())
    assert 0 < moved <= 3
    assert move_budget[0] == 3000 - 1000 * moved


def test_large_problems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    state, before = state_of(), state_of()
    monkeypatch.setattr(ruin_recreate_module, "MAX_WORK", 12 * NUM_EXPERTS * NUM_RANKS)  # of one layer
    ruin_and_recreate(state, lambda fraction: None)
    np.testing.assert_array_equal(state.held_LER, before.held_LER)
