"""Every strategy of the table, on every awkward routing, equals the dense layer; the same inputs give the same bits."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rq_ep.core.placement import LayerPlacement
from rq_ep.core.plan import DispatchPlan, WeightTransfer
from rq_ep.core.replicas import Replica
from rq_ep.core.strategy import Planner
from rq_ep.core.topology import Topology
from rq_ep.formats import FORMATS
from rq_ep.moe import EPExperts, ExpertFamily, Telemetry
from rq_ep.parallel import run_local
from rq_ep.solver.split.relay import relay
from rq_ep.strategies import make_strategy
from tests.moe import cases


def run(
    layer: LayerPlacement,
    planner: Planner,
    family: ExpertFamily,
    weights: list[dict[str, Tensor]],
    ranks: list[cases.Batch],
    telemetry: Telemetry | None = None,
    num_steps: int = 1,
) -> list[list[Tensor]]:
    """Outputs by step and rank of a layer whose ranks live in this process."""

    def rank_main(group: Any) -> list[Tensor]:
        experts = EPExperts(family, layer, planner, group, telemetry=telemetry)
        cases.fill(experts, weights)
        batch = ranks[group.rank]
        return [experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK) for _ in range(num_steps)]

    return list(map(list, zip(*run_local(len(ranks), rank_main), strict=True)))


@pytest.mark.parametrize("routing", cases.ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strategy_equals_the_dense_layer(
    variant_of: tuple[str, dict[str, Any]], routing: str, dtype: torch.dtype
) -> None:
    name, variant = variant_of
    num_experts = cases.ROUTINGS[routing][0]
    ranks = cases.batches(routing, dtype)
    native = "fp32" if dtype == torch.float32 else "bf16"
    for family in cases.FAMILIES.values():
        weights = cases.expert_weights(family, num_experts, dtype)
        counts_RE = cases.counts_of(ranks, num_experts)
        layer, planner, _ = cases.planned(name, variant, family, counts_RE, (native,))
        telemetry = Telemetry()
        first, second = run(layer, planner, family, weights, ranks, telemetry, num_steps=2)
        for out_TD, again_TD, batch in zip(first, second, ranks, strict=True):
            cases.check_close(out_TD, cases.expected(family, weights, batch))
            assert torch.equal(out_TD, again_TD), "the same step twice gave different bits"
        assert np.array_equal(telemetry.counts()[:, 0], np.stack([counts_RE.sum(axis=0)] * 2))
        assert telemetry.loads().sum() == 2 * counts_RE.sum()


@pytest.mark.parametrize("routing", cases.ROUTINGS)
def test_strategy_equals_the_dense_layer_on_replicas_that_another_placed(
    variant_of: tuple[str, dict[str, Any]], routing: str
) -> None:
    name, variant = variant_of
    strategy = make_strategy(name, **variant.get("knobs", {}))
    if not strategy.serves_replicas:
        pytest.skip(f"{name} serves one replica of each expert")
    num_experts, ranks, family = cases.ROUTINGS[routing][0], cases.batches(routing), cases.FAMILIES["gated"]
    replicas = [
        Replica((expert + n) % 3, expert, "fp32") for expert in range(num_experts) for n in range(1 + expert % 3)
    ]
    layer = LayerPlacement.even(0, num_experts, replicas)
    weights = cases.expert_weights(family, num_experts)
    outputs = run(layer, strategy.planner(layer, Topology(3)), family, weights, ranks)[0]
    for out_TD, batch in zip(outputs, ranks, strict=True):
        cases.check_close(out_TD, cases.expected(family, weights, batch))


def test_variants_replicate_and_borrow() -> None:
    """The table above would prove little if no case had a second replica or a borrowed expert."""
    family = cases.FAMILIES["gated"]
    counts_RE = cases.counts_of(cases.batches("one_hot_expert"), 9)
    replicated, borrowed = set(), set()
    for name, variant in cases.variants():
        layer, planner, _ = cases.planned(name, variant, family, counts_RE)
        if len(layer.replicas) > 9:
            replicated.add(name)
        if planner(counts_RE).transfers:
            borrowed.add(name)
    assert {"eplb", "rq"} <= replicated
    assert {"llep", "rq_llep"} <= borrowed


@pytest.mark.parametrize(("name", "variant"), cases.MIXING, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("routing", cases.ROUTINGS)
def test_mixed_formats_compute_each_pair_where_the_reference_says(
    name: str, variant: dict[str, Any], routing: str
) -> None:
    num_experts = cases.ROUTINGS[routing][0]
    ranks = cases.batches(routing)
    for family in cases.FAMILIES.values():
        weights = cases.expert_weights(family, num_experts)
        counts_RE = cases.counts_of(ranks, num_experts)
        layer, planner, _ = cases.planned(name, variant, family, counts_RE, ("fp32", "int8"))
        plan = planner(counts_RE)
        first, second = run(layer, planner, family, weights, ranks, num_steps=2)
        for rank, batch in enumerate(ranks):
            cases.check_close(first[rank], cases.expected_as_planned(family, weights, batch, plan, rank))
            assert torch.equal(first[rank], second[rank]), "the same step twice gave different bits"


@pytest.mark.parametrize(("name", "variant"), cases.MIXING, ids=lambda value: value if isinstance(value, str) else "")
def test_mixing_ways_mix(name: str, variant: dict[str, Any]) -> None:
    counts_RE = cases.counts_of(cases.batches("all_on_one"), 6)
    _, planner, _ = cases.planned(name, variant, cases.FAMILIES["gated"], counts_RE, ("fp32", "int8"))
    plan = planner(counts_RE)
    assert plan.replicas.mixing_experts == (2,)
    low_P = np.array([name == "int8" for name in plan.replicas.formats_P])
    assert plan.pairs_RP[:, low_P & (plan.replicas.experts_P == 2)].sum() >= 8


@pytest.mark.slow
@pytest.mark.parametrize("routing", cases.ROUTINGS)
def test_an_expert_split_over_two_formats_computes_its_lowest_gates_in_few_bits(routing: str) -> None:
    num_experts = cases.ROUTINGS[routing][0]
    ranks = cases.batches(routing)
    layer = cases.in_two_formats(num_experts, 3, "fp32", "int8")
    planner = make_strategy("rq_paper").planner(layer, Topology(3))
    plan = planner(cases.counts_of(ranks, num_experts))
    for family in cases.FAMILIES.values():
        weights = cases.expert_weights(family, num_experts)
        first, second = run(layer, planner, family, weights, ranks, num_steps=2)
        for rank, batch in enumerate(ranks):
            cases.check_close(first[rank], cases.expected_as_planned(family, weights, batch, plan, rank))
            assert torch.equal(first[rank], second[rank]), "the same step twice gave different bits"


def test_two_formats_that_hold_the_same_weights_equal_the_dense_layer() -> None:
    family, ranks = cases.FAMILIES["gated"], cases.batches("all_on_one")
    weights = [
        {name: weight.bfloat16().float() for name, weight in expert.items()}
        for expert in cases.expert_weights(family, 6)
    ]
    layer = cases.in_two_formats(6, 3, "fp32", "bf16")
    planner = make_strategy("rq_paper").planner(layer, Topology(3))
    plan = planner(cases.counts_of(ranks, 6))
    low_P = np.array([name == "bf16" for name in plan.replicas.formats_P])
    assert 0 < plan.pairs_RP[:, low_P].sum() < plan.pairs_RP.sum()
    for out_TD, batch in zip(run(layer, planner, family, weights, ranks)[0], ranks, strict=True):
        cases.check_close(out_TD, cases.expected(family, weights, batch))


@pytest.mark.parametrize("seed", range(6))
def test_any_plan_equals_the_dense_layer(seed: int) -> None:
    """Random replicas in mixed formats, random splits, random borrowing: not only what strategies come up with."""
    random = np.random.default_rng(seed)
    num_ranks, num_experts = int(random.integers(1, 5)), int(random.integers(2, 8))
    family = list(cases.FAMILIES.values())[seed % 3]
    weights = cases.expert_weights(family, num_experts)
    formats = {expert: str(random.choice(["fp32", "int8", "bf16"])) for expert in range(num_experts)}
    holders = {e: random.permutation(num_ranks)[: random.integers(1, num_ranks + 1)] for e in range(num_experts)}
    resident = [Replica(int(rank), e, formats[e]) for e in range(num_experts) for rank in holders[e]]
    layer = LayerPlacement.even(0, num_experts, resident)
    transfers = [
        WeightTransfer(e, int(holders[e][0]), rank, formats[e])
        for e in range(num_experts)
        for rank in sorted(set(range(num_ranks)) - {int(rank) for rank in holders[e]})
        if random.random() < 0.5
    ]
    random.shuffle(transfers)
    if seed % 2:
        transfers = list(relay(transfers))
    borrowed = [Replica(transfer.dst, transfer.expert, transfer.format) for transfer in transfers]
    replicas = type(layer.replicas).of([*resident, *borrowed])

    def planner(counts_RE: np.ndarray) -> DispatchPlan:
        splits = np.random.default_rng(seed)
        pairs_RP = np.zeros((num_ranks, len(replicas)), np.int64)
        for rank, expert in np.ndindex(*counts_RE.shape):
            of_expert = np.flatnonzero(replicas.experts_P == expert)
            chances = splits.dirichlet(np.ones(len(of_expert)))
            pairs_RP[rank, of_expert] = splits.multinomial(counts_RE[rank, expert], chances)
        return DispatchPlan(replicas, pairs_RP, tuple(transfers))

    ranks = []
    for _ in range(num_ranks):
        num_tokens = int(random.integers(0, 12))
        ids_TK = torch.from_numpy(random.integers(0, num_experts, (num_tokens, 3)))
        hidden_TD = torch.from_numpy(random.standard_normal((num_tokens, cases.D))).float()
        ranks.append(cases.Batch(hidden_TD, ids_TK, torch.from_numpy(random.random((num_tokens, 3)))))
    for out_TD, batch in zip(run(layer, planner, family, weights, ranks)[0], ranks, strict=True):
        cases.check_close(out_TD, cases.expected(family, weights, batch, formats))


def test_int8_experts_stay_near_the_full_precision_layer() -> None:
    family = cases.FAMILIES["gated"]
    ranks = cases.batches("distinct")
    weights = cases.expert_weights(family, 8)
    layer = LayerPlacement.even(0, 8, [Replica(expert % 3, expert, "int8") for expert in range(8)])

    def planner(counts_RE: np.ndarray) -> DispatchPlan:
        return DispatchPlan(layer.replicas, counts_RE[:, layer.replicas.experts_P])

    for out_TD, batch in zip(run(layer, planner, family, weights, ranks)[0], ranks, strict=True):
        full_TD = cases.expected(family, weights, batch)
        error = float((out_TD - full_TD).norm() / full_TD.norm())
        assert 0 < error < 0.02


@pytest.mark.parametrize(("name", "variant"), [*cases.variants(), *cases.MIXING], ids=str)
def test_resident_bytes_are_what_the_placement_says(name: str, variant: dict[str, Any]) -> None:
    family = cases.FAMILIES["transposed"]
    counts_RE = cases.counts_of(cases.batches("one_hot_expert"), 9)
    layer, planner, max_bytes = cases.planned(name, variant, family, counts_RE, ("fp32", "int8"))
    banks = run_local(3, lambda group: EPExperts(family, layer, planner, group).bank)
    sizes = [
        sum(FORMATS[layer.replicas[p].format].nbytes(family.layout) for p in layer.replicas.on_rank(rank))
        for rank in range(3)
    ]
    assert [bank.nbytes for bank in banks] == sizes
    assert max(sizes) == max_bytes
