"""The executing side on CUDA tensors: formats, grouped kernel, all ranks on one GPU, NCCL, gloo through host memory."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rq_ep.core.plan import DispatchPlan, WeightTransfer
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.formats import FORMATS, is_intact
from rq_ep.moe import BorrowBuffers, ExpertFamily, LocalExperts, Telemetry
from rq_ep.moe.borrowing import Borrowing, Round
from rq_ep.moe.grouped_gemm import can_group
from rq_ep.moe.integrity import DamagedExpert, checksum_verifier
from rq_ep.parallel import (
    Combine,
    Exchange,
    ExchangeSettings,
    LocalGroup,
    RoutingCounts,
    SoleHolders,
    run_local,
    single_group,
)
from rq_ep.parallel.routing_counts import count_pairs
from tests.moe import cases
from tests.moe.test_expert_compute import FAMILIES, outputs, received_of, stack_of
from tests.parallel.processes import run_ranks
from tests.parallel.test_exchange import MODES
from tests.parallel.test_processes import check_collectives, check_layers

DEVICE = torch.device("cuda")
FORMAT_OF = {torch.float32: "fp32", torch.bfloat16: "bf16"}

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_expert_is_the_same_on_both_sides(name: str) -> None:
    family = cases.FAMILIES["transposed"]
    weights = cases.expert_weights(family, 1)[0]
    packed = FORMATS[name].pack(weights, family.layout)
    moved = packed.to(DEVICE)
    assert bool(is_intact(moved))
    assert torch.equal(
        FORMATS[name].pack({n: weight.to(DEVICE) for n, weight in weights.items()}, family.layout).cpu(), packed
    )
    x_ND = torch.randn(9, cases.D)
    expected_ND = family.forward(x_ND, FORMATS[name], FORMATS[name].views(packed, family.layout))
    out_ND = family.forward(x_ND.to(DEVICE), FORMATS[name], FORMATS[name].views(moved, family.layout))
    torch.testing.assert_close(out_ND.cpu(), expected_ND, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_grouped_kernel_equals_the_loop(monkeypatch: pytest.MonkeyPatch, family: ExpertFamily) -> None:
    stack = stack_of(family, "bf16", DEVICE)
    received = received_of([3, 0, 17, 1, 40], 10, torch.bfloat16, DEVICE)
    assert can_group(received.rows_MD, stack, family.up) == (torch.cuda.get_device_capability() >= (8, 0))
    grouped_MD = outputs(stack, family, received)
    assert all(torch.equal(grouped_MD, outputs(stack, family, received)) for _ in range(5)), "bits differ"
    monkeypatch.setattr("rq_ep.moe.grouped_gemm.can_group", lambda *_: False)
    loop_MD = outputs(stack, family, received)
    assert (grouped_MD - loop_MD).norm() < 2e-2 * loop_MD.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", cases.ROUTINGS)
def test_every_strategy_equals_the_dense_layer_with_all_ranks_on_one_gpu(routing: str, dtype: torch.dtype) -> None:
    family = cases.FAMILIES["gated"]
    num_experts = cases.ROUTINGS[routing][0]
    weights = cases.expert_weights(family, num_experts, dtype)
    whole = cases.Batch(*(torch.cat(parts) for parts in zip(*map(_fields, cases.batches(routing, dtype)), strict=True)))
    counts_RE = np.stack([count_pairs(ids_TK, num_experts).numpy() for ids_TK in whole.ids_TK.tensor_split(3)])
    batch = cases.to_device(whole, DEVICE)
    for name, variant in cases.variants():
        layer, planner, _ = cases.planned(name, variant, family, counts_RE, (FORMAT_OF[dtype],))
        telemetry = Telemetry()
        experts = LocalExperts(family, layer, planner, 3, device=DEVICE, telemetry=telemetry)
        for rank in experts.ranks:
            cases.fill(rank, weights)
        first, second = (experts(*_fields(batch)) for _ in range(2))
        assert torch.equal(first, second), "the same step twice gave different bits"
        cases.check_close(first.cpu(), cases.expected(family, weights, whole))
        assert (telemetry.seconds("compute") >= 0).all()
        assert telemetry.loads().sum() == 2 * counts_RE.sum()


@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_move_rows_with_eight_ranks_on_one_gpu(mode: str) -> None:
    """Borrowed experts, parts, overlap: outputs are the dense layer's, and the same bits again."""
    family, num_ranks = cases.FAMILIES["transposed"], 8
    random = torch.Generator().manual_seed(0)
    ids_TK = torch.randint(9, (80, 3), generator=random)
    ids_TK[:, 0] = 4  # one hot expert
    batch = cases.Batch(torch.randn(80, cases.D, generator=random), ids_TK, torch.rand(80, 3, generator=random))
    counts_RE = np.stack([count_pairs(part, 9).numpy() for part in ids_TK.tensor_split(num_ranks)])
    knobs = {"knobs": {"min_tokens_per_gemm": 1, "fallback_ratio": 1.0}}
    layer, planner, _ = cases.planned("llep", knobs, family, counts_RE)
    assert planner(counts_RE).transfers
    weights = cases.expert_weights(family, 9)
    settings = replace(ExchangeSettings.for_device("cuda"), **MODES[mode])
    experts = LocalExperts(family, layer, planner, num_ranks, device=DEVICE, exchange_settings=settings)
    for rank in experts.ranks:
        cases.fill(rank, weights)
    on_gpu = _fields(cases.to_device(batch, DEVICE))
    with torch.cuda.stream(torch.cuda.Stream()):  # ranks compute on the stream of their caller
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        first, second = (experts(*on_gpu) for _ in range(2))
        torch.cuda.current_stream().synchronize()
    assert torch.equal(first, second), "the same step twice gave different bits"
    cases.check_close(first.cpu(), cases.expected(family, weights, batch))


