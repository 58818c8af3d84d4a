"""Which experts are stored in few bits follows what their pairs contribute, where no calibration says so."""

import numpy as np

from rq_ep.core.problem import contiguous
from rq_ep.rebalancing.observed_importance import MEMORY, ObservedImportance
from rq_ep.rebalancing.rebalancer import Rebalancer, decide
from rq_ep.solver.certificate.certify import certify
from rq_ep.strategies.rq import ReplicateQuantize
from tests.rebalancing.cases import NUM_EXPERTS, NUM_LAYERS, problem_of, steps_SLE

RQ = ReplicateQuantize(max_moves=200, max_steps=16)


def test_the_mean_of_a_pair_leans_on_the_layers_and_what_is_not_finite_is_left_out() -> None:
    importance = ObservedImportance(2, 3)
    importance.add(0, [0, 1], [800.0, 200.0], [400.0, 400.0])
    assert importance.of_a_pair_LE() is None, "nothing is known of the second layer"
    importance.add(1, [2], [6.0], [2.0])
    importance.add(0, [1, 2], [float("inf"), float("nan")], [5.0, 5.0])
    of_a_pair_LE = importance.of_a_pair_LE()
    assert of_a_pair_LE is not None
    np.testing.assert_allclose(of_a_pair_LE[0], [1.985, 0.515, 1.25], atol=1e-3)
    assert of_a_pair_LE[1].tolist() == [3, 3, 3], "without pairs of its own an expert has the mean"


def test_what_is_old_is_forgotten() -> None:
    importance = ObservedImportance(1, 1)
    for of_a_pair in (1.0, 5.0):
        for _ in range(20):
            importance.add(0, [0], [of_a_pair * MEMORY / 2], [MEMORY / 2])
    of_a_pair_LE = importance.of_a_pair_LE()
    assert of_a_pair_LE is not None
    assert of_a_pair_LE[0, 0] > 4.9


def test_experts_whose_pairs_contribute_least_are_stored_low() -> None:
    counts_SLE = steps_SLE(0, 64, 1)
    problem = problem_of(np.ones((1, NUM_LAYERS, NUM_EXPERTS), np.int64))

    def low(matter_LE: np.ndarray | None) -> set[tuple[int, int]]:
        rebalancer = Rebalancer(problem, RQ, certify(problem, RQ, contiguous(problem)))
        for counts_LE in counts_SLE:
            rebalancer.observe(counts_LE)
        for layer in range(NUM_LAYERS if matter_LE is not None else 0):
            pairs_E = counts_SLE[:, layer].sum(axis=0)
            sums_E = matter_LE[layer] * pairs_E
            rebalancer.importance.add(layer, list(range(NUM_EXPERTS)), sums_E.tolist(), pairs_E.tolist())
        placement = decide(rebalancer.request()).placement
        assert placement is not None
        return {
            (i, one.expert)
            for i, layer in enumerate(placement.layers)
            for one in layer.replicas
            if one.format == "int8"
        }

    pairs_LE = counts_SLE.sum(axis=0)
    by_load = low(None)
    matter_LE = np.ones((NUM_LAYERS, NUM_EXPERTS))
    idlest = set(enumerate(pairs_LE.argmin(axis=1).tolist()))
    matter_LE[tuple(np.transpose(list(idlest)))] = 1000  # few pairs, of great weight
    assert idlest <= by_load
    assert not idlest & low(matter_LE)
