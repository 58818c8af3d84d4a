"""What holds for every strategy, on every load."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.replicas import Replica
from rq_ep.core.topology import Topology
from rq_ep.strategies import STRATEGIES, make_strategy
from tests.strategies.cases import CASES, EXPERT_BYTES, Case

KNOBS = {
    "llep": {"min_tokens_per_gemm": 4, "fallback_ratio": 1.0},
    "rq_llep": {"min_tokens_per_gemm": 4, "fallback_ratio": 1.0},
}


def strategy_of(name: str):  # type: ignore[no-untyped-def]
    return make_strategy(name, **KNOBS.get(name, {}))


def computed_RE(plan: DispatchPlan, num_experts: int) -> np.ndarray:
    """[R, E] pairs of each source and expert, summed over the replicas they go to."""
    sums_RE = np.zeros((len(plan.pairs_RP), num_experts), np.int64)
    for p, expert in enumerate(plan.replicas.experts_P.tolist()):
        sums_RE[:, expert] += plan.pairs_RP[:, p]
    return sums_RE


def check_plan(plan: DispatchPlan, layer: LayerPlacement, counts_RE: np.ndarray) -> None:
    assert plan.pairs_RP.dtype == np.int64
    assert (plan.pairs_RP >= 0).all()
    np.testing.assert_array_equal(computed_RE(plan, layer.num_experts), counts_RE)
    keys = list(zip(plan.replicas.ranks_P.tolist(), plan.replicas.experts_P.tolist(), strict=True))
    assert keys == sorted(set(keys))
    resident = set(layer.replicas)
    borrowed = {Replica(transfer.dst, transfer.expert, transfer.format) for transfer in plan.transfers}
    assert len(borrowed) == len(plan.transfers)
    assert resident | borrowed == set(plan.replicas)
    assert not resident & borrowed
    holders = {(replica.rank, replica.expert) for replica in resident}
    for transfer in sorted(plan.transfers, key=lambda transfer: transfer.round):
        earlier = {(each.dst, each.expert, each.format) for each in plan.transfers if each.round < transfer.round}
        assert (transfer.src, transfer.expert) in holders or (transfer.src, transfer.expert, transfer.format) in earlier


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", STRATEGIES)
def test_places_within_the_bytes_of_standard_ep_and_plans_every_pair_once(name: str, case: Case) -> None:
    strategy = strategy_of(name)
    problem = case.problem()
    placement = strategy.place(problem)
    assert placement.strategy == name
    assert max(placement.bytes_R) <= problem.budget_bytes_R[0]
    assert placement.low_precision_planned <= problem.max_low_precision_share
    sizes_R = np.zeros(case.num_ranks, np.int64)
    for layer in placement.layers:
        assert set(layer.replicas.experts_P.tolist()) == set(range(layer.num_experts))
        for replica in layer.replicas:
            sizes_R[replica.rank] += EXPERT_BYTES[replica.format]
        planner = strategy.planner(layer, problem.topology)
        counts_RE = case.counts_RE.copy()
        plan = planner(counts_RE)
        check_plan(plan, layer, case.counts_RE)
        np.testing.assert_array_equal(counts_RE, case.counts_RE)
        again = planner(counts_RE)
        np.testing.assert_array_equal(plan.pairs_RP, again.pairs_RP)
        assert plan.transfers == again.transfers
    assert placement.bytes_R == tuple(sizes_R.tolist())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["eplb", "rq", "rq_llep"])
def test_places_redundant_experts_where_bytes_are_not_limited(name: str, case: Case) -> None:
    strategy = strategy_of(name)
    problem = case.problem(unlimited=True, num_redundant_experts=case.num_ranks)
    for layer in strategy.place(problem).layers:
        check_plan(strategy.planner(layer, problem.topology)(case.counts_RE), layer, case.counts_RE)


@pytest.mark.parametrize("name", STRATEGIES)
def test_places_the_same_twice_and_leaves_statistics_alone(name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    case = CASES[1]
    before = case.counts_SLE.copy()
    texts = []
    for number in range(2):
        strategy_of(name).place(case.problem()).save(tmp_path / f"{number}.json")
        texts.append((tmp_path / f"{number}.json").read_text())
    assert texts[0] == texts[1]
    np.testing.assert_array_equal(case.counts_SLE, before)
    assert Placement.load(tmp_path / "0.json").strategy == name


@st.composite
def layers_and_counts(draw: st.DrawFn) -> tuple[LayerPlacement, Topology, np.ndarray]:
    """Any layer with one or more replicas of each expert, and any counts."""
    num_ranks, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    ranks = st.sets(st.integers(0, num_ranks - 1), min_size=1)
    replicas = [Replica(rank, expert, "bf16") for expert in range(num_experts) for rank in sorted(draw(ranks))]
    values = st.one_of(st.integers(0, 9), st.integers(0, 10**9))
    counts = draw(st.lists(values, min_size=num_ranks * num_experts, max_size=num_ranks * num_experts))
    topology = Topology(num_ranks, draw(st.integers(0, num_ranks)))
    layer = LayerPlacement.even(0, num_experts, replicas)
    return layer, topology, np.array(counts, np.int64).reshape(num_ranks, num_experts)


@pytest.mark.parametrize("name", ["eplb", "llep", "rq", "rq_paper", "rq_llep"])
@given(layers_and_counts())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_every_pair_is_computed_once_whatever_the_placement(
    name: str, drawn: tuple[LayerPlacement, Topology, np.ndarray]
) -> None:
    layer, topology, counts_RE = drawn
    check_plan(strategy_of(name).planner(layer, topology)(counts_RE), layer, counts_RE)
