"""The split of one step: as good as the linear program, and assigned to sources without losing a pair."""

import numpy as np
import pytest

from rq_ep.core.errors import UserError
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.core.topology import Topology
from rq_ep.solver.split.min_max_split import ByExpert, split, split_steps
from rq_ep.solver.split.source_split import in_source_order, nearest_first
from tests.solver.instances import best_maximum, random_replicas, skewed


def loads_R(by_expert: ByExpert, quotas_C: np.ndarray) -> np.ndarray:
    loads = np.zeros(by_expert.num_ranks, np.int64)
    np.add.at(loads, by_expert.ranks_C, quotas_C)
    return loads


def sums_E(by_expert: ByExpert, pairs_C: np.ndarray) -> np.ndarray:
    return np.add.reduceat(pairs_C, by_expert.first_E[:-1], axis=-1)


@pytest.mark.parametrize("num_pairs", [7, 300, 10**5, 10**10])
@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "num_extra"), [(4, 2, 1), (16, 4, 5), (16, 4, 40), (64, 8, 20), (12, 16, 30)]
)
def test_the_fullest_rank_is_the_optimum_rounded_up(
    num_experts: int, num_ranks: int, num_extra: int, num_pairs: int
) -> None:
    for seed in range(4):
        replicas = random_replicas(num_experts, num_ranks, num_extra, seed)
        totals_E = skewed(num_experts, num_pairs, seed)[0]
        by_expert = ByExpert.of(replicas, num_ranks)
        best = split(by_expert, totals_E)
        assert (best.quotas_C >= 0).all()
        np.testing.assert_array_equal(sums_E(by_expert, best.quotas_C), totals_E)
        loads = loads_R(by_expert, best.quotas_C)
        assert loads.max() == best.fullest
        optimum = best_maximum(replicas, totals_E, num_ranks)
        assert best.fullest == pytest.approx(optimum, rel=1e-7, abs=1)
        assert best.fullest >= optimum * (1 - 1e-9)
        assert best.fullest == -(-int(loads[list(best.cut)].sum()) // len(best.cut))  # the cut proves it


def test_a_chain_of_full_ranks_is_followed_to_its_end() -> None:
    # Rank r shares expert r with rank r + 1. Perfect balance pushes every shared expert to its second rank whole.
    chain = [Replica(rank, expert, "a") for expert in range(7) for rank in (expert, expert + 1)]
    by_expert = ByExpert.of(Replicas.of([*chain, Replica(0, 7, "a")]), 8)
    best = split(by_expert, np.full(8, 300))
    assert best.fullest == 300
    assert best.quotas_C.tolist() == [0, 300] * 7 + [300]


def test_without_pairs_there_is_nothing_to_split() -> None:
    by_expert = ByExpert.of(random_replicas(6, 3, 4, seed=0), 3)
    best = split(by_expert, np.zeros(6, np.int64))
    assert best.fullest == 0
    assert not best.quotas_C.any()


def test_many_steps_are_split_as_one_by_one() -> None:
    by_expert = ByExpert.of(random_replicas(64, 8, 20, seed=1), 8)
    totals_SE = skewed(64, 10**5, seed=2, num_steps=20)
    totals_SE[3] = 0
    fullest_S, _, cuts_SR = split_steps(totals_SE, by_expert.first_E, by_expert.ranks_C, 8)
    for totals_E, fullest, cut_R in zip(totals_SE, fullest_S.tolist(), cuts_SR, strict=True):
        best = split(by_expert, totals_E)
        assert (best.fullest, best.cut) == (fullest, tuple(np.flatnonzero(cut_R).tolist()))
    assert len({tuple(cut_R) for cut_R in cuts_SR}) > 1


def test_sources_fill_their_own_replicas_first_then_those_of_their_node() -> None:
    replicas = Replicas.of(Replica(rank, 0, "a") for rank in (0, 1, 3))
    by_expert = ByExpert.of(replicas, 4)
    counts_RE = np.array([[10], [0], [6], [4]])
    quotas_C = np.array([4, 8, 8])
    pairs_RP = nearest_first(by_expert, counts_RE, quotas_C, Topology(4, ranks_per_node=2))
    expected = [[4, 6, 0], [0, 0, 0], [0, 2, 4], [0, 0, 4]]  # rank 2 fills rank 3's replica, next door, before rank 1's
    np.testing.assert_array_equal(pairs_RP, expected)
    one_node_RP = nearest_first(by_expert, counts_RE, quotas_C, Topology(4))
    np.testing.assert_array_equal(one_node_RP, [[4, 6, 0], [0, 0, 0], [0, 2, 4], [0, 0, 4]])


@pytest.mark.parametrize("ranks_per_node", [0, 2, 3])
def test_assigning_sources_keeps_quotas_and_counts(ranks_per_node: int) -> None:
    for seed in range(20):
        replicas = random_replicas(12, 6, 20, seed)
        by_expert = ByExpert.of(replicas, 6)
        counts_RE = np.stack([skewed(12, 500, seed * 10 + rank)[0] for rank in range(6)])
        quotas_C = split(by_expert, counts_RE.sum(axis=0)).quotas_C
        given_RE = counts_RE.copy()
        for pairs_RP in (
            nearest_first(by_expert, counts_RE, quotas_C, Topology(6, ranks_per_node)),
            in_source_order(by_expert, counts_RE, quotas_C),
        ):
            pairs_RC = pairs_RP[:, by_expert.replicas_C]
            assert (pairs_RC >= 0).all()
            np.testing.assert_array_equal(pairs_RC.sum(axis=0), quotas_C)
            np.testing.assert_array_equal(sums_E(by_expert, pairs_RC), counts_RE)
        np.testing.assert_array_equal(counts_RE, given_RE)


def test_more_stays_at_home_than_in_source_order() -> None:
    replicas = random_replicas(16, 4, 20, seed=3)
    by_expert = ByExpert.of(replicas, 4)
    counts_RE = np.stack([skewed(16, 400, rank)[0] for rank in range(4)])
    quotas_C = split(by_expert, counts_RE.sum(axis=0)).quotas_C
    ranks_C, here = by_expert.ranks_C, by_expert.replicas_C
    local = nearest_first(by_expert, counts_RE, quotas_C, Topology(4))[ranks_C, here].sum()
    in_order = in_source_order(by_expert, counts_RE, quotas_C)[ranks_C, here].sum()
    assert local == np.minimum(counts_RE[ranks_C, by_expert.experts_C], quotas_C).sum()
    assert local > in_order


def test_counts_of_another_layer_are_refused() -> None:
    replicas = random_replicas(6, 3, 4, seed=0)
    by_expert = ByExpert.of(replicas, 3)
    quotas_C = np.zeros(len(replicas), np.int64)
    with pytest.raises(UserError, match="counts of 5 experts: the placement has 6"):
        split(by_expert, np.zeros(5, np.int64))
    with pytest.raises(UserError, match="expert 2 has -7 pairs"):
        split(by_expert, np.array([1, 2, -7, 3, 4, 5]))
    with pytest.raises(UserError, match=r"counts of shape \(2, 6\): the placement has 3 ranks and 6 experts"):
        nearest_first(by_expert, np.zeros((2, 6), np.int64), quotas_C, Topology(3))
    with pytest.raises(UserError, match="a replica on rank 2: there are 2 ranks"):
        ByExpert.of(replicas, 2)


def test_any_memory_order_and_integer_type_will_do() -> None:
    by_expert = ByExpert.of(random_replicas(16, 4, 20, seed=3), 4)
    counts_RE = np.stack([skewed(16, 400, rank)[0] for rank in range(4)])
    best = split(by_expert, counts_RE.sum(axis=0))
    frozen_RE = np.asfortranarray(counts_RE).astype(np.int32)
    frozen_RE.flags.writeable = False
    assert split(by_expert, frozen_RE.sum(axis=0, dtype=np.int32)).fullest == best.fullest
    np.testing.assert_array_equal(
        nearest_first(by_expert, frozen_RE, best.quotas_C, Topology(4)),
        nearest_first(by_expert, counts_RE, best.quotas_C, Topology(4)),
    )
