"""Few pairs: each expert on one replica, and the reading spread over the ranks."""

import numpy as np
import pytest

from rq_ep.core.cost import LayerCost
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.core.topology import Topology
from rq_ep.solver.split.min_max_split import ByExpert
from rq_ep.solver.split.one_rank_per_expert import route_to_one_rank
from rq_ep.strategies import make_strategy
from rq_ep.strategies.rq import StaticPlanner

# Reading an expert takes as long as computing 100 pairs.
COST = LayerCost({"bf16": 1.0}, {"bf16": 100.0}, {"bf16": 1000.0}, row_s=0.0)
HELD = [
    Replica(0, 0, "bf16"),
    Replica(0, 1, "bf16"),
    Replica(1, 1, "bf16"),
    Replica(0, 2, "bf16"),
    Replica(1, 2, "bf16"),
]


def test_each_expert_is_read_once_by_the_rank_that_ends_earliest() -> None:
    by_expert = ByExpert.of(Replicas.of(HELD), 2)
    quotas_C = route_to_one_rank(by_expert, np.array([1, 8, 5]), np.full(5, 100.0))
    # Rank 0 reads expert 0. Rank 1 takes the larger of the others; then both have read one, and rank 0 has fewer pairs.
    assert quotas_C.tolist() == [1, 0, 8, 5, 0]
    assert route_to_one_rank(by_expert, np.array([0, 0, 3]), np.full(5, 100.0)).tolist() == [0, 0, 0, 3, 0]
    assert not route_to_one_rank(by_expert, np.zeros(3, np.int64), np.full(5, 100.0)).any()


def test_small_steps_are_bound_by_bytes_and_large_ones_by_pairs() -> None:
    layer = LayerPlacement.even(0, 3, HELD)
    planner = StaticPlanner.of(layer, Topology(2), COST)
    choices = {factor: planner.choose(np.array([[1, 8, 5], [0, 0, 0]]) * factor) for factor in (1, 1000)}
    assert [choice.waits_for_weights for choice in choices.values()] == [True, False]
    plans = {factor: choice.plan for factor, choice in choices.items()}
    assert COST.compute_s_R(plans[1]).tolist() == [200, 100]
    assert plans[1].pairs_RP.sum(axis=0).tolist() == [1, 0, 5, 8, 0]
    assert plans[1000].loads_R.tolist() == [7000, 7000]
    without_cost = StaticPlanner.of(layer, Topology(2), None)
    assert not without_cost.choose(np.array([[1, 8, 5], [0, 0, 0]])).waits_for_weights


@pytest.mark.parametrize("seed", range(20))
def test_never_longer_than_the_split_of_pairs_and_every_pair_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    num_ranks, num_experts = int(random.integers(2, 6)), int(random.integers(2, 20))
    held = [
        Replica(rank, expert, "bf16")
        for expert in range(num_experts)
        for rank in random.permutation(num_ranks)[: random.integers(1, 4)].tolist()
    ]
    layer = LayerPlacement.even(0, num_experts, held)
    counts_RE = random.integers(0, 10 ** random.integers(1, 4), (num_ranks, num_experts)) * random.integers(
        0, 2, num_experts
    )
    topology = Topology(num_ranks)
    waits_for_weights = StaticPlanner.of(layer, topology, COST).choose(counts_RE).waits_for_weights
    for name in ("rq", "rq_llep"):
        plan = make_strategy(name).planner(layer, topology, COST)(counts_RE)
        static = make_strategy("rq").planner(layer, topology)(counts_RE)
        assert COST.step(plan).layer_s <= COST.step(static).layer_s
        for expert in range(num_experts):
            here_P = plan.replicas.experts_P == expert
            np.testing.assert_array_equal(plan.pairs_RP[:, here_P].sum(axis=1), counts_RE[:, expert])
            if waits_for_weights:
                assert np.count_nonzero(plan.pairs_RP[:, here_P].sum(axis=0)) == min(1, counts_RE[:, expert].sum())
