"""Local search: never worse, always inside the limits, the same with numba and without."""

import subprocess
import sys

import numpy as np
import pytest

from rq_ep.solver.search.layer_state import LayerSplit
from rq_ep.solver.search.local_search import improve, tail_weighted_mean
from rq_ep.solver.search.neighborhood import LayerLimits
from tests.solver.instances import no_limits, random_held, skewed


def layer_of(num_experts: int, num_ranks: int, seed: int, num_steps: int = 8) -> LayerSplit:
    counts_SE = skewed(num_experts, 10**5, seed, num_steps)
    loads_SE = counts_SE * (num_ranks / counts_SE.sum(axis=1, keepdims=True))
    return LayerSplit.of(loads_SE, random_held(num_experts, num_ranks, num_ranks, seed))


def improved(layer: LayerSplit, limits: LayerLimits, tail_weight: float = 0.0, num_moves: int = 2000) -> LayerSplit:
    return improve(layer, limits, tail_weight, num_moves, np.random.default_rng(0), lambda: False)


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(16, 4), (40, 12)])
def test_gets_better_inside_the_bytes(num_experts: int, num_ranks: int) -> None:
    for seed in range(3):
        layer = layer_of(num_experts, num_ranks, seed)
        bytes_E = np.where(np.arange(num_experts) % 3 == 0, 5, 10)
        free_R = np.full(num_ranks, 7)
        limits = no_limits(num_experts, num_ranks)._replace(bytes_E=bytes_E, free_R=free_R)
        total_R = free_R + bytes_E @ layer.held_ER
        before = layer.value
        after = improved(layer, limits)
        assert after.value < before - 0.05
        assert (limits.free_R >= 0).all()
        np.testing.assert_array_equal(bytes_E @ after.held_ER + limits.free_R, total_R)
        assert after.held_ER.any(axis=1).all()
        again = improved(layer_of(num_experts, num_ranks, seed), limits._replace(free_R=np.full(num_ranks, 7)))
        np.testing.assert_array_equal(again.held_ER, after.held_ER)


@pytest.mark.parametrize("num_ranks", [6, 12])
def test_ejection_chains_come_to_free_bytes(num_ranks: int) -> None:
    bytes_E = np.where(np.arange(24) % 3 == 0, 5, 10)
    num_more = 0
    for seed in range(4):
        layer = layer_of(24, num_ranks, seed, num_steps=2)
        free_R = np.where(np.arange(num_ranks) % 2 == 0, 12, 2)
        limits = no_limits(24, num_ranks)._replace(bytes_E=bytes_E, free_R=free_R.copy())
        before_ER = layer.held_ER
        after = improved(layer, limits)
        num_more += int(after.held_ER.sum() - before_ER.sum())
        assert (limits.free_R >= 0).all()
        np.testing.assert_array_equal(bytes_E @ after.held_ER + limits.free_R, bytes_E @ before_ER + free_R)
        anew = LayerSplit.of(after.loads_SE, after.held_ER)
        np.testing.assert_allclose(after.values_S, anew.values_S, atol=1e-4)
    assert num_more > 0


@pytest.mark.parametrize(("num_ranks", "num_steps"), [(6, 8), (12, 8), (6, 2), (12, 2)])
def test_keeps_the_rules(num_ranks: int, num_steps: int) -> None:
    layer = layer_of(24, num_ranks, 1, num_steps)
    before_ER = layer.held_ER
    generator = np.random.default_rng(1)
    fixed_ER = before_ER & (generator.random(before_ER.shape) < 0.3)
    allowed_ER = before_ER | (generator.random(before_ER.shape) < 0.5)
    limits = no_limits(24, num_ranks)._replace(fixed_ER=fixed_ER, allowed_ER=allowed_ER)
    after_ER = improved(layer, limits).held_ER
    assert (after_ER != before_ER).any()
    assert after_ER[fixed_ER].all()
    assert not after_ER[~allowed_ER].any()


