"""The lower bound: never above what some placement attains, and right where the answer is known."""

from itertools import product

import numpy as np
import pytest

from rq_ep.solver.bounds import least_home_bytes, lower_bound
from rq_ep.solver.cuts import LayerBalance, starting_sets
from rq_ep.solver.precision import Formats
from rq_ep.solver.steps import LayerSteps
from tests.solver.instances import problem, skewed


def test_no_placement_beats_the_bound() -> None:
    for seed in range(3):
        steps = LayerSteps(skewed(4, 6000, seed, num_steps=4), 3)
        sets = [np.array(ranks, bool) for ranks in product([0, 1], repeat=3) if any(ranks)]
        for max_replicas in (4, 5, 6):
            held = (np.stack(rows) for rows in product(sets, repeat=4) if np.sum(rows) <= max_replicas)
            best = min(LayerBalance(steps, held_ER, starting_sets(3)).imbalance for held_ER in held)
            assert lower_bound([steps], max_replicas, 3).value <= best + 1e-3  # whole pairs: 2000 to a rank


def test_what_binds() -> None:
    even = LayerSteps(np.full((2, 8), 10, np.int64), 4)
    assert lower_bound([even], 8, 4) == (1.0, "mean")
    hot = LayerSteps(np.array([[700, 100, 100, 100]]), 4)
    assert lower_bound([hot], 4, 4) == (pytest.approx(2.8), "hot expert")
    assert lower_bound([hot], 5, 4) == (pytest.approx(1.4), "bytes")
    assert lower_bound([hot], 6, 4) == (1.0, "mean")


def test_layers_share_what_there_is() -> None:
    hot, even = np.array([[700, 100, 100, 100]]), np.full((1, 4), 250)
    layers = [LayerSteps(hot, 4), LayerSteps(even, 4)]
    assert lower_bound(layers, 8, 4).value == pytest.approx((2.8 + 1) / 2)
    assert lower_bound(layers, 10, 4) == (1.0, "mean")


def test_whole_pairs_cannot_be_halved() -> None:
    assert lower_bound([LayerSteps(np.array([[1, 1, 1]]), 2)], 6, 2).value == pytest.approx(4 / 3)


def test_no_steps() -> None:
    assert lower_bound([LayerSteps(np.zeros((0, 4), np.int64), 2)], 4, 2) == (1.0, "mean")


def test_home_bytes_count_the_coldest_experts_as_low() -> None:
    pairs_E = np.array([50, 30, 15, 5])
    both = Formats.of(problem(pairs_E[None, None], 2))
    assert least_home_bytes(pairs_E, both, 0.2) == 4 * 1000 - 2 * 496
    assert least_home_bytes(pairs_E, both, 0.19) == 4 * 1000 - 496
    native = Formats.of(problem(pairs_E[None, None], 2, formats=("bf16",)))
    assert least_home_bytes(pairs_E, native, 0.2) == 4000
