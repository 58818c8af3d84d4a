"""Replicas come and go between two calls: the layer computes as one that was built so, in the placement's bytes."""

import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.core.topology import Topology
from rq_ep.formats import FORMATS, ExpertBuffers, get_format, native_format_name
from rq_ep.moe import EPExperts, ExpertBank, LocalExperts
from rq_ep.moe.integrity import DamagedExpert, MissingExpert
from rq_ep.parallel import TorchGroup
from rq_ep.solver.migration.move_rounds import MoveRound, move_rounds
from rq_ep.strategies import make_strategy
from tests.forkserver import forkserver
from tests.moe import cases

LENDING = {"min_tokens_per_gemm": 1, "fallback_ratio": 1.0}
STRATEGIES: dict[str, dict[str, Any]] = {"rq": {}, "rq_llep": LENDING, "eplb": {}}
SHAPES = [(6, 3), (2, 5), (9, 4), (3, 1)]  # experts, ranks
Weights = Sequence[dict[str, Tensor]]


def drawn(random: np.random.Generator, num_experts: int, num_ranks: int, formats: Sequence[str]) -> list[Replica]:
    """Every expert on some ranks, in one format; a rank may hold none."""
    open_ranks = random.permutation(num_ranks)[: random.integers(1, num_ranks + 1)]
    replicas = []
    for expert in range(num_experts):
        name = str(random.choice(formats))
        ranks = random.permutation(open_ranks)[: random.integers(1, min(3, len(open_ranks)) + 1)]
        replicas += [Replica(int(rank), expert, name) for rank in ranks]
    return replicas


def placed(rows: Sequence[Sequence[Replica]], num_experts: int, num_ranks: int, sizes: Mapping[str, int]) -> Placement:
    layers = tuple(LayerPlacement.even(index, num_experts, row) for index, row in enumerate(rows))
    return Placement(layers, "rq", Topology(num_ranks), tuple(bytes_by_rank(layers, num_ranks, sizes).tolist()))


def local(
    strategy: str, layer: LayerPlacement, num_ranks: int, weights: Weights, family: str, movable: bool
) -> LocalExperts:
    planner = make_strategy(strategy, **STRATEGIES[strategy]).planner(layer, Topology(num_ranks))
    experts = LocalExperts(
        cases.FAMILIES[family], layer, planner, num_ranks, expert_buffers=ExpertBuffers() if movable else None
    )
    for rank in experts.ranks:
        cases.fill(rank, weights)
    return experts


