"""The bank keeps its experts, borrows whole ones, and notices damage."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.plan import DispatchPlan, WeightTransfer
from rq_ep.core.replicas import Replica
from rq_ep.formats import FORMATS
from rq_ep.moe import BorrowBuffers, EPExperts, ExpertBank
from rq_ep.moe.integrity import DamagedExpert
from rq_ep.parallel import RankFailure, run_local
from rq_ep.solver.split.relay import relay
from tests.moe import cases

FAMILY = cases.FAMILIES["transposed"]
LAYOUT = FAMILY.layout


def home_layer(format_: str, num_ranks: int, num_experts: int) -> LayerPlacement:
    return LayerPlacement.even(2, num_experts, [Replica(e % num_ranks, e, format_) for e in range(num_experts)])


def test_put_and_put_packed_store_the_same_bytes() -> None:
    weights = cases.expert_weights(FAMILY, 4)
    layer = home_layer("int8", 2, 4)
    bank, copy = (ExpertBank(LAYOUT, layer.replicas, 1) for _ in range(2))
    assert bank.experts == (1, 3)
    for expert in bank.experts:
        bank.put(expert, weights[expert])
        copy.put_packed(expert, FORMATS["int8"].pack(weights[expert], LAYOUT))
        assert torch.equal(bank.packed(expert), copy.packed(expert))
    assert bank.nbytes == 2 * FORMATS["int8"].nbytes(LAYOUT)


def test_damaged_or_foreign_bytes_are_refused() -> None:
    bank = ExpertBank(LAYOUT, home_layer("int8", 2, 4).replicas, 0)
    packed = FORMATS["int8"].pack(cases.expert_weights(FAMILY, 1)[0], LAYOUT)
    packed[3] ^= 1
    with pytest.raises(UserError, match="packed expert 2 does not match its checksum"):
        bank.put_packed(2, packed)
    with pytest.raises(UserError, match=r"packed expert 2 is torch.uint8 \[10\]"):
        bank.put_packed(2, packed[:10])


@pytest.mark.parametrize("format_", FORMATS)
def test_a_borrowed_expert_arrives_whole(format_: str) -> None:
    """Rank 1 computes all of expert 0, which lives on rank 0: scales and biases must come along."""
    weights = cases.expert_weights(FAMILY, 4)
    layer = home_layer(format_, 2, 4)
    replicas = type(layer.replicas).of([*layer.replicas, Replica(1, 0, format_)])
    batch = cases.batches("all_on_one")[0]
    batch = cases.Batch(batch.hidden_TD, batch.ids_TK * 0, batch.weights_TK)

    def planner(counts_RE: np.ndarray) -> DispatchPlan:
        pairs_RP = counts_RE[:, replicas.experts_P]
        pairs_RP[:, replicas.on_rank(0)[0]] = 0
        return DispatchPlan(replicas, pairs_RP, (WeightTransfer(0, 0, 1, format_),))

    def main(group: Any) -> torch.Tensor:
        experts = EPExperts(FAMILY, layer, planner, group)
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
    layer = home_layer("fp32", num_ranks, num_ranks)
    pairs = [(src, dst) for src in range(num_ranks) for dst in range(num_ranks) if src != dst]
    transfers = relay([WeightTransfer(src, src, dst, "fp32") for src, dst in pairs])
    assert any(transfer.src != transfer.expert for transfer in transfers)

    def main(group: Any) -> None:
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
    layer = home_layer("fp32", 2, 4)
    replicas = type(layer.replicas).of([*layer.replicas, Replica(1, 0, "fp32")])

    def planner(counts_RE: np.ndarray) -> DispatchPlan:
        pairs_RP = counts_RE[:, replicas.experts_P]
        pairs_RP[:, replicas.on_rank(0)[0]] = 0
        return DispatchPlan(replicas, pairs_RP, (WeightTransfer(0, 0, 1, "fp32"),))

    def main(group: Any) -> None:
        experts = EPExperts(FAMILY, layer, planner, group)
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
    layers = [replace(home_layer("fp32", 2, 4), index=number) for number in (2, 5)]
    replicas = type(layers[0].replicas).of([*layers[0].replicas, Replica(1, 0, "fp32")])
    outputs: list[tuple[int, int]] = []

    def lending(counts_RE: np.ndarray) -> DispatchPlan:
        pairs_RP = counts_RE[:, replicas.experts_P]
        pairs_RP[:, replicas.on_rank(0)[0]] = 0
        return DispatchPlan(replicas, pairs_RP, (WeightTransfer(0, 0, 1, "fp32"),))

    def staying(counts_RE: np.ndarray) -> DispatchPlan:
        return DispatchPlan(layers[1].replicas, counts_RE[:, layers[1].replicas.experts_P])

    def main(group: Any) -> None:
        buffers = BorrowBuffers(LAYOUT, "cpu")
        first = EPExperts(FAMILY, layers[0], lending, group, borrow_buffers=buffers)
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


def test_an_expert_travels_in_fewer_bits_and_is_packed_once() -> None:
    weights = cases.expert_weights(FAMILY, 6)
    bank = ExpertBank(LAYOUT, home_layer("bf16", 1, 6).replicas, 0)
    for expert in bank.experts:
        bank.put(expert, weights[expert])
    rounded = {name: weight.bfloat16() for name, weight in weights[3].items()}
    packed = bank.packed_as(3, "int8")
    assert torch.equal(packed, FORMATS["int8"].pack(rounded, LAYOUT))
    assert bank.packed_as(3, "int8") is packed
    assert bank.packed_as(3, "bf16").data_ptr() == bank.packed(3).data_ptr()
    for expert in range(3):
        bank.packed_as(expert, "int8")
    assert bank.packed_as(3, "int8") is packed, "four are kept"
    for expert in (0, 1, 2, 4):
        bank.packed_as(expert, "int8")
    assert bank.packed_as(3, "int8") is not packed, "the one used longest ago goes first"
    bank.put(3, weights[4])
    assert torch.equal(bank.packed_as(3, "int8"), bank.packed_as(4, "int8"))
    bank.packed(5)[0] ^= 1
    with pytest.raises(DamagedExpert, match="expert 5 of layer 0 on rank 0 is damaged"):
        bank.packed_as(5, "int8")


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
