"""Three processes over gloo, started once: collectives, every strategy against the dense layer, the loss of a rank."""

from typing import Any

import pytest
import torch

from rq_ep.core.topology import Topology
from rq_ep.formats import checksum, get_format
from rq_ep.moe import EPExperts
from rq_ep.parallel import EPGroup, run_local
from rq_ep.strategies import make_strategy
from tests.moe import cases
from tests.parallel.processes import run_ranks

pytestmark = pytest.mark.dist
NUM_RANKS = 3


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of each rank."""
    return run_ranks(NUM_RANKS, tmp_path_factory.mktemp("ranks"), "cpu", timeout_s=300)


def check_collectives(seen: list[dict[str, Any]], num_ranks: int) -> None:
    for rank, of_rank in enumerate(results["collectives"] for results in seen):
        expected = [other for other in range(num_ranks) for _ in range((rank + other) % 3)]
        assert all(values == expected for values in of_rank["received"].values())
        assert len(of_rank["received"]) == 6
        assert of_rank["nothing"] == [0, 2]
        assert of_rank["counts"] == [[r] * 4 for r in range(num_ranks)]
        assert of_rank["objects"] == [{"rank": other} for other in range(num_ranks)]
    assert [results["transfers"] for results in seen] == [[]] + [[7, 8]] * (num_ranks - 1)
    family = cases.FAMILIES["gated"]
    packed = [get_format("fp32").pack(weights, family.layout) for weights in cases.expert_weights(family, num_ranks)]
    sums = [int(checksum(expert)) for expert in packed]
    assert [results["handed_on"] for results in seen] == [sums[:rank] + sums[rank + 1 :] for rank in range(num_ranks)]


def check_layers(seen: list[dict[str, Any]], dtype: torch.dtype, native: str) -> None:
    """Every strategy gave the dense layer's outputs on every rank."""
    for number, routing in enumerate(cases.ROUTINGS):
        family = list(cases.FAMILIES.values())[number % len(cases.FAMILIES)]
        weights = cases.expert_weights(family, cases.ROUTINGS[routing][0], dtype)
        for results, batch in zip(seen, cases.batches(routing, dtype)[: len(seen)], strict=True):
            expected_TD = cases.expected(family, weights, batch)
            for name, variant in cases.variants():
                cases.check_close(results[native][f"{routing} {name} {variant}"], expected_TD)


def test_collectives_and_transfers(seen: list[dict[str, Any]]) -> None:
    assert [(results["backend"], results["device"]) for results in seen] == [("gloo", "cpu")] * NUM_RANKS
    check_collectives(seen, NUM_RANKS)


@pytest.mark.parametrize(("dtype", "native"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")], ids=str)
def test_every_strategy_equals_the_dense_layer(seen: list[dict[str, Any]], dtype: torch.dtype, native: str) -> None:
    check_layers(seen, dtype, native)


def test_processes_and_ranks_in_one_process_give_the_same_bits(seen: list[dict[str, Any]]) -> None:
    family = cases.FAMILIES["gated"]
    ranks = cases.batches("distinct")
    weights = cases.expert_weights(family, 8)
    for name, variant in cases.variants():
        layer, planner, _ = cases.planned(name, variant, family, cases.counts_of(ranks, 8))

        def main(group: EPGroup, layer: Any = layer, planner: Any = planner) -> torch.Tensor:
            experts = EPExperts(family, layer, planner, group)
            cases.fill(experts, weights)
            batch = ranks[group.rank]
            return experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK)

        for results, out_TD in zip(seen, run_local(NUM_RANKS, main), strict=True):
            assert torch.equal(results["fp32"][f"distinct {name} {variant}"], out_TD)


def test_an_expert_split_over_two_formats_computes_each_pair_where_the_reference_says(
    seen: list[dict[str, Any]],
) -> None:
    family = cases.FAMILIES["gated"]
    num_low = 0
    for routing, (num_experts, _, _) in cases.ROUTINGS.items():
        ranks, weights = cases.batches(routing), cases.expert_weights(family, num_experts)
        layer = cases.in_two_formats(num_experts, NUM_RANKS, "fp32", "int8")
        plan = make_strategy("rq_paper").planner(layer, Topology(NUM_RANKS))(cases.counts_of(ranks, num_experts))
        num_low += int(plan.pairs_RP[:, [replica.format == "int8" for replica in plan.replicas]].sum())
        for rank, (results, batch) in enumerate(zip(seen, ranks, strict=True)):
            expected_TD = cases.expected_as_planned(family, weights, batch, plan, rank)
            cases.check_close(results["two formats"][routing], expected_TD)
    assert num_low > 0


def test_a_group_may_be_a_part_of_the_world(seen: list[dict[str, Any]]) -> None:
    assert [results["part"] for results in seen] == [
        None,
        {"rank": 0, "size": 2, "transfers": []},
        {"rank": 1, "size": 2, "transfers": [7, 8]},
    ]


def test_the_loss_of_a_rank_is_noticed_at_once(seen: list[dict[str, Any]]) -> None:
    operations = ["weight transfer", "gather of counts"]
    for rank, (results, operation) in enumerate(zip(seen, operations, strict=False)):
        message = results["loss"]
        assert message.startswith(f"rank {rank}: {operation} failed")
        assert "timed out" not in message.lower()
