"""Borrowed experts arrive whole, and none that was damaged on its way goes unnoticed."""

import numpy as np
import pytest
import torch

from rq_ep.core.errors import UserError
from rq_ep.core.plan import DispatchPlan, WeightTransfer
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.core.strategy import Planner
from rq_ep.formats import FORMATS
from rq_ep.moe import BorrowBuffers, EPExperts, ExpertBank
from rq_ep.moe.integrity import DamagedExpert
from rq_ep.parallel import EPGroup, RankFailure, run_local
from rq_ep.solver.split.relay import relay
from tests.moe import cases

FAMILY = cases.FAMILIES["transposed"]
LAYOUT = FAMILY.layout
LENT = (WeightTransfer(0, 0, 1, "fp32"),)


def lending(format_: str) -> Planner:
    """Rank 1 borrows expert 0 of rank 0 and computes all of its pairs."""
    replicas = Replicas.of([*cases.round_robin(format_, 2, 4).replicas, Replica(1, 0, format_)])

    def planner(counts_RE: np.ndarray) -> DispatchPlan:
        pairs_RP = counts_RE[:, replicas.experts_P]
        pairs_RP[:, replicas.on_rank(0)[0]] = 0
        return DispatchPlan(replicas, pairs_RP, (WeightTransfer(0, 0, 1, format_),))

    return planner


@pytest.mark.parametrize("format_", FORMATS)
def test_a_borrowed_expert_arrives_whole(format_: str) -> None:
    """Rank 1 computes all of expert 0, which lives on rank 0: scales and biases must come along."""
    weights = cases.expert_weights(FAMILY, 4)
    layer = cases.round_robin(format_, 2, 4)
    batch = cases.batches("all_on_one")[0]
    batch = cases.Batch(batch.hidden_TD, batch.ids_TK * 0, batch.weights_TK)

    def main(group: EPGroup) -> torch.Tensor:
        experts = EPExperts(FAMILY, layer, lending(format_), group)
        cases.fill(experts, weights)
        assert experts.bank.borrow_buffers.nbytes == 0, "slots for borrowed experts are allocated when they are needed"
        for _ in range(2):
            out_TD = experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
        assert experts.bank.borrow_buffers.nbytes == (FORMATS[format_].nbytes(LAYOUT) if group.rank == 1 else 0)
        return out_TD

    formats = dict.fromkeys(range(4), format_)
    for out_TD in run_local(2, main):
        cases.check_close(out_TD, cases.expected(FAMILY, weights, batch, formats))


def test_experts_are_handed_on_all_ways_at_once() -> None:
    """Every rank lends its expert to all others, who hand on what they borrow, without a deadlock."""
    num_ranks = 5
    weights = cases.expert_weights(FAMILY, num_ranks)
    layer = cases.round_robin("fp32", num_ranks, num_ranks)
    pairs = [(src, dst) for src in range(num_ranks) for dst in range(num_ranks) if src != dst]
    transfers = relay([WeightTransfer(src, src, dst, "fp32") for src, dst in pairs])
    assert any(transfer.src != transfer.expert for transfer in transfers)

    def main(group: EPGroup) -> None:
        bank = ExpertBank(LAYOUT, layer.replicas, group.rank)
        bank.put(group.rank, weights[group.rank])
        for _ in range(2):
            borrowed = bank.borrow(transfers, group)
            borrowed.wait()
            borrowed.verify()
            for expert, slot in borrowed.slots.items():
                assert torch.equal(slot.packed, FORMATS["fp32"].pack(weights[expert], LAYOUT))
            assert len(borrowed.slots) == num_ranks - 1
            group.barrier()

    run_local(num_ranks, main)


def test_an_expert_damaged_on_its_way_ends_the_step_with_rank_and_layer() -> None:
    weights = cases.expert_weights(FAMILY, 4)
    layer = cases.round_robin("fp32", 2, 4)

    def main(group: EPGroup) -> None:
        experts = EPExperts(FAMILY, layer, lending("fp32"), group)
        cases.fill(experts, weights)
        if group.rank == 0:
            experts.bank.packed(0)[5] ^= 1
        batch = cases.batches("all_on_one")[0]
        experts(batch.hidden_TD, batch.ids_TK * 0, batch.weights_TK)

    with pytest.raises(RankFailure, match=r"MoE layer 2 on rank 1: expert 0 of layer 2 from rank 0 arrived damaged"):
        run_local(2, main)