def stage(layers: Sequence[LocalExperts], moves: MoveRound, weights: Weights) -> None:
    """Let a round arrive, from where it says."""
    for position, move in moves.receives:
        banks = layers[position].banks
        buffer = banks[move.rank].stage(move.expert, move.format)
        if move.source is None:
            buffer.copy_(get_format(move.format).pack(weights[move.expert], banks[0].layout))
        else:
            buffer.copy_(banks[move.source].converted(move.expert, move.format))
        banks[move.rank].verify_staged(move.expert)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_after_every_round_a_layer_equals_one_that_was_built_so(strategy: str, dtype: torch.dtype) -> None:
    native, num_lent, num_empty = native_format_name(dtype), 0, 0
    for seed, (num_experts, num_ranks) in enumerate(SHAPES):
        family = list(cases.FAMILIES)[seed % len(cases.FAMILIES)]
        layout, weights = (
            cases.FAMILIES[family].layout,
            cases.expert_weights(cases.FAMILIES[family], num_experts, dtype),
        )
        random = np.random.default_rng(seed)
        formats = (native, "int8") if seed % 2 == 0 else (native,)
        sizes = {name: FORMATS[name].nbytes(layout) for name in (native, "int8")}
        room = 3 * sizes[native]
        ids_TK = torch.from_numpy(random.integers(0, num_experts, (14, 2)) * (random.random((14, 2)) < 0.6))
        batch = cases.Batch(
            torch.from_numpy(random.standard_normal((14, cases.D))).to(dtype), ids_TK, torch.rand(14, 2).to(dtype)
        )
        rows = [drawn(random, num_experts, num_ranks, formats) for _ in range(2)]
        layers = [
            local(strategy, layer, num_ranks, weights, family, movable=seed % 2 == int(dtype == torch.float32))
            for layer in placed(rows, num_experts, num_ranks, sizes).layers
        ]
        for _ in range(2):
            before = placed([list(layer.placement.replicas) for layer in layers], num_experts, num_ranks, sizes)
            after = placed(
                [drawn(random, num_experts, num_ranks, formats) for _ in layers], num_experts, num_ranks, sizes
            )
            limit_R = np.maximum(before.bytes_R, after.bytes_R) + room
            rounds = move_rounds([layer.replicas for layer in before.layers], after, sizes, native, room)
            for moves in rounds:
                stage(layers, moves, weights)
                for rank in range(num_ranks):
                    banks = [layer.banks[rank] for layer in layers]
                    assert sum(bank.nbytes + bank.staged_bytes for bank in banks) <= limit_R[rank]
                new = moves.applied_to([layer.placement for layer in layers])
                for position in moves.layers:
                    planner = make_strategy(strategy, **STRATEGIES[strategy]).planner(
                        new[position], Topology(num_ranks)
                    )
                    layers[position].replace_placement(new[position], planner)
                for layer in (layers[position] for position in moves.layers):
                    assert [bank.nbytes for bank in layer.banks] == bytes_by_rank(
                        [layer.placement], num_ranks, sizes
                    ).tolist()
                    assert not any(bank.staged_bytes for bank in layer.banks)
                    fresh = local(strategy, layer.placement, num_ranks, weights, family, False)
                    out_TD = layer(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
                    assert torch.equal(out_TD, fresh(batch.hidden_TD, batch.ids_TK, batch.weights_TK))
                    runs = ids_TK.tensor_split(num_ranks)
                    counts_RE = np.stack([np.bincount(run.flatten(), minlength=num_experts) for run in runs])
                    num_lent += len(layer.ranks[0].planner(counts_RE).transfers)
                    num_empty += sum(not bank.experts for bank in layer.banks)
                    stored = {replica.expert: replica.format for replica in layer.placement.replicas}
                    cases.check_close(out_TD, cases.expected(cases.FAMILIES[family], weights, batch, stored))
            assert [list(layer.placement.replicas) for layer in layers] == [
                list(layer.replicas) for layer in after.layers
            ]
    assert num_empty, "no rank was ever empty"
    assert bool(num_lent) == (strategy == "rq_llep"), "experts are borrowed by the one strategy that lends"


def bank_of(weights: Weights, *held: tuple[int, str]) -> ExpertBank:
    """A movable bank of rank 0."""
    bank = ExpertBank(cases.FAMILIES["gated"].layout, replicas_of(*held), 0, layer=7, expert_buffers=ExpertBuffers())
    for expert in bank.experts:
        bank.put(expert, weights[expert])
    return bank


def replicas_of(*held: tuple[int, str]) -> Replicas:
    return Replicas.of(Replica(0, expert, name) for expert, name in held)


@pytest.fixture
def weights() -> Weights:
    return cases.expert_weights(cases.FAMILIES["gated"], 6)


def arrive(bank: ExpertBank, weights: Weights, expert: int, name: str) -> Tensor:
    buffer = bank.stage(expert, name)
    buffer.copy_(get_format(name).pack(weights[expert], bank.layout))
    bank.verify_staged(expert)
    return buffer


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ((1, "fp32"), "expert 1 of layer 7 in fp32 is to serve on rank 0, which has not received it"),
        ((2, "fp32"), "expert 2 of layer 7 is to serve in fp32 on rank 0, which received int8"),
        ((3, "fp32"), "expert 3 of layer 7 in fp32 is to serve on rank 0, which has not verified it"),
        ((0, "int8"), "expert 0 of layer 7 in int8 is to serve on rank 0, which has not received it"),
    ],
)
def test_what_has_not_arrived_whole_is_refused_and_nothing_changes(
    weights: Weights, wanted: tuple[int, str], message: str
) -> None:
    bank = bank_of(weights, (0, "fp32"))
    arrive(bank, weights, 2, "int8")
    damaged = bank.stage(3, "fp32")
    with pytest.raises(DamagedExpert, match="expert 3 of layer 7 arrived damaged on rank 0"):
        bank.verify_staged(3)  # not written
    damaged.copy_(get_format("fp32").pack(weights[3], bank.layout))
    damaged[9] ^= 1
    with pytest.raises(DamagedExpert):
        bank.verify_staged(3)
    held, sizes = bank.packed(0), (bank.nbytes, bank.staged_bytes)
    with pytest.raises(MissingExpert, match=message):
        bank.commit(replicas_of(wanted, (2, "int8")) if wanted[0] != 2 else replicas_of(wanted))
    assert bank.packed(0) is held
    assert (bank.experts, (bank.nbytes, bank.staged_bytes)) == ((0,), sizes)


def test_a_commit_keeps_what_stays_where_it_lies_and_frees_the_rest(weights: Weights) -> None:
    bank = bank_of(weights, (0, "fp32"), (1, "fp32"), (2, "int8"))
    kept, dropped, reduced = bank.packed(0), weakref.ref(bank.packed(1)), weakref.ref(bank.packed(2))
    arrived, changed = arrive(bank, weights, 4, "int8"), arrive(bank, weights, 2, "fp32")
    arrive(bank, weights, 5, "int8")
    bank.commit(replicas_of((0, "fp32"), (2, "fp32"), (4, "int8")))
    assert bank.packed(0) is kept
    assert bank.packed(4) is arrived
    assert bank.packed(2) is changed
    assert dropped() is reduced() is None
    size, low = (FORMATS[name].nbytes(bank.layout) for name in ("fp32", "int8"))
    assert (bank.nbytes, bank.staged_bytes) == (2 * size + low, low)
    bank.discard_staged()
    assert bank.staged_bytes == 0
    bank.commit(replicas_of())
    assert (bank.nbytes, bank.experts) == (0, ())


