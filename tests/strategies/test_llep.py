"""LLEP: the plan against the paper's scenarios and against its rules, one by one."""

import numpy as np
import pytest

from rq_ep.core.cost import LayerCost, LayerShape
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.plan import DispatchPlan, WeightTransfer, imbalance
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.costs import MACHINES
from rq_ep.strategies import make_strategy
from rq_ep.strategies.llep import Llep, Segment, assign

NUM_RANKS = 8


def contiguous(num_experts: int, num_ranks: int) -> Placement:
    stats = ExpertStats.uniform((0,), num_experts, {"bf16": 10}, "bf16")
    return Llep().place(PlacementProblem(stats, Topology(num_ranks)))


def planned(strategy: Llep, counts_RE: np.ndarray) -> DispatchPlan:
    num_ranks, num_experts = counts_RE.shape
    layer = contiguous(num_experts, num_ranks).layers[0]
    return strategy.planner(layer, Topology(num_ranks))(counts_RE)


def scenario(num_experts: int, pairs: int, percent: int, num_hot: int) -> np.ndarray:
    """[R, E] exact expected counts: `percent` of the pairs on the first `num_hot` experts, all of them on rank 0."""
    hot, num_cold = round(pairs * percent / 100), num_experts - num_hot
    totals = [hot // num_hot + (e < hot % num_hot) for e in range(num_hot)]
    totals += [(pairs - hot) // num_cold + (e < (pairs - hot) % num_cold) for e in range(num_cold)]
    totals_E = np.array(totals)
    return np.stack([totals_E // NUM_RANKS + (r < totals_E % NUM_RANKS) for r in range(NUM_RANKS)])


SCENARIOS = {
    "gpt-oss-120b": (128, 4, 32768, {16: [16, 18, 20, 20], 4: [10] * 4, 1: [7] * 4}),
    "DeepSeek-V3": (256, 8, 16384, {16: [18, 20, 20, 20], 4: [10] * 4, 1: [7] * 4}),
    "Kimi-K2": (384, 8, 16384, {16: [19, 20, 20, 20], 4: [10] * 4, 1: [7] * 4}),
}


@pytest.mark.parametrize("model", SCENARIOS)
def test_the_published_scenarios(model: str) -> None:
    num_experts, top_k, tokens, transfers = SCENARIOS[model]
    pairs = NUM_RANKS * tokens * top_k
    for num_hot, expected in transfers.items():
        plans = [planned(Llep(), scenario(num_experts, pairs, percent, num_hot)) for percent in (30, 50, 80, 95)]
        assert [len(plan.transfers) for plan in plans] == expected
        assert all(imbalance(plan.loads_R) == pytest.approx(1, abs=5e-4) for plan in plans)


def test_a_balanced_step_is_standard_ep() -> None:
    counts_RE = np.full((4, 8), 1000)
    plan = planned(Llep(), counts_RE)
    assert not plan.transfers
    np.testing.assert_array_equal(plan.pairs_RP, counts_RE)


def test_the_fallback_compares_ranks_or_where_set_experts() -> None:
    counts_RE = np.full((2, 4), 1000)
    counts_RE[:, 0], counts_RE[:, 1] = 2000, 0  # experts 2.0, ranks 1.0
    assert not planned(Llep(min_tokens_per_gemm=1), counts_RE).transfers
    on_experts = planned(Llep(min_tokens_per_gemm=1, fallback_on="expert", max_tokens_factor=0.9), counts_RE)
    assert on_experts.transfers
    assert planned(Llep(fallback_ratio=1.0, max_tokens_factor=0.9), counts_RE).transfers


def test_three_cases() -> None:
    # Rank 0: expert 0 exceeds what its later natives leave (case 2); rank 1 has room.
    assert assign([60, 30, 10, 0], [0, 0, 1, 1], 2, 50, 1) == {0: [Segment(0, 0, 20), Segment(1, 20, 60)]}
    # The natives still to come already fill the rank (case 3): nothing of the largest expert stays.
    assert assign([40, 35, 35, 0, 0], [0, 0, 0, 1, 2], 3, 36, 1)[0] == [Segment(1, 0, 36), Segment(2, 36, 40)]
    # Everything fits (case 1).
    assert assign([10, 10], [0, 1], 2, 10, 1) == {}


def test_helpers_with_little_room_are_passed_over_unless_the_rest_fits() -> None:
    # Capacity 50; rank 1 has 40 free, rank 2 has 20 free.
    loads, homes = [90, 10, 30], [0, 1, 2]
    assert assign(loads, homes, 3, 50, 1)[0] == [Segment(0, 0, 50), Segment(1, 50, 90)]
    loads = [110, 10, 30]
    assert assign(loads, homes, 3, 50, 15)[0] == [Segment(0, 0, 50), Segment(1, 50, 90), Segment(2, 90, 110)]
    # 45 of capacity leave 65 to spill; both helpers have less than 36 of room, so the emptiest takes all (forced).
    assert assign(loads, homes, 3, 45, 36)[0] == [Segment(0, 0, 45), Segment(1, 45, 110)]


def test_a_small_excess_is_spilled_all_the_same() -> None:
    # Algorithm 3 as printed: min_chunk only rules out a helper's room, not a small rest.
    assert assign([53, 47], [0, 1], 2, 50, 1024) == {0: [Segment(0, 0, 50), Segment(1, 50, 53)]}


def test_a_small_excess_stays_home_where_set() -> None:
    assert assign([53, 47], [0, 1], 2, 50, 4, keep_small_excess=True) == {}
    moved = {0: [Segment(0, 0, 50), Segment(1, 50, 53)]}
    assert assign([53, 47], [0, 1], 2, 50, 3, keep_small_excess=True) == moved
    counts_RE = np.array([[53, 0], [0, 47]])
    knobs = {"min_tokens_per_gemm": 4, "fallback_ratio": 1.0}
    assert planned(Llep(**knobs), counts_RE).transfers
    assert not planned(Llep(**knobs, keep_small_excess=True), counts_RE).transfers


def test_a_rank_borrows_no_more_than_it_makes_room_for() -> None:
    # Rank 0 has to give away two experts; with room for one on each of the others, the third expert stays.
    loads, homes = [40, 40, 40, 0, 0], [0, 0, 0, 1, 2]
    assert assign(loads, homes, 3, 40, 1, max_borrowed=1) == {0: [Segment(1, 0, 40)], 1: [Segment(2, 0, 40)]}
    assert assign(loads, [0, 0, 0, 1, 1], 2, 20, 1, max_borrowed=1) == {
        0: [Segment(1, 0, 20), Segment(1, 20, 40)],  # in two chunks, but one expert
        1: [Segment(0, 0, 40)],
        2: [Segment(0, 0, 40)],
    }
    assert assign(loads, homes, 3, 40, 1, max_borrowed=0)[0] == [Segment(0, 0, 40)]
    counts_RE = scenario(64, 32768, 95, 16)
    most = np.bincount([transfer.dst for transfer in planned(Llep(min_tokens_per_gemm=1), counts_RE).transfers]).max()
    for max_borrowed in range(most + 1):
        plan = planned(Llep(min_tokens_per_gemm=1, max_borrowed=max_borrowed), counts_RE)
        borrowed_R = np.bincount([transfer.dst for transfer in plan.transfers], minlength=NUM_RANKS)
        assert borrowed_R.max() == max_borrowed
        np.testing.assert_array_equal(plan.pairs_RP.sum(axis=1), counts_RE.sum(axis=1))
        assert (imbalance(plan.loads_R) == pytest.approx(1, abs=0.01)) == (max_borrowed == most)


def test_auto_breaks_even() -> None:
    # An expert travels for as long as 100 pairs compute, 20 more with the latency: above an excess of 120 it pays.
    cost = LayerCost({"bf16": 0.5}, {"bf16": 0.0}, {"bf16": 50.0}, row_s=0.0, latency_s=10.0)
    layer = contiguous(2, 2).layers[0]
    strategy = Llep(min_tokens_per_gemm="auto", fallback_ratio="auto")
    planner = strategy.planner(layer, Topology(2), cost)
    for excess, mean in ((119, 200), (121, 200), (119, 5000), (121, 5000)):
        plan = planner(np.array([[mean + excess, 0], [0, mean - excess]]))
        assert bool(plan.transfers) == (excess > 120)
    for name in ("min_tokens_per_gemm", "fallback_ratio"):
        with pytest.raises(UserError, match=f"{name} auto: needs the cost of the layer"):
            Llep(**{name: "auto"}).planner(layer, Topology(4))
    assert not Llep(fallback_ratio="auto").planner(layer, Topology(2), cost)(np.zeros((2, 2), np.int64)).transfers


def test_auto_tries_the_break_even_chunk_and_the_default_one() -> None:
    # Three small chunks balance perfectly; no rank has room for 1024, so each expert that spills moves to one rank.
    layer = contiguous(4, 4).layers[0]
    counts_RE = np.zeros((4, 4), np.int64)
    counts_RE[0] = [600, 240, 240, 120]
    loads = {}
    for transfer_s in (50.0, 10.0):
        cost = LayerCost({"bf16": 0.5}, {"bf16": 0.0}, {"bf16": transfer_s}, row_s=0.0, latency_s=10.0)
        planner = Llep(min_tokens_per_gemm="auto").planner(layer, Topology(4), cost)
        loads[transfer_s] = planner(counts_RE).loads_R.tolist()
    assert loads == {50.0: [300, 360, 240, 300], 10.0: [300, 300, 300, 300]}


@pytest.mark.parametrize("tokens", [64, 1024, 16384])
def test_auto_is_never_modelled_to_be_longer_than_the_defaults_or_standard_ep(tokens: int) -> None:
    cost = MACHINES["h200"].layer(LayerShape(2880, 2880, {"bf16": 2 * 3 * 2880**2}))
    layer = contiguous(128, NUM_RANKS).layers[0]
    settings = ({"min_tokens_per_gemm": "auto", "fallback_ratio": "auto"}, {}, {"fallback_ratio": 8.0})
    planners = [Llep(**knobs).planner(layer, Topology(NUM_RANKS), cost) for knobs in settings]
    for percent in (1, 15, 20, 30, 50, 80, 95):
        for num_hot in (16, 4, 1):
            counts_RE = scenario(128, NUM_RANKS * tokens * 4, percent, num_hot)
            auto, *others = (cost.step(planner(counts_RE)).layer_s for planner in planners)
            assert auto <= min(others)


def test_intervals_are_rank_major() -> None:
    counts_RE = np.array([[6, 0], [6, 0]])
    plan = planned(Llep(min_tokens_per_gemm=1), counts_RE)
    assert plan.transfers == (WeightTransfer(expert=0, src=0, dst=1, format="bf16"),)
    assert [tuple(replica) for replica in plan.replicas] == [(0, 0, "bf16"), (1, 0, "bf16"), (1, 1, "bf16")]
    assert plan.pairs_RP.tolist() == [[6, 0, 0], [0, 6, 0]]


def test_one_borrowed_replica_however_many_segments() -> None:
    # Capacity 60: the helper takes a chunk of 60, and then the forced rest.
    segments = assign([400, 0], [0, 1], 2, 60, 50)[0]
    assert segments == [Segment(0, 0, 60), Segment(1, 60, 120), Segment(1, 120, 400)]
    plan = planned(Llep(max_tokens_factor=0.3, min_tokens_per_gemm=50), np.array([[300, 0], [100, 0]]))
    assert plan.transfers == (WeightTransfer(0, 0, 1, "bf16"),)
    assert plan.pairs_RP.tolist() == [[60, 240, 0], [0, 100, 0]]


def test_a_replica_that_is_there_is_not_sent() -> None:
    layer = LayerPlacement.even(0, 2, [Replica(0, 0, "bf16"), Replica(1, 0, "bf16"), Replica(1, 1, "bf16")])
    plan = Llep(min_tokens_per_gemm=1).planner(layer, Topology(2))(np.array([[10, 0], [10, 0]]))
    assert not plan.transfers
    assert plan.pairs_RP.tolist() == [[10, 0, 0], [0, 10, 0]]


def test_one_rank_lends_to_none() -> None:
    plan = planned(Llep(max_tokens_factor=0.5, fallback_ratio=0.0), np.array([[7, 3]]))
    assert not plan.transfers
    assert plan.pairs_RP.tolist() == [[7, 3]]


@pytest.mark.parametrize(
    "knobs",
    [
        {"max_tokens_factor": 0.0},
        {"max_borrowed": -1},
        {"min_tokens_per_gemm": -1},
        {"fallback_on": "layer"},
        {"keep_small_excess": 1},
        {"fallback_ratio": "all"},
    ],
    ids=str,
)
def test_bad_settings_are_named(knobs: dict) -> None:
    with pytest.raises(UserError, match=next(iter(knobs))):
        make_strategy("llep", **knobs)