@pytest.mark.parametrize("max_padded_bytes", [None, 0])
def test_the_host_waits_for_nothing_but_the_counts(max_padded_bytes: int | None) -> None:
    """Between the counts and the output CUDA refuses every wait of the host."""
    replicas = Replicas.of([Replica(e % 2, e, "fp32") for e in range(4)] + [Replica(1, 0, "fp32")])
    holders = SoleHolders.of(replicas, 4, 2, DEVICE)
    ids_TK = torch.tensor([[0, 1], [1, 2], [3, 0], [0, 2]], device=DEVICE)
    hidden_TD, weights_TK = torch.ones(4, 8, device=DEVICE), torch.ones(4, 2, device=DEVICE)

    def main(group: LocalGroup) -> None:
        routing = RoutingCounts.gather(ids_TK, holders, group)
        pairs_RP = routing.counts_RE[:, replicas.experts_P]
        pairs_RP[:, (replicas.experts_P == 0) & (replicas.ranks_P == 0)] = 0
        settings = ExchangeSettings.for_device("cuda")
        if max_padded_bytes is not None:
            settings = replace(settings, max_padded_bytes=max_padded_bytes)
        torch.cuda.set_sync_debug_mode("error")  # both ranks have their counts
        plan = DispatchPlan(replicas, pairs_RP)
        handle = Exchange(group, settings).dispatch(hidden_TD, ids_TK, weights_TK, plan, routing)
        combine = Combine(handle)
        for received in handle:
            combine.send_back(torch.zeros(received.rows_MD.shape, device=DEVICE))
        combine.output()

    try:
        run_local(2, main, DEVICE)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_expert_damaged_on_the_way_is_found_beside_the_compute() -> None:
    layout = cases.FAMILIES["transposed"].layout
    packed = FORMATS["fp32"].pack(cases.expert_weights(cases.FAMILIES["transposed"], 1)[0], layout).to(DEVICE)
    damaged = packed.clone()
    damaged[5] ^= 1
    buffers = BorrowBuffers(layout, DEVICE)
    group = single_group(DEVICE)
    transfers = [WeightTransfer(expert, 0, 0, "fp32") for expert in range(2)]  # received from itself

    def borrow(second: torch.Tensor) -> Borrowing:
        received = dict(zip(transfers, buffers.take(["fp32", "fp32"]), strict=True))
        messages = Round([(packed, 0), (second, 0)], [(slot.packed, 0) for slot in received.values()])
        borrowed = Borrowing(7, received, [messages], group, checksum_verifier(DEVICE))
        borrowed.wait()
        return borrowed

    borrow(packed).verify()
    borrowed = borrow(damaged)
    with pytest.raises(DamagedExpert, match="expert 1 of layer 7 from rank 0 arrived damaged"):
        borrowed.verify()
    borrowed.verify()


@pytest.mark.dist
def test_nccl_with_one_rank(tmp_path: Path) -> None:
    seen = run_ranks(1, tmp_path, "cuda", timeout_s=200)
    assert (seen[0]["backend"], seen[0]["device"]) == ("nccl", "cuda")
    check_collectives(seen, 1)
    for dtype, native in FORMAT_OF.items():
        check_layers(seen, dtype, native)


@pytest.mark.dist
@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="with several GPUs two ranks do not share one")
def test_ranks_that_share_a_gpu_go_through_host_memory(tmp_path: Path) -> None:
    seen = run_ranks(2, tmp_path, "cuda", timeout_s=200)
    assert [(results["backend"], results["device"]) for results in seen] == [("gloo", "cuda")] * 2
    check_collectives(seen, 2)
    for dtype, native in FORMAT_OF.items():
        check_layers(seen, dtype, native)


@pytest.mark.dist
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl_with_two_ranks(tmp_path: Path) -> None:
    seen = run_ranks(2, tmp_path, "auto", timeout_s=200)
    assert [(results["backend"], results["device"]) for results in seen] == [("nccl", "cuda")] * 2
    check_collectives(seen, 2)
    for dtype, native in FORMAT_OF.items():
        check_layers(seen, dtype, native)


def _fields(batch: cases.Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return batch.hidden_TD, batch.ids_TK, batch.weights_TK
