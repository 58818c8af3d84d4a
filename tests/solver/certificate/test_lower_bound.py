"""The lower bound: never above what some placement attains, and right where the answer is known."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import rq_ep.solver.certificate.lower_bound as bounds_module
from rq_ep.core.arrays import IntArray
from rq_ep.core.replicas import Replicas
from rq_ep.solver.certificate.lower_bound import Bound, least_first_replica_bytes, lower_bound
from rq_ep.solver.certificate.relaxation import BoundLimits
from rq_ep.solver.objective.calibration_steps import LayerSteps
from rq_ep.solver.objective.step_balance import ExactSplit
from tests.solver.instances import skewed


def limits(num_ranks: int, max_bytes: int | None, max_low_pairs: float = 0.0, low_bytes: int = 504) -> BoundLimits:
    return BoundLimits(num_ranks, num_ranks, 1000, low_bytes, max_bytes, max_low_pairs)


def native(num_ranks: int, max_replicas: int) -> BoundLimits:
    return limits(num_ranks, max_replicas * 1000, low_bytes=1000)


def bound(counts: list[IntArray], within: BoundLimits, **notes: IntArray) -> Bound:
    steps = [LayerSteps(counts_SE, within.num_ranks) for counts_SE in counts]
    return lower_bound(steps, np.stack([counts_SE.sum(axis=0) for counts_SE in counts]), within, **notes)


def best_placement(counts_SE: IntArray, within: BoundLimits) -> float:
    """The least mean of max/mean over all placements inside the limits, by enumeration."""
    num_experts, num_ranks = counts_SE.shape[1], within.num_ranks
    sets = [np.array(ranks, bool) for ranks in product([0, 1], repeat=num_ranks) if any(ranks)]
    best, exact = float(num_ranks), ExactSplit(num_ranks)
    for low in product([0, 1], repeat=num_experts):
        low_E = np.array(low, bool)
        if counts_SE.sum(axis=0)[low_E].sum() > within.max_low_pairs:
            continue
        size_E = np.where(low_E, within.low_bytes, within.native_bytes)
        for rows in product(sets, repeat=num_experts):
            held_ER = np.stack(rows)
            if within.max_bytes is None or (held_ER.sum(axis=1) @ size_E) <= within.max_bytes:
                best = min(best, float(exact.balance(Replicas.from_mask(held_ER), counts_SE).ratio_S.mean()))
    return best


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("max_bytes", "cap"), [(4000, 0.0), (4000, 0.3), (4600, 0.3), (5000, 0.1), (5300, 0.5)])
def test_no_placement_beats_the_bound(seed: int, max_bytes: int, cap: float) -> None:
    counts_SE = skewed(4, 6000, seed, num_steps=3)
    within = limits(3, max_bytes, cap * float(counts_SE.sum()))
    least = bound([counts_SE], within)
    assert 1 <= least.value <= best_placement(counts_SE, within) + 1e-9


def test_what_binds() -> None:
    even = np.full((2, 8), 10)
    assert bound([even], native(4, 8)) == (1.0, "mean")
    hot = np.array([[700, 100, 100, 100]])
    assert bound([hot], native(4, 4)) == (pytest.approx(2.8), "hot expert")
    assert bound([hot], native(4, 5)) == (pytest.approx(1.4), "bytes")
    assert bound([hot], native(4, 6)) == (1.0, "mean")
    assert bound([hot], limits(4, None), most_LE=np.array([[2, 4, 4, 4]])) == (
        pytest.approx(1.4),
        "replicas",
    )


def test_low_replicas_of_the_hot_expert_count_against_the_cap() -> None:
    hot = np.array([[700, 100, 100, 100]])
    assert bound([hot], limits(4, 4000, 100)) == (pytest.approx(2.8), "hot expert")
    assert bound([hot], limits(4, 4000, 300)).value < 2.8, "three low experts make room for a native replica"
    assert bound([hot], limits(4, 5000, 700)).value < bound([hot], limits(4, 5000, 0)).value
    assert bound([hot], limits(4, 4000, 1000)) == (1.0, "mean"), "everything low: twice the replicas"
    mixed = replace(limits(4, 4000, 100), mixes=True)
    assert bound([hot], mixed).value <= bound([hot], limits(4, 4000, 100)).value


def test_layers_share_what_there_is() -> None:
    hot, even = np.array([[700, 100, 100, 100]]), np.full((1, 4), 250)
    assert bound([hot, even], native(4, 8)).value == pytest.approx((2.8 + 1) / 2)
    assert bound([hot, even], native(4, 10)) == (1.0, "mean")


def test_many_layers_are_bound_by_prices_nearly_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [skewed(24, 4000, seed, num_steps=6) for seed in range(6)]
    within = limits(12, 6 * 26 * 1000, 0.05 * sum(float(counts_SE.sum()) for counts_SE in counts))
    joint = bound(counts, within)
    monkeypatch.setattr(bounds_module, "MAX_ROWS", 100)
    priced = bound(counts, within)
    assert joint.binding == priced.binding == "bytes"
    assert joint.value - 0.05 <= priced.value <= joint.value + 1e-9


def test_out_of_time_the_mean_is_the_bound() -> None:
    hot, within = np.array([[700, 100, 100, 100]]), native(4, 5)
    assert lower_bound([LayerSteps(hot, 4)], hot, within, is_over=lambda: True) == (1.0, "time")
    assert bound([hot], within).value > 1.3


def test_ranks_without_room_leave_the_work_to_the_others() -> None:
    even = np.full((1, 4), 100)
    assert bound([even], replace(native(4, 8), num_usable=2)) == (2.0, "mean")


def test_whole_pairs_cannot_be_halved() -> None:
    assert bound([np.array([[1, 1, 1]])], native(2, 6)).value == pytest.approx(4 / 3)


def test_no_steps() -> None:
    assert bound([np.zeros((0, 4), np.int64)], native(2, 4)) == (1.0, "mean")


def test_first_replicas_bytes_count_the_coldest_experts_as_low() -> None:
    pairs_LE = np.array([[50, 30, 15, 5]])
    assert least_first_replica_bytes(pairs_LE, limits(2, None, 20)) == 4 * 1000 - 2 * 496
    assert least_first_replica_bytes(pairs_LE, limits(2, None, 19)) == 4 * 1000 - 496
    assert least_first_replica_bytes(pairs_LE, limits(2, None, 20, low_bytes=1000)) == 4000