@pytest.mark.parametrize("num_ranks", [6, 12])
def test_replicas_stay_apart(num_ranks: int) -> None:
    nodes_R = np.arange(num_ranks) % 3
    loads_SE = layer_of(24, num_ranks, seed=2).loads_SE
    held_ER = np.eye(num_ranks, dtype=bool)[np.arange(24) % num_ranks]
    held_ER[::2] |= np.roll(held_ER[::2], 1, axis=1)
    limits = no_limits(24, num_ranks)._replace(nodes_R=nodes_R, num_nodes=3)
    after_ER = improved(LayerSplit.of(loads_SE, held_ER), limits).held_ER
    assert (after_ER != held_ER).any()
    on_node_EH = after_ER @ (nodes_R[:, None] == np.arange(3)).astype(np.int64)
    assert (on_node_EH.max(axis=1) <= -(-after_ER.sum(axis=1) // 3)).all()


@pytest.mark.parametrize("num_ranks", [6, 12])
def test_moving_has_a_price_and_a_cap(num_ranks: int) -> None:
    before_ER = layer_of(24, num_ranks, seed=3).held_ER

    def moved(price: float, num_bytes: int) -> int:
        limits = no_limits(24, num_ranks)._replace(present_ER=before_ER, price=price, move_budget=np.array([num_bytes]))
        after_ER = improved(layer_of(24, num_ranks, seed=3), limits).held_ER
        count = int((after_ER & ~before_ER).sum())
        assert limits.move_budget[0] == num_bytes - count
        return count

    assert moved(10.0, 10**6) == 0
    assert 0 < moved(0.02, 10**6) < moved(0.0, 10**6)
    assert 0 < moved(0.0, 3) <= 3


@pytest.mark.parametrize("num_ranks", [6, 12])
def test_what_was_moved_and_relieves_less_than_it_costs_is_dropped(num_ranks: int) -> None:
    layer = layer_of(24, num_ranks, seed=3)
    before_ER, load_E = layer.held_ER, layer.loads_SE.mean(axis=0)
    emptiest_first = np.argsort(layer.loads_SR.mean(axis=0))
    lightest, heaviest = int(load_E.argmin()), int(load_E.argmax())
    useless, useful = (
        (expert, next(int(rank) for rank in emptiest_first if not before_ER[expert, rank]))
        for expert in (lightest, heaviest)
    )
    held_ER = before_ER.copy()
    held_ER[useless] = held_ER[useful] = True
    nothing_left = {"free_R": np.zeros(num_ranks, np.int64), "move_budget": np.array([0])}
    limits = no_limits(24, num_ranks)._replace(present_ER=before_ER, price=0.02, **nothing_left)
    after_ER = improved(LayerSplit.of(layer.loads_SE, held_ER), limits, num_moves=0).held_ER
    np.testing.assert_array_equal(np.argwhere(after_ER & ~before_ER), [useful])
    assert limits.move_budget[0] == limits.free_R[useless[1]] == 1
    free = limits._replace(price=0.0)
    np.testing.assert_array_equal(improved(LayerSplit.of(layer.loads_SE, held_ER), free, num_moves=0).held_ER, held_ER)


def test_the_tail_can_count() -> None:
    values_S = np.arange(20) / 10 + 1
    assert tail_weighted_mean(values_S, 0.0) == pytest.approx(1.95)
    assert tail_weighted_mean(values_S, 1.0) == pytest.approx(2.85)
    assert tail_weighted_mean(values_S, 0.5) == pytest.approx(2.4)
    values = {weight: improved(layer_of(24, 6, seed=4), no_limits(24, 6), weight).values_S for weight in (0.0, 1.0)}
    assert values[1.0].max() <= values[0.0].max()


PLAIN = """
import sys
if sys.argv[1] == "plain":
    sys.modules["numba"] = None
from tests.solver.search.test_local_search import improved, layer_of, no_limits
for num_ranks in (4, 10):
    print(improved(layer_of(12, num_ranks, 0), no_limits(12, num_ranks), num_moves=60).held_ER.nonzero())
"""


@pytest.mark.slow
def test_without_numba_the_same() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", PLAIN, how], capture_output=True, text=True, timeout=120, check=True)
        for how in ("plain", "compiled")
    ]
    assert runs[0].stdout == runs[1].stdout != ""
