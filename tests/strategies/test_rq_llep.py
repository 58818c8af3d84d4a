"""rq_llep: what moves, what it is worth, and in which format."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.plan import DispatchPlan, WeightTransfer, imbalance
from rq_ep.core.replicas import Replica
from rq_ep.core.topology import Topology
from rq_ep.placing.place import place
from rq_ep.strategies import make_strategy
from tests.strategies.cases import CASES, EXPERT_BYTES, zipf
from tests.strategies.conformance import check_plan
from tests.strategies.test_conformance import layers_and_counts

# One pair takes 1 s anywhere; a bf16 expert travels in 100 s, an int8 one in 50 s.
COST = LayerCost(
    pair_s={"bf16": 1.0, "int8": 1.0},
    stream_s={"bf16": 0.0, "int8": 0.0},
    transfer_s={"bf16": 100.0, "int8": 50.0},
    row_s=0.0,
    latency_s=1.0,
)


def home_layer(num_experts: int, num_ranks: int, format_: str = "bf16") -> LayerPlacement:
    replicas = [Replica(e * num_ranks // num_experts, e, format_) for e in range(num_experts)]
    return LayerPlacement.even(0, num_experts, replicas)


def planned(layer: LayerPlacement, totals: list[int], cost: LayerCost | None = None, **knobs: object) -> DispatchPlan:
    """The plan of a step whose pairs all come from rank 0."""
    num_ranks = int(layer.replicas.ranks_P.max()) + 1
    counts_RE = np.zeros((num_ranks, len(totals)), np.int64)
    counts_RE[0] = totals
    plan = make_strategy("rq_llep", **knobs).planner(layer, Topology(num_ranks), cost)(counts_RE)
    check_plan(plan, layer, counts_RE)
    return plan


def test_an_expert_moves_if_it_saves_more_than_it_takes() -> None:
    # Mean 300: at best the step falls from 600 to 300 s, for a transfer of 101 s.
    plan = planned(home_layer(2, 2), [600, 0], COST)
    assert plan.transfers == (WeightTransfer(0, 0, 1, "bf16"),)
    assert plan.loads_R.tolist() == [300, 300]
    # From 200 to 100 s for 101 s: not worth it. Nor is a gain below a hundredth of the balanced step.
    for pairs, is_worth_it in ((200, False), (204, False), (206, True)):
        assert bool(planned(home_layer(2, 2), [pairs, 0], COST).transfers) == is_worth_it


def test_links_that_idle_pass_the_excess_on() -> None:
    # Three loans by rank 0 would take 300 s. Instead it lends to rank 1, which lends to 2, which lends to 3, in 100 s.
    plan = planned(home_layer(16, 4), [1500] * 4 + [1000] * 12, COST)
    assert [(transfer.expert, transfer.src, transfer.dst) for transfer in plan.transfers] == [
        (0, 0, 1),
        (4, 1, 2),
        (8, 2, 3),
    ]
    assert plan.loads_R.tolist() == [4500] * 4
    assert COST.step(plan).transfer_s_R.max() == 101


def test_no_more_experts_move_than_pay() -> None:
    # Rank 0 sends one after another: the first saves 300 s, each next one less than the 100 s it takes.
    totals = [600, 0, 0, 0]
    assert len(planned(home_layer(4, 4), totals, COST).transfers) == 1
    free = LayerCost(COST.pair_s, COST.stream_s, dict.fromkeys(COST.transfer_s, 1.0), 0.0)
    plan = planned(home_layer(4, 4), totals, free)
    assert len(plan.transfers) == 3
    assert plan.loads_R.tolist() == [150] * 4


def test_static_replicas_pass_on_what_a_borrower_makes_room_for() -> None:
    """Expert 0 is held by ranks 0 and 1, which are both full: one transfer to rank 2 helps both."""
    held = [Replica(0, 0, "bf16"), Replica(1, 0, "bf16"), Replica(1, 1, "bf16"), Replica(2, 2, "bf16")]
    plan = planned(LayerPlacement.even(0, 3, held), [900, 0, 0], min_tokens_per_gemm=1)
    assert [(transfer.expert, transfer.dst) for transfer in plan.transfers] == [(0, 2)]
    assert plan.loads_R.tolist() == [300, 300, 300]


def test_an_expert_that_many_ranks_want_is_handed_on() -> None:
    # Seven transfers by rank 0 would take 700 s, as three rounds they take 300 s and two more latencies.
    plan = planned(home_layer(8, 8), [8000] + [0] * 7, COST)
    assert len(plan.transfers) == 7
    assert {transfer.src for transfer in plan.transfers} == {0, 1, 2, 3}
    assert plan.loads_R.tolist() == [1000] * 8
    assert COST.step(plan).transfer_s_R.max() == 303
    slow = replace(COST, latency_s=250.0)  # that of a round is longer than an expert takes
    assert {transfer.src for transfer in planned(home_layer(8, 8), [16000] + [0] * 7, slow).transfers} == {0}
    assert {transfer.src for transfer in planned(home_layer(8, 8), [16000] + [0] * 7).transfers} == {0}


def test_without_a_cost_the_settings_of_llep_hold_for_what_remains() -> None:
    layer = home_layer(2, 2)
    assert not planned(layer, [640, 360], fallback_ratio=1.3, min_tokens_per_gemm=1).transfers
    assert planned(layer, [660, 340], fallback_ratio=1.3, min_tokens_per_gemm=1).transfers
    assert not planned(layer, [600, 0], min_tokens_per_gemm=301).transfers
    assert planned(layer, [600, 0], min_tokens_per_gemm=300).transfers
    assert not planned(layer, [600, 0], min_tokens_per_gemm=1, max_borrowed=0).transfers


def test_senders_take_turns() -> None:
    held = [Replica(rank, 0, "bf16") for rank in (0, 1)] + [Replica(rank, rank - 1, "bf16") for rank in (2, 3)]
    plan = planned(LayerPlacement.even(0, 3, held), [400, 0, 0], COST)
    assert [(transfer.src, transfer.dst) for transfer in plan.transfers] in ([(0, 2)], [])
    free = LayerCost(COST.pair_s, COST.stream_s, dict.fromkeys(COST.transfer_s, 1.0), 0.0)
    plan = planned(LayerPlacement.even(0, 3, held), [400, 0, 0], free)
    assert [(transfer.src, transfer.dst) for transfer in plan.transfers] == [(0, 2), (1, 3)]


def test_fewer_bits_make_a_smaller_gain_worth_it() -> None:
    layer = home_layer(2, 2)
    assert not planned(layer, [120, 20], COST, max_low_precision_share=1.0).transfers
    assert not planned(layer, [200, 0], COST).transfers
    plan = planned(layer, [200, 0], COST, transient_format="int8", max_low_precision_share=0.5)
    assert plan.transfers == (WeightTransfer(0, 0, 1, "int8"),)
    assert plan.replicas.mixing_experts == (0,)
    assert plan.replicas.mixed_formats == ("int8", "bf16")
    assert [plan.replicas[p].format for p in plan.replicas.by_expert_P.tolist()] == ["int8", "bf16", "bf16"]


def test_above_the_cap_experts_travel_as_they_lie() -> None:
    plan = planned(home_layer(2, 2), [600, 0], COST, transient_format="int8", max_low_precision_share=0.49)
    assert plan.transfers == (WeightTransfer(0, 0, 1, "bf16"),)
    # Pairs that are computed in it anyway count: 100 of 700 by expert 1.
    held = [Replica(0, 0, "bf16"), Replica(1, 1, "int8")]
    layer = LayerPlacement.even(0, 2, held)
    for share, format_ in ((0.49, "bf16"), (0.51, "int8")):
        plan = planned(layer, [600, 100], COST, transient_format="int8", max_low_precision_share=share)
        assert plan.transfers == (WeightTransfer(0, 0, 1, format_),)


def test_an_expert_in_few_bits_stays_in_them() -> None:
    plan = planned(home_layer(2, 2, "int8"), [600, 0], COST, transient_format="int8", max_low_precision_share=0.0)
    assert plan.transfers == (WeightTransfer(0, 0, 1, "int8"),)
    assert not plan.replicas.mixing_experts


def test_where_replicas_suffice_it_is_rq() -> None:
    case = CASES[1]
    placement = make_strategy("rq").place(case.problem())
    for layer in placement.layers:
        rq = make_strategy("rq").planner(layer, placement.topology)(case.counts_RE)
        both = make_strategy("rq_llep").planner(layer, placement.topology)(case.counts_RE)
        assert not both.transfers
        np.testing.assert_array_equal(rq.pairs_RP, both.pairs_RP)


def drifted(num_pairs: int) -> tuple[Placement, np.ndarray]:
    """A placement for one popularity, and the counts of a step with another."""
    random = np.random.default_rng(0)
    stats = CASES[1].problem().stats
    popularity_E = zipf(stats.num_experts, seed=3)
    return place(stats, 4), random.multinomial(num_pairs, popularity_E, size=4)


@pytest.mark.parametrize("num_pairs", [50, 500, 5000, 50_000])
def test_its_modelled_step_is_never_longer_than_that_of_rq(num_pairs: int) -> None:
    placement, counts_RE = drifted(num_pairs)
    layer = placement.layers[0]
    plans = {
        name: make_strategy(name).planner(layer, placement.topology, COST)(counts_RE) for name in ("rq", "rq_llep")
    }
    seconds = {name: COST.step(plan).layer_s for name, plan in plans.items()}
    assert seconds["rq_llep"] <= seconds["rq"]
    if num_pairs >= 5000:
        assert imbalance(plans["rq"].loads_R) > 1.1 > imbalance(plans["rq_llep"].loads_R)
    if num_pairs == 50:
        assert not plans["rq_llep"].transfers


@pytest.mark.slow
@given(layers_and_counts(), st.booleans(), st.sampled_from([None, "int8"]), st.floats(0, 1), st.integers(0, 3))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_layer_any_load(
    drawn: tuple[LayerPlacement, Topology, np.ndarray],
    has_cost: bool,
    transient_format: str | None,
    max_share: float,
    max_borrowed: int,
) -> None:
    layer, topology, counts_RE = drawn
    knobs = {"fallback_ratio": 1.0, "min_tokens_per_gemm": 1, "max_borrowed": max_borrowed}
    knobs |= {"transient_format": transient_format, "max_low_precision_share": max_share}
    strategy, cost = make_strategy("rq_llep", **knobs), COST if has_cost else None
    plan = strategy.planner(layer, topology, cost)(counts_RE)
    check_plan(plan, layer, counts_RE)
    again = strategy.planner(layer, topology, cost)(counts_RE)
    assert plan.transfers == again.transfers
    np.testing.assert_array_equal(plan.pairs_RP, again.pairs_RP)
    borrowed_R = np.bincount([transfer.dst for transfer in plan.transfers], minlength=topology.num_ranks)
    assert borrowed_R.max() <= max_borrowed, "room for borrowed experts is bounded"
    assert plan.loads_R.max() <= make_strategy("rq").planner(layer, topology)(counts_RE).loads_R.max()
    low_P = np.array([name == "int8" for name in plan.replicas.formats_P])
    assert plan.pairs_RP[:, low_P].sum() <= max_share * counts_RE.sum()
    assert set(EXPERT_BYTES) >= set(plan.replicas.formats_P)


def test_settings_are_checked() -> None:
    for knobs in ({"max_borrowed": -1}, {"max_low_precision_share": 2}, {"transient_format": 8}):
        with pytest.raises(UserError, match=next(iter(knobs))):
            make_strategy("rq_llep", **knobs)
    with pytest.raises(UserError, match="transient_format 'int4': the machine's costs know bf16, int8"):
        make_strategy("rq_llep", transient_format="int4").planner(home_layer(2, 2), Topology(2), COST)
