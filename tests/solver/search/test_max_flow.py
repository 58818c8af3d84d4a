"""The split kept up to date: as good as the linear program, from any split before."""

import itertools

import numpy as np
import pytest

from rq_ep.core.replicas import Replicas
from rq_ep.solver.search.layer_growth import Growth
from rq_ep.solver.search.layer_state import LayerSplit
from rq_ep.solver.search.neighborhood import LayerLimits
from tests.solver.instances import best_maximum, no_limits, random_held, skewed


def optimum_S(layer: LayerSplit) -> list[float]:
    replicas = Replicas.from_mask(layer.held_ER)
    return [best_maximum(replicas, loads_E, layer.loads_SR.shape[1]) for loads_E in layer.loads_SE]


def loads_of(num_experts: int, num_ranks: int, seed: int) -> np.ndarray:
    counts_SE = skewed(num_experts, 10**5, seed, num_steps=4)
    return counts_SE * (num_ranks / counts_SE.sum(axis=1, keepdims=True))


@pytest.mark.parametrize(("num_experts", "num_ranks", "num_extra"), [(4, 2, 1), (16, 4, 9), (64, 8, 20), (24, 16, 40)])
def test_the_fullest_rank_is_the_optimum(num_experts: int, num_ranks: int, num_extra: int) -> None:
    for seed in range(3):
        held_ER = random_held(num_experts, num_ranks, num_extra, seed)
        layer = LayerSplit.of(loads_of(num_experts, num_ranks, seed), held_ER)
        np.testing.assert_allclose(layer.values_S, optimum_S(layer), atol=3e-5)
        np.testing.assert_allclose(layer.loads_SR.max(axis=1), layer.values_S, atol=3e-5)
        of_expert_PE = layer.index.experts_P[:, None] == np.arange(num_experts)
        np.testing.assert_allclose(layer.quotas_SP @ of_expert_PE, layer.loads_SE, atol=1e-9)
        assert (layer.quotas_SP >= 0).all()


def test_another_replica_is_worth_what_it_gains() -> None:
    layer = LayerSplit.of(loads_of(16, 4, seed=0), random_held(16, 4, 2, seed=0))
    limits = no_limits(16, 4)
    before = layer.value
    growth = Growth.of(layer, limits)
    (best,) = growth.coming
    assert best.gain > 0
    assert not layer.held_ER[best.expert, best.rank]
    layer = growth.grown([[best]], limits).layer.optimized()
    np.testing.assert_allclose(layer.values_S, optimum_S(layer), atol=3e-5)
    assert layer.value < before


def test_the_hot_expert_goes_to_the_idle_rank() -> None:
    counts_SE = np.tile([500, 100, 100, 100, 100, 20], (3, 1))
    layer = LayerSplit.of(counts_SE * (3 / 920), np.eye(3, dtype=bool)[[0, 0, 1, 1, 2, 2]])
    plain = no_limits(6, 3)
    (best,) = Growth.of(layer, plain).coming
    assert best[1:] == (0, 2)
    # A byte that buys twice as much is worth twice as much.
    (dearer,) = Growth.of(layer, plain).best(plain._replace(bytes_E=plain.bytes_E * 2))
    assert dearer.gain == pytest.approx(best.gain / 2)


def test_with_many_ranks_some_at_a_time() -> None:
    num_ranks = 192
    counts_SE = np.tile(np.where(np.arange(64) % 16 == 0, 100, 1), (2, 1))
    loads_SE = counts_SE * (num_ranks / counts_SE.sum(axis=1, keepdims=True))
    layer = LayerSplit.of(loads_SE, np.eye(num_ranks, dtype=bool)[:64])
    limits = no_limits(64, num_ranks)
    growth = Growth.of(layer, limits, at_once=3)
    additions = growth.coming
    assert len(additions) == 3
    assert len({one.rank for one in additions}) == len({one.expert for one in additions}) == 3
    assert all(one.gain >= other.gain for one, other in itertools.pairwise(additions))
    layer = growth.grown([additions], limits).layer.optimized()
    np.testing.assert_allclose(layer.values_S, optimum_S(layer), rtol=3e-5)


@pytest.mark.parametrize("what", ["bytes", "rules", "nodes", "move budget"])
def test_no_replica_where_none_may_be(what: str) -> None:
    layer = LayerSplit.of(loads_of(6, 3, seed=1), np.eye(3, dtype=bool)[[0, 0, 1, 1, 2, 2]])
    limits = no_limits(6, 3)
    none: dict[str, LayerLimits] = {
        "bytes": limits._replace(free_R=np.zeros(3, np.int64)),
        "rules": limits._replace(allowed_ER=np.zeros((6, 3), bool)),
        "move budget": limits._replace(present_ER=np.zeros((6, 3), bool), move_budget=np.zeros(1, np.int64)),
        "nodes": limits._replace(nodes_R=np.array([0, 0, 0]), num_nodes=2),
    }
    assert Growth.of(layer, limits).coming
    assert not Growth.of(layer, none[what]).coming
    assert not Growth.of(layer, limits).best(none[what])
