"""A gain is told from chance, also where the load changes within the window."""

import numpy as np

from rq_ep.core.problem import contiguous
from rq_ep.rebalancing.gain import StepMean, gain_of, low_share, planned_and_held_out
from rq_ep.solver.certificate.certify import certify
from rq_ep.strategies.rq import ReplicateQuantize
from tests.rebalancing.cases import problem_of, steps_SLE


def test_halves_are_alternate_blocks_of_all_steps() -> None:
    planned_S, held_out_S = planned_and_held_out(128)
    assert planned_S.tolist()[:6] == [0, 1, 2, 3, 8, 9]
    assert sorted([*planned_S, *held_out_S]) == list(range(128))
    assert [len(half) for half in planned_and_held_out(16)] == [8, 8]
    assert [len(half) for half in planned_and_held_out(0)] == [0, 0]


def test_a_mean_of_noise_is_seldom_above_zero_for_sure() -> None:
    generator = np.random.default_rng(0)
    noise = [StepMean.of(generator.standard_normal(64), np.ones(64)) for _ in range(1000)]
    assert sum(one.surely_exceeds(0.0) for one in noise) <= 10


def test_a_change_within_the_window_is_not_taken_for_noise() -> None:
    value_S = np.where(np.arange(64) < 48, 0.0, 0.2) + 0.01 * np.random.default_rng(0).standard_normal(64)
    assert StepMean.of(value_S, np.ones(64)).surely_exceeds(0.02)


def test_steps_count_by_their_pairs() -> None:
    estimate = StepMean.of(np.array([1.0, 0.0] * 32), np.array([3.0, 1.0] * 32))
    assert estimate.mean == 0.75
    assert StepMean.of(np.ones(4), np.zeros(4)) == (0.0, 0.0)
    assert not StepMean.of(np.ones(1), np.ones(1)).surely_exceeds(0.5), "one block says nothing of chance"


def test_the_gain_of_a_placement_is_the_difference_of_both_imbalances() -> None:
    problem = problem_of(steps_SLE(0, 64, 0))
    strategy = ReplicateQuantize(max_moves=500)
    before, after = certify(problem, strategy, contiguous(problem)), strategy.place(problem)
    gain = gain_of(problem, strategy, before.layers, after.layers)
    np.testing.assert_allclose(gain.estimate.mean, gain.before - gain.after)
    np.testing.assert_allclose(gain.before, before.certificate["predicted"], atol=1e-6)
    assert gain.estimate.surely_exceeds(0.0)
    none = gain_of(problem, strategy, before.layers, before.layers)
    assert none.estimate == (0.0, 0.0)


def test_low_pairs_are_those_of_the_planned_shares() -> None:
    problem = problem_of(steps_SLE(0, 64, 0))
    placement = ReplicateQuantize(max_moves=100).place(problem)
    np.testing.assert_allclose(low_share(problem, placement.layers).mean, placement.low_precision_planned, atol=1e-9)
