"""Balance seen through sets of ranks: equal to the split, cheap to price, and complete after refining."""

import numpy as np
import pytest

from rq_ep.solver.cuts import MAX_RANKS_ENUMERATED, LayerBalance, starting_sets
from rq_ep.solver.steps import LayerSteps
from tests.solver.instances import best_maximum, random_replicas, skewed


def balance_of(num_experts: int, num_ranks: int, num_extra: int, seed: int) -> LayerBalance:
    replicas = random_replicas(num_experts, num_ranks, num_extra, seed)
    held_ER = np.zeros((num_experts, num_ranks), bool)
    held_ER[replicas.experts_P, replicas.ranks_P] = True
    steps = LayerSteps(skewed(num_experts, 10**6, seed, num_steps=6), num_ranks)
    return LayerBalance(steps, held_ER, starting_sets(num_ranks))


def optimum(balance: LayerBalance) -> float:
    """Mean over steps of the best split's max/mean, by HiGHS."""
    num_ranks = balance.steps.num_ranks
    from rq_ep.solver.tables import replicas_of

    replicas = replicas_of(balance.held_ER)
    ratios = [
        best_maximum(replicas, totals_E, num_ranks) * num_ranks / totals_E.sum() for totals_E in balance.steps.counts_SE
    ]
    return float(np.mean(ratios))


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 7])
def test_the_worst_set_of_ranks_says_what_the_best_split_attains(num_ranks: int) -> None:
    assert num_ranks <= MAX_RANKS_ENUMERATED
    for seed in range(5):
        balance = balance_of(12, num_ranks, 2 * (num_ranks - 1), seed)
        assert balance.is_exact
        assert balance.imbalance == pytest.approx(optimum(balance), rel=1e-6)


def test_beyond_enumeration_refining_reaches_the_exact_value() -> None:
    balance = balance_of(24, MAX_RANKS_ENUMERATED + 4, 14, seed=2)
    assert not balance.is_exact
    before = balance.imbalance
    exact = balance.refine()
    assert exact == pytest.approx(optimum(balance), rel=1e-3)
    assert before <= exact
    assert balance.imbalance == pytest.approx(exact, rel=2e-3)


def test_a_change_is_priced_as_it_turns_out() -> None:
    balance = balance_of(12, 4, 5, seed=0)
    held_2R = np.array([[True, False, True, False], [False, True, False, False]])
    priced = balance.imbalance_with([3, 7], held_2R)
    assert priced != pytest.approx(balance.imbalance)
    balance.hold([3, 7], held_2R)
    assert balance.imbalance == pytest.approx(priced)
    rebuilt = LayerBalance(balance.steps, balance.held_ER.copy(), balance.sets_GR)
    assert rebuilt.imbalance == pytest.approx(priced)


def test_the_largest_gain_is_a_replica_of_the_hot_expert_on_an_idle_rank() -> None:
    counts_SE = np.tile([500, 100, 100, 100, 100, 20], (3, 1))
    held_ER = np.eye(3, dtype=bool)[[0, 0, 1, 1, 2, 2]]
    balance = LayerBalance(LayerSteps(counts_SE, 3), held_ER, starting_sets(3))
    gains_ER = balance.gains_ER(np.full(6, 1000.0))
    assert np.unravel_index(gains_ER.argmax(), gains_ER.shape) == (0, 2)
    assert not gains_ER[held_ER].any()
    # A byte that buys twice as much is worth twice as much.
    np.testing.assert_allclose(balance.gains_ER(np.full(6, 500.0)), 2 * gains_ER)


def test_no_steps_no_gains() -> None:
    balance = LayerBalance(
        LayerSteps(np.zeros((0, 4), np.int64), 2), np.eye(2, dtype=bool)[[0, 0, 1, 1]], starting_sets(2)
    )
    assert balance.imbalance == balance.refine() == 1.0
    assert not balance.gains_ER(np.ones(4)).any()
