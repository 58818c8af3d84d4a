"""Trades between layers: they even out what a greedy beginning gave, inside every limit, and never make it worse."""

from dataclasses import replace

import numpy as np
import pytest

import rq_ep.solver.search.ruin_recreate as trade_module
from rq_ep.core.rules import Rules, Selection
from rq_ep.core.topology import Topology
from rq_ep.solver.objective.calibration_steps import calibration_steps
from rq_ep.solver.search.ruin_recreate import trade
from rq_ep.solver.search.search_state import Draft, Ready, Start
from tests.solver.instances import problem, skewed

NUM_EXPERTS, NUM_RANKS, NUM_LAYERS = 8, 4, 3


def drafted(apart: int = 1, **wishes: object) -> Draft:
    """A draft whose first layer has every expert twice, `apart` ranks from each other, and leaves others no bytes."""
    counts_SLE = np.stack([skewed(NUM_EXPERTS, 4000, seed, 12) for seed in range(NUM_LAYERS)], axis=1)
    once_ER = np.arange(NUM_EXPERTS)[:, None] % NUM_RANKS == np.arange(NUM_RANKS)
    held_LER = np.stack([once_ER] * NUM_LAYERS)
    held_LER[0] |= np.roll(once_ER, apart, axis=1)
    budget = tuple((1000 * held_LER.sum(axis=(0, 1))).tolist())
    asked = replace(problem(counts_SLE, NUM_RANKS, budget, ("bf16",)), **wishes)  # type: ignore[arg-type]
    start = Start(held_LER, np.zeros(held_LER.shape[:2], bool))
    return Draft(Ready.of(asked, 0, None), calibration_steps(asked, 12), start)


def test_layers_get_what_they_need_of_the_bytes() -> None:
    draft, before = drafted(), drafted()
    done: list[float] = []
    trade(draft, done.append)
    assert draft.value < before.value - 0.1
    assert [len(layer.index.ranks_P) for layer in before.layers] == [16, 8, 8]
    assert min(len(layer.index.ranks_P) for layer in draft.layers) > 8
    assert (draft.free_R >= 0).all()
    np.testing.assert_array_equal(1000 * draft.held_LER.sum(axis=(0, 1)) + draft.free_R, [8000] * NUM_RANKS)
    assert draft.held_LER.any(axis=2).all()
    assert done == sorted(done)
    again = drafted()
    trade(again, lambda fraction: None)
    np.testing.assert_array_equal(again.held_LER, draft.held_LER)


def test_what_does_not_pay_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = drafted()
    before = draft.held_LER, draft.free_R.copy(), draft.limits[0].room.copy(), draft.value
    monkeypatch.setattr(trade_module, "LEAST_STEP", 10.0)
    trade(draft, lambda fraction: None)
    np.testing.assert_array_equal(draft.held_LER, before[0])
    np.testing.assert_array_equal(draft.free_R, before[1])
    np.testing.assert_array_equal(draft.limits[0].room, before[2])
    assert draft.value == pytest.approx(before[3], abs=1e-4)


def test_rules_hold() -> None:
    draft = drafted(rules=Rules(fixed=(Selection(layers=(0,), experts=(0, 4), ranks=(0, 1)),)))
    trade(draft, lambda fraction: None)
    assert draft.held_LER[0, [0, 4], :2].all()
    spread = drafted(apart=2, topology=Topology(NUM_RANKS, 2), rules=Rules(spread_nodes=True))
    before_LER = spread.held_LER
    trade(spread, lambda fraction: None)
    assert (spread.held_LER != before_LER).any()
    on_node_LEN = spread.held_LER.reshape(NUM_LAYERS, NUM_EXPERTS, 2, 2).sum(axis=3)
    assert (on_node_LEN.max(axis=2) <= -(-on_node_LEN.sum(axis=2) // 2)).all()


def test_moves_are_counted() -> None:
    draft = drafted()
    before_LER, room = draft.held_LER, np.array([3000])
    draft.limits = [
        limits._replace(present_ER=held_ER, room=room) for limits, held_ER in zip(draft.limits, before_LER, strict=True)
    ]
    trade(draft, lambda fraction: None)
    moved = int((draft.held_LER & ~before_LER).sum())
    assert 0 < moved <= 3
    assert room[0] == 3000 - 1000 * moved


def test_large_problems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    draft, before = drafted(), drafted()
    monkeypatch.setattr(trade_module, "MAX_WORK", 12 * NUM_EXPERTS * NUM_RANKS)  # of one layer
    trade(draft, lambda fraction: None)
    np.testing.assert_array_equal(draft.held_LER, before.held_LER)
