"""Equal slots under the even split: never worse than the start, equal to trying everything, groups kept on nodes."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.core.rules import Rules, Selection
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.solver.objective.calibration_steps import LayerSteps
from rq_ep.solver.search.slots.equal_slots import check_slots, place_slots
from rq_ep.solver.search.slots.slot_search import even_imbalance, improve_slots
from rq_ep.strategies.eplb import Eplb
from tests.solver.instances import skewed


def problem(counts_SLE: IntArray, num_ranks: int, num_extra: int = 0, **limits: object) -> PlacementProblem:
    ranks_per_node = int(limits.pop("ranks_per_node", 0))  # type: ignore[call-overload]
    groups = limits.pop("expert_groups", None)
    stats = ExpertStats(counts_SLE, ("bf16",), "bf16", {"bf16": 1000}, top_k=2, expert_groups=groups)  # type: ignore[arg-type]
    topology = Topology(num_ranks, ranks_per_node)
    return PlacementProblem(stats, topology, num_redundant_experts=num_extra, **limits)  # type: ignore[arg-type]


def eplb(case: PlacementProblem) -> tuple[LayerPlacement, ...]:
    return Eplb().place(case).layers


def correlated(num_experts: int, num_steps: int, num_layers: int, seed: int) -> IntArray:
    """[S, L, E] counts where every step makes one of three sets of experts busy: means alone do not show it."""
    generator = np.random.default_rng(seed)
    busy = generator.integers(3, size=(num_layers, num_experts))
    popularity = np.where(busy == generator.integers(3, size=num_steps)[:, None, None], 8.0, 1.0)
    popularity *= np.exp(0.5 * generator.standard_normal((num_layers, num_experts)))
    return generator.poisson(40 * popularity)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), num_ranks=st.integers(1, 5), per_rank=st.integers(1, 4), more=st.integers(0, 2))
def test_no_start_is_made_worse(seed: int, num_ranks: int, per_rank: int, more: int) -> None:
    num_experts = num_ranks * per_rank
    num_extra = num_ranks * min(more, num_experts - per_rank)
    counts_SE = skewed(num_experts, 500, seed, num_steps=9)
    case = problem(counts_SE[:, None], num_ranks, num_extra)
    start = eplb(case)
    steps = LayerSteps(counts_SE, num_ranks)
    placed = place_slots(case, Eplb(), start, max_moves=200)
    slots_RJ = placed.layers[0].replicas.experts_P.reshape(num_ranks, check_slots(case))
    assert (np.diff(slots_RJ, axis=1) > 0).all(), "sorted, so no rank holds an expert twice"
    after, before = (
        even_imbalance(steps, table.reshape(num_ranks, -1)) for table in (slots_RJ, start[0].replicas.experts_P)
    )
    assert after <= before + 1e-9
    assert placed.certificate["searched_from"] == pytest.approx(before, abs=1e-4)
    assert placed.layers[0].predicted == pytest.approx(after, rel=0.03)  # of whole pairs
    assert placed.certificate["bound"] == pytest.approx(placed.layers[0].bound)
    shares_P, copies_E = placed.layers[0].shares_P, np.bincount(slots_RJ.ravel())
    np.testing.assert_allclose(shares_P, 1 / copies_E[slots_RJ.ravel()])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_extra", [0, 3])
def test_small_layers_come_close_to_the_best_of_all_placements(seed: int, num_extra: int) -> None:
    num_experts, num_ranks = 6, 3
    counts_SE = correlated(num_experts, 6, 1, seed)[:, 0]
    steps = LayerSteps(counts_SE, num_ranks)
    per_rank = (num_experts + num_extra) // num_ranks
    best = np.inf
    held_by_rank = [held for held in product((False, True), repeat=num_experts) if sum(held) == per_rank]
    for held_RE in product(held_by_rank, repeat=num_ranks):
        if np.any(held_RE, axis=0).all():
            best = min(best, even_imbalance(steps, np.nonzero(held_RE)[1].reshape(num_ranks, -1)))
    case = problem(counts_SE[:, None], num_ranks, num_extra)
    placed = place_slots(case, Eplb(), eplb(case), max_moves=2000)
    imbalance = even_imbalance(steps, placed.layers[0].replicas.experts_P.reshape(num_ranks, -1))
    assert best - 1e-9 <= imbalance <= 1.03 * best


def test_workers_do_not_change_a_bit_of_the_answer(tmp_path: Path) -> None:
    case = problem(correlated(16, 32, 3, seed=1), 4, 4)
    for number in (1, 2):
        place_slots(replace(case, num_workers=number), Eplb(), eplb(case), max_moves=500).save(
            tmp_path / f"{number}.json"
        )
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_experts_busy_together_part_where_means_say_nothing() -> None:
    counts_SLE = correlated(32, 96, 2, seed=0)
    case = problem(counts_SLE[:48], 8, 8)
    start = eplb(case)
    placed = place_slots(case, Eplb(), start, max_moves=3000)
    for at, (layer, before) in enumerate(zip(placed.layers, start, strict=True)):
        held_out = LayerSteps(counts_SLE[48:, at], 8)
        after, mean_only = (even_imbalance(held_out, one.replicas.experts_P.reshape(8, -1)) for one in (layer, before))
        assert after < 1 + 0.8 * (mean_only - 1)


def test_same_seed_same_bits() -> None:
    case = problem(correlated(16, 20, 2, seed=1), 4, 4, seed=7)
    once, again = (place_slots(case, Eplb(), eplb(case), max_moves=500) for _ in range(2))
    assert [layer.replicas.experts_P.tolist() for layer in once.layers] == [
        layer.replicas.experts_P.tolist() for layer in again.layers
    ]
    assert once.certificate == again.certificate


def test_plain_python_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from rq_ep.solver.search.slots import slot_search as slots

    steps = LayerSteps(correlated(12, 10, 1, seed=2)[:, 0], 4)
    slots_RJ = np.arange(12).reshape(4, 3)
    slots_RJ = np.concatenate([slots_RJ, (slots_RJ[:, :1] + 3) % 12], axis=1)  # one expert of the next rank besides
    draws_A3 = np.random.default_rng(0).random((120, 3))
    compiled = improve_slots(steps, slots_RJ, np.ones((12, 4), bool), draws_A3)
    for name, function in vars(slots).copy().items():
        if hasattr(function, "py_func"):
            monkeypatch.setattr(slots, name, function.py_func)
    plain = improve_slots(steps, slots_RJ, np.ones((12, 4), bool), draws_A3)
    np.testing.assert_array_equal(plain, compiled)
    assert (plain != slots_RJ).any()


def test_whole_groups_stay_on_their_nodes() -> None:
    counts_SLE = correlated(16, 20, 2, seed=3)
    limits = {"ranks_per_node": 2, "expert_groups": 4, "rules": Rules(whole_groups=True)}
    case = problem(counts_SLE, 4, 4, **limits)
    placed = place_slots(case, Eplb(), eplb(case), max_moves=500)
    assert placed.certificate["predicted"] < placed.certificate["searched_from"]
    for layer in placed.layers:
        nodes_P = layer.replicas.ranks_P // 2
        for group in range(4):
            assert len(set(nodes_P[layer.replicas.experts_P // 4 == group].tolist())) == 1


def test_a_layer_without_load_and_a_time_limit_keep_the_start() -> None:
    counts_SLE = correlated(8, 6, 2, seed=4)
    counts_SLE[:, 0] = 0
    case = problem(counts_SLE, 4, 4)
    start = eplb(case)
    placed = place_slots(case, Eplb(), start, max_moves=300)
    assert placed.layers[0].predicted == 1.0
    assert list(placed.layers[0].replicas) == list(start[0].replicas)
    hurried = place_slots(problem(counts_SLE, 4, 4, time_limit_s=0), Eplb(), start)
    assert [list(layer.replicas) for layer in hurried.layers] == [list(layer.replicas) for layer in start]


def test_numbers_that_do_not_divide_are_told_with_ones_that_do() -> None:
    assert check_slots(problem(skewed(8, 100, 0)[:, None], 4, 4)) == 3
    with pytest.raises(UserError, match=r"10 slots, not a multiple of 4 ranks: 0 or 4 would do"):
        check_slots(problem(skewed(8, 100, 0)[:, None], 4, 2))
    with pytest.raises(UserError, match=r"12 slots on a rank for 8 experts.*24 at most"):
        check_slots(problem(skewed(8, 100, 0)[:, None], 4, 40))


def test_uneven_starts_and_foreign_limits_are_refused_by_name() -> None:
    counts_SLE = skewed(4, 100, 0)[:, None]
    uneven = [Replica(0, 0, "bf16"), Replica(0, 1, "bf16"), Replica(0, 2, "bf16"), Replica(1, 3, "bf16")]
    start = (LayerPlacement.even(0, 4, uneven),)
    with pytest.raises(UserError, match="layer 0: 1 to 3 slots on a rank"):
        place_slots(problem(counts_SLE, 2), Eplb(), start)
    for limits, name in (
        ({"objective": "decode"}, "--objective decode"),
        ({"tail_weight": 0.5}, "--tail-weight 0.5"),
        ({"move_price": 1.0}, "--move-price 1"),
        ({"rules": Rules(forbidden=(Selection(ranks=(1,)),))}, "--rules"),
    ):
        case = problem(counts_SLE, 2, **limits)
        with pytest.raises(UserError, match=name):
            place_slots(case, Eplb(), start)