def test_a_commit_keeps_a_stack_where_it_lies_unless_its_experts_change(weights: Weights) -> None:
    bank = ExpertBank(cases.FAMILIES["gated"].layout, replicas_of((0, "fp32"), (1, "fp32")), 0)
    for expert in bank.experts:
        bank.put(expert, weights[expert])
    place = bank.packed(0).data_ptr()
    bank.commit(replicas_of((0, "fp32"), (1, "fp32")))
    assert bank.packed(0).data_ptr() == place
    arrive(bank, weights, 3, "fp32")
    with torch.inference_mode():  # as an engine does
        bank.commit(replicas_of((1, "fp32"), (3, "fp32")))
    assert bank.experts == (1, 3)
    assert bank.packed(3).data_ptr() - bank.packed(1).data_ptr() == bank.packed(1).nbytes, "one buffer, for kernels"
    assert not bank.packed(1).is_inference()
    for expert in bank.experts:
        assert torch.equal(bank.packed(expert), get_format("fp32").pack(weights[expert], bank.layout))


def test_an_expert_is_not_lent_as_it_was_converted_from_other_bits(weights: Weights) -> None:
    bank = bank_of(weights, (0, "int8"), (1, "fp32"))
    lent, kept = bank.packed_as(0, "bf16"), bank.packed_as(1, "bf16")
    arrive(bank, weights, 0, "fp32")
    bank.commit(replicas_of((0, "fp32"), (1, "fp32")))
    assert not torch.equal(bank.packed_as(0, "bf16"), lent)
    assert bank.packed_as(1, "bf16") is kept


def test_a_thread_converts_beside_the_compute_and_nothing_is_kept(weights: Weights) -> None:
    bank = bank_of(weights, *((expert, "fp32") for expert in range(6)))
    lent = bank.packed_as(0, "int8")
    converted: list[Tensor] = []
    thread = threading.Thread(target=lambda: converted.extend(bank.converted(expert, "int8") for expert in range(6)))
    thread.start()
    while thread.is_alive():
        bank.packed_as(int(torch.randint(6, ())), "int8")
    thread.join()
    for expert, packed in enumerate(converted):
        assert torch.equal(packed, get_format("int8").pack(weights[expert], bank.layout))
    assert torch.equal(lent, converted[0])
    assert bank.converted(0, "int8") is not bank.converted(0, "int8")
    assert bank.converted(0, "fp32") is bank.packed(0)


def test_no_rank_changes_if_one_lacks_a_replica(weights: Weights) -> None:
    layer = cases.round_robin("fp32", 2, 6)
    experts = local("rq", layer, 2, weights, "gated", True)
    after = LayerPlacement.even(2, 6, [*layer.replicas, Replica(0, 1, "fp32"), Replica(1, 0, "fp32")])
    planner = make_strategy("rq").planner(after, Topology(2))
    arrive(experts.banks[0], weights, 1, "fp32")
    with pytest.raises(MissingExpert, match="expert 0 of layer 2 in fp32 is to serve on rank 1"):
        experts.replace_placement(after, planner)
    assert all(rank.placement is layer for rank in experts.ranks)
    assert [bank.experts for bank in experts.banks] == [(0, 2, 4), (1, 3, 5)]


def serve_two_placements(rank: int, store: str, results: Any) -> None:
    """A rank over gloo that gets all experts of the other one, which keeps none, and gives them back."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    group, family = TorchGroup(), cases.FAMILIES["gated"]
    weights, batch = cases.expert_weights(family, 8), cases.batches("distinct")[rank]
    first = cases.round_robin("fp32", 2, 8)
    second = LayerPlacement.even(2, 8, [Replica(0, expert, "fp32") for expert in range(8)])
    strategy = make_strategy("rq_llep", **LENDING)
    experts = EPExperts(family, first, strategy.planner(first, Topology(2)), group, expert_buffers=ExpertBuffers())
    cases.fill(experts, weights)
    outputs = []
    for layer in (second, first, second):
        for expert in {replica.expert for replica in layer.replicas if replica.rank == rank} - {*experts.bank.experts}:
            arrive(experts.bank, weights, expert, "fp32")
        experts.replace_placement(layer, strategy.planner(layer, Topology(2)))
        fresh = EPExperts(family, layer, strategy.planner(layer, Topology(2)), group)
        cases.fill(fresh, weights)
        out_TD, fresh_TD = (one(batch.hidden_TD, batch.ids_TK, batch.weights_TK) for one in (experts, fresh))
        assert torch.equal(out_TD, fresh_TD)
        cases.check_close(out_TD, cases.expected(family, weights, batch))
        outputs.append(experts.bank.nbytes)
    results.put((rank, outputs))
    torch.distributed.destroy_process_group()


@pytest.mark.dist
def test_processes_replace_a_placement_between_two_calls(tmp_path: Path) -> None:
    context = forkserver()
    results = context.Queue()
    ranks = [
        context.Process(target=serve_two_placements, args=(rank, str(tmp_path / "store"), results)) for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    size = FORMATS["fp32"].nbytes(cases.FAMILIES["gated"].layout)
    assert dict(results.get() for _ in ranks) == {0: [8 * size, 4 * size, 8 * size], 1: [0, 4 * size, 0]}