def test_a_damaged_expert_stops_the_step_in_the_next_layer_at_the_latest() -> None:
    """Layers that share buffers leave it to the next one, on every rank before that layer has an output."""
    weights = cases.expert_weights(FAMILY, 4)
    layers = [cases.round_robin("fp32", 2, 4, index) for index in (2, 5)]
    outputs: list[tuple[int, int]] = []

    def staying(counts_RE: np.ndarray) -> DispatchPlan:
        return DispatchPlan(layers[1].replicas, counts_RE[:, layers[1].replicas.experts_P])

    def main(group: EPGroup) -> None:
        buffers = BorrowBuffers(LAYOUT, "cpu")
        first = EPExperts(FAMILY, layers[0], lending("fp32"), group, borrow_buffers=buffers)
        second = EPExperts(FAMILY, layers[1], staying, group, borrow_buffers=buffers)
        batch = cases.batches("all_on_one")[0]
        for experts in (first, second):
            cases.fill(experts, weights)
        if group.rank == 0:
            first.bank.packed(0)[5] ^= 1
        for number, experts in enumerate((first, second)):
            experts(batch.hidden_TD, batch.ids_TK * 0, batch.weights_TK)
            outputs.append((number, group.rank))

    with pytest.raises(RankFailure, match=r"MoE layer 5 on rank 1: expert 0 of layer 2 from rank 0 arrived damaged"):
        run_local(2, main)
    assert {number for number, _ in outputs} == {0}


def test_the_last_layer_that_shares_buffers_verifies_its_own_experts() -> None:
    """So the output of a forward pass is never computed with a damaged expert, whatever layers it has."""
    weights = cases.expert_weights(FAMILY, 4)
    batch = cases.batches("all_on_one")[0]

    def main(group: EPGroup) -> None:
        buffers = BorrowBuffers(LAYOUT, "cpu")
        layers = [
            EPExperts(FAMILY, cases.round_robin("fp32", 2, 4, index), lending("fp32"), group, borrow_buffers=buffers)
            for index in (1, 2, 0)
        ]
        layers.sort(key=lambda experts: experts.placement.index)
        for experts in layers:
            cases.fill(experts, weights)
        if group.rank == 0:
            layers[-1].bank.packed(0)[5] ^= 1
        for experts in layers:
            experts(batch.hidden_TD, batch.ids_TK * 0, batch.weights_TK)

    with pytest.raises(RankFailure, match=r"MoE layer 2 on rank 1: expert 0 of layer 2 from rank 0 arrived damaged"):
        run_local(2, main)


def test_a_pass_that_is_cut_short_is_verified_when_the_next_one_begins() -> None:
    weights = cases.expert_weights(FAMILY, 4)

    def main(group: EPGroup) -> None:
        buffers = BorrowBuffers(LAYOUT, "cpu")
        first, _ = (
            ExpertBank(
                LAYOUT, cases.round_robin("fp32", 2, 4).replicas, group.rank, borrow_buffers=buffers, layer=layer
            )
            for layer in (3, 4)
        )
        for expert in first.experts:
            first.put(expert, weights[expert])
        if group.rank == 0:
            first.packed(0)[5] ^= 1
        first.borrow(LENT, group).wait()
        group.barrier()
        if group.rank == 1:
            with pytest.raises(DamagedExpert, match="expert 0 of layer 3 from rank 0 arrived damaged"):
                first.borrow((), group)
        first.borrow((), group)

    run_local(2, main)


def test_borrowed_experts_that_were_never_computed_with_are_a_mistake() -> None:
    def main(group: EPGroup) -> None:
        bank = ExpertBank(LAYOUT, cases.round_robin("fp32", 2, 4).replicas, group.rank)
        bank.borrow(LENT, group)
        bank.borrow((), group)

    with pytest.raises(AssertionError, match="never computed with"):
        run_local(2, main)


def test_borrow_buffers_grow_are_kept_and_are_bounded() -> None:
    size = FORMATS["fp32"].nbytes(LAYOUT)
    buffers = BorrowBuffers(LAYOUT, "cpu", max_bytes=2 * size)
    first = buffers.take(["fp32"])
    assert buffers.nbytes == size
    again = buffers.take(["fp32"])
    assert again[0].stack is first[0].stack
    two = buffers.take(["fp32", "fp32"])
    assert [slot for _, slot in two] == [0, 1]
    buffers.take(["int8", "fp32"])
    assert buffers.nbytes == size + FORMATS["int8"].nbytes(LAYOUT), "what no longer fits beside it is given up"
    with pytest.raises(UserError, match=f"takes {3 * size} bytes, but only {2 * size}"):
        buffers.take(["fp32"] * 3)
