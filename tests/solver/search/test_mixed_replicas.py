"""Placements that mix formats: inside every limit, never worse than without, and certified as they are served."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.rules import Rules, Selection
from rq_ep.solver.objective.calibration_steps import calibration_steps
from rq_ep.strategies import make_strategy
from tests.solver.instances import problem, skewed

pytestmark = pytest.mark.slow


def recorded(num_experts: int = 16, num_layers: int = 2, seed: int = 0) -> np.ndarray:
    return np.stack([skewed(num_experts, 4000, seed + layer, 20) for layer in range(num_layers)], axis=1)


def placed(instance: PlacementProblem) -> Placement:
    return make_strategy("rq", max_moves=300).place(instance)


def mixing(placement: Placement) -> int:
    return sum(len(layer.replicas.mixing_experts) for layer in placement.layers)


def with_room_for_low_replicas() -> PlacementProblem:
    """Two layers with one expert a little hotter; ranks have room for an int8 replica, and no expert fits the cap."""
    popularity_E = np.array([0.16, *[0.12] * 7])
    counts_SLE = np.random.default_rng(0).multinomial(4000, popularity_E, (20, 2))
    return problem(counts_SLE, 4, (4504,) * 4, max_low_precision_share=0.055, mixed_replicas=True)


MIXES = with_room_for_low_replicas()


def test_mixing_pays_here_and_keeps_to_bytes_and_cap() -> None:
    mixed, uniform = placed(MIXES), placed(replace(MIXES, mixed_replicas=False))
    assert mixing(mixed) > 0
    assert not mixing(uniform)
    certificate = mixed.certificate
    assert certificate["predicted"] < uniform.certificate["predicted"] == certificate["predicted_unmixed"]
    assert certificate["mixed_replicas"]["experts"] == mixing(mixed)
    assert mixed.low_precision_planned <= mixed.low_precision_cap == 0.055
    assert mixed.low_precision_planned <= certificate["mixed_replicas"]["low_share_at_most"]
    assert max(mixed.bytes_R) <= MIXES.budget_bytes_R[0]
    assert certificate["bound"] <= certificate["predicted"]
    pairs_LE = MIXES.stats.counts.sum(axis=0)
    of_mixing = sum(
        int(pairs_E[list(layer.replicas.mixing_experts)].sum())
        for layer, pairs_E in zip(mixed.layers, pairs_LE, strict=True)
    )
    assert certificate["mixed_replicas"]["low_share_at_most"] == pytest.approx(of_mixing / 2 / pairs_LE.sum())


def test_the_certificate_is_what_the_planner_does() -> None:
    placement = placed(MIXES)
    by_format: Counter[str] = Counter()
    low_pairs = 0.0
    for at, (layer, steps) in enumerate(zip(placement.layers, calibration_steps(MIXES, 64), strict=True)):
        planner = make_strategy("rq").planner(layer, placement.topology)
        pairs_P, ratios = np.zeros(len(layer.replicas), np.int64), []
        for totals_E in steps.counts_SE:
            counts_RE = np.zeros((4, 8), np.int64)
            counts_RE[at] = totals_E
            plan = planner(counts_RE)
            pairs_P += plan.pairs_RP.sum(axis=0)
            ratios.append(plan.loads_R.max() * 4 / totals_E.sum())
        assert layer.predicted == pytest.approx(np.mean(ratios))
        totals_E = np.bincount(layer.replicas.experts_P, pairs_P)
        np.testing.assert_allclose(layer.shares_P * totals_E[layer.replicas.experts_P], pairs_P)
        low_pairs += pairs_P[np.array(layer.replicas.formats_P) == "int8"].sum()
        by_format.update(layer.replicas.formats_P)
    assert placement.low_precision_planned == pytest.approx(low_pairs / MIXES.stats.counts.sum())
    assert placement.certificate["replicas_by_format"] == dict(by_format)


def test_the_same_twice(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for name in ("one", "two"):
        placed(MIXES).save(tmp_path / name)
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()
    again = Placement.load(tmp_path / "one")
    assert [layer.replicas.mixing_experts for layer in again.layers] == [
        layer.replicas.mixing_experts for layer in placed(MIXES).layers
    ]


@pytest.mark.parametrize(("seed", "share"), [(0, 0.05), (1, 0.1), (2, 0.25)])
def test_never_worse_than_without(seed: int, share: float) -> None:
    instance = problem(recorded(seed=seed), 4, max_low_precision_share=share, mixed_replicas=True)
    mixed, uniform = placed(instance), placed(replace(instance, mixed_replicas=False))
    assert mixed.certificate["predicted"] <= uniform.certificate["predicted"]
    assert mixed.low_precision_planned <= share
    assert max(mixed.bytes_R) <= instance.budget_bytes_R[0]


def test_the_cap_on_errors_counts_low_replicas_by_what_they_compute() -> None:
    error = np.zeros((2, 8, 2))
    error[:, :, 1] = 0.05
    stats = replace(MIXES.stats, error=error)
    free = placed(replace(MIXES, stats=stats))
    predicted = 0.05 * free.low_precision_planned  # every pair matters alike
    same = placed(replace(MIXES, stats=stats, max_error=predicted * 1.01))
    less = placed(replace(MIXES, stats=stats, max_error=predicted * 0.99))
    assert [layer.replicas.mixing_experts for layer in same.layers] == [
        layer.replicas.mixing_experts for layer in free.layers
    ]
    assert less.low_precision_planned < free.low_precision_planned


def test_rules_hold_for_low_replicas() -> None:
    rules = Rules(
        forbidden=(Selection(experts=(0,), ranks=(0, 1)),), fixed=(Selection(layers=(0,), experts=(7,), ranks=(2,)),)
    )
    placement = placed(replace(MIXES, rules=rules))
    assert mixing(placement) > 0
    for layer in placement.layers:
        assert not set(layer.replicas.ranks_P[layer.replicas.experts_P == 0].tolist()) & {0, 1}
    first = placement.layers[0].replicas
    assert 2 in first.ranks_P[first.experts_P == 7]


def test_an_expert_that_calibration_never_visited_keeps_its_bits() -> None:
    assert any(0 in layer.replicas.mixing_experts for layer in placed(MIXES).layers)
    visits = np.ones((2, 8), np.int64)
    visits[:, 0] = 0
    placement = placed(replace(MIXES, stats=replace(MIXES.stats, visits=visits)))
    assert not any(0 in layer.replicas.mixing_experts for layer in placement.layers)


def test_loads_that_need_nothing_are_left_alone() -> None:
    even = problem(np.full((20, 2, 16), 50), 4, mixed_replicas=True)
    placement = placed(even)
    assert not mixing(placement)
    assert "mixed_replicas" not in placement.certificate
    assert placement.certificate["predicted_unmixed"] == placement.certificate["predicted"]
    nobody = problem(np.zeros((3, 2, 8), np.int64), 4, mixed_replicas=True)
    assert not mixing(placed(nobody))
