"""Balance seen through sets of ranks: equal to the split where all are listed, and cheap to price."""

import numpy as np
import pytest

from rq_ep.solver.objective.calibration_steps import LayerSteps
from rq_ep.solver.search.cuts import (
    MAX_RANKS_ENUMERATED,
    Changes,
    Cuts,
    apply_changes,
    drop_cuts,
    initial_cuts,
    price_changes,
)
from rq_ep.solver.search.layer_state import LayerSplit
from tests.solver.instances import random_held, skewed


def layer_of(num_experts: int, num_ranks: int, num_extra: int, seed: int) -> LayerSplit:
    steps = LayerSteps(skewed(num_experts, 10**6, seed, num_steps=6), num_ranks)
    return LayerSplit.of(steps.loads_SE, random_held(num_experts, num_ranks, num_extra, seed))


def cuts_of(layer: LayerSplit, proofs_SR: np.ndarray | None = None) -> Cuts:
    num_ranks = layer.loads_SR.shape[1]
    if proofs_SR is None:
        proofs_SR = np.zeros((0, num_ranks), bool)
    return initial_cuts(layer.index, layer.loads_SE, num_ranks, proofs_SR)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 7])
def test_the_worst_set_of_ranks_says_what_the_best_split_attains(num_ranks: int) -> None:
    assert num_ranks <= MAX_RANKS_ENUMERATED
    for seed in range(5):
        layer = layer_of(12, num_ranks, 2 * (num_ranks - 1), seed)
        np.testing.assert_allclose(cuts_of(layer).tops_S, layer.values_S, atol=2e-5)


def test_the_sets_that_a_split_returns_prove_it() -> None:
    layer = layer_of(24, MAX_RANKS_ENUMERATED + 4, 14, seed=2)
    assert (cuts_of(layer).tops_S < layer.values_S - 1e-3).any()
    again = LayerSplit.of(layer.loads_SE, layer.held_ER)
    again.quotas_SP[:], again.loads_SR[:] = 0, 0
    again.quotas_SP[:, again.index.by_expert_P[again.index.first_E[:-1]]] = again.loads_SE
    for loads_R, quotas_P in zip(again.loads_SR, again.quotas_SP, strict=True):
        np.add.at(loads_R, again.index.ranks_P, quotas_P)
    cuts_SR = again.optimize()  # from the worst split to the optimum: every step proves it
    np.testing.assert_allclose(again.values_S, layer.values_S, atol=2e-5)
    np.testing.assert_allclose(cuts_of(again, cuts_SR).tops_S, layer.values_S, atol=2e-5)


@pytest.mark.parametrize("num_ranks", [4, 12])
def test_a_change_is_priced_as_it_turns_out(num_ranks: int) -> None:
    layer = layer_of(16, num_ranks, 9, seed=0)
    held_ER = layer.held_ER
    cuts = cuts_of(layer, layer.optimize())
    one, two = 3, 7
    off, on = int(np.flatnonzero(held_ER[one])[0]), int(np.flatnonzero(~held_ER[one])[0])
    added = int(np.flatnonzero(~held_ER[two])[0])
    changes = Changes(np.array([one, two]), np.array([off, -1]), np.array([on, added]))
    priced_S = np.empty_like(layer.values_S)
    price_changes(cuts, changes, priced_S, np.inf)
    apply_changes(cuts, changes)
    np.testing.assert_allclose(cuts.tops_S, priced_S, atol=1e-12)
    held_ER[one, off], held_ER[one, on], held_ER[two, added] = False, True, True
    rebuilt = LayerSplit.of(layer.loads_SE, held_ER)
    num = int(cuts.num[0])
    sets_GR = cuts.outside_RG[:, :num].T == 0
    fresh = cuts_of(rebuilt, sets_GR)
    np.testing.assert_allclose(fresh.tops_S, priced_S, atol=1e-9)
    assert (priced_S <= rebuilt.values_S + 2e-5).all()


@pytest.mark.parametrize("num_ranks", [4, 12])
def test_a_change_is_refused_early_exactly_where_its_mean_reaches_the_limit(num_ranks: int) -> None:
    layer = layer_of(16, num_ranks, 9, seed=0)
    held_ER, cuts = layer.held_ER, cuts_of(layer, layer.optimize())
    generator = np.random.default_rng(0)
    for one, two in (generator.permutation(16)[:2] for _ in range(40)):
        off, on = (int(generator.choice(np.flatnonzero(held_ER[one] == held))) for held in (True, False))
        added = int(generator.choice(np.flatnonzero(~held_ER[two])))
        changes = Changes(np.array([one, two]), np.array([off, -1]), np.array([on, added]))
        priced_S, again_S = np.empty_like(layer.values_S), np.empty_like(layer.values_S)
        assert price_changes(cuts, changes, priced_S, np.inf)
        assert not price_changes(cuts, changes, again_S, priced_S.mean() - 1e-9)
        assert price_changes(cuts, changes, again_S, priced_S.mean() + 1e-9)
        np.testing.assert_array_equal(again_S, priced_S)


def test_of_sets_too_many_those_stay_that_come_close() -> None:
    layer = layer_of(24, 12, 14, seed=1)
    generator = np.random.default_rng(0)
    cuts = cuts_of(layer, np.concatenate([layer.optimize(), generator.random((80, 12)) < 0.5]))
    before, tops_S = int(cuts.num[0]), cuts.tops_S.copy()
    drop_cuts(cuts, 12)
    assert cuts.num[0] == 12 + (before - 12) // 2
    np.testing.assert_array_equal(cuts.tops_S, tops_S)


def test_no_steps() -> None:
    layer = LayerSplit.of(np.zeros((0, 4)), random_held(4, 2, 0, seed=0))
    assert layer.value == 1.0
    assert not len(cuts_of(layer).tops_S)
