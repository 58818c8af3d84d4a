"""One rank of the process tests: runs every check in turn and writes the results.

The environment is torchrun's; the arguments are the directory for results and the device. The last rank is killed at
the end, and the others must notice.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from rq_ep.core.plan import WeightTransfer
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.core.topology import Topology
from rq_ep.formats import checksum
from rq_ep.moe import EPExperts, ExpertBank, Telemetry
from rq_ep.parallel import EPGroup, RankFailure, TorchGroup
from rq_ep.solver.split.relay import relay
from rq_ep.strategies import make_strategy
from tests.moe import cases
from tests.parallel.test_exchange import exchange

TIMEOUT_S = 60


def collectives(group: EPGroup) -> dict[str, Any]:
    """Uneven and empty splits in every dtype the exchange sends."""
    splits = [(group.rank + other) % 3 for other in range(group.size)]
    received = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8):
        send = torch.full((sum(splits), 2), group.rank, dtype=dtype, device=group.device)
        received[str(dtype)] = group.all_to_all(send, splits, splits)[:, 0].tolist()
    nothing = group.all_to_all(send[:0], [0] * group.size, [0] * group.size)
    group.barrier()
    return {
        "received": received,
        "nothing": list(nothing.shape),
        "counts": group.gather_counts(torch.full((4,), group.rank, device=group.device)).tolist(),
        "objects": group.all_gather_object({"rank": group.rank}),
    }


def transfers(group: EPGroup) -> list[int]:
    """Rank 0 lends two buffers to every other rank, one after another."""
    received = [torch.zeros(1000, dtype=torch.uint8, device=group.device) for _ in range(2 if group.rank else 0)]
    lent = [torch.full((1000,), 7 + n, dtype=torch.uint8, device=group.device) for n in range(2)]
    sends = [(piece, dst) for dst in range(1, group.size) for piece in lent] if group.rank == 0 else []
    group.start_transfers(sends, [(piece, 0) for piece in received]).wait()
    return [int(piece.float().mean()) for piece in received]


def handed_on(group: EPGroup) -> list[int]:
    """Every rank lends its expert to all others, who hand on what they borrow: checksums of what arrived."""
    family, ranks = cases.FAMILIES["gated"], range(group.size)
    replicas = Replicas.of([Replica(rank, rank, "fp32") for rank in ranks])
    bank = ExpertBank(family.layout, replicas, group.rank, group.device)
    bank.put(group.rank, cases.expert_weights(family, group.size)[group.rank])
    transfers = relay([WeightTransfer(src, src, dst, "fp32") for src in ranks for dst in ranks if src != dst])
    borrowed = bank.borrow(transfers, group)
    borrowed.wait()
    borrowed.verify()
    return [int(checksum(borrowed.slots[expert].packed)) for expert in ranks if expert != group.rank]


def layers(group: EPGroup, dtype: torch.dtype, native: str) -> dict[str, Any]:
    """Every strategy on every routing: this rank's outputs, and whether a second run gave the same bits."""
    results: dict[str, Any] = {}
    borrowed: list[WeightTransfer] = []
    for number, routing in enumerate(cases.ROUTINGS):
        family = list(cases.FAMILIES.values())[number % len(cases.FAMILIES)]
        num_experts = cases.ROUTINGS[routing][0]
        weights = cases.expert_weights(family, num_experts, dtype)
        ranks = cases.batches(routing, dtype)[: group.size]
        counts_RE = cases.counts_of(ranks, num_experts)
        batch = cases.to_device(ranks[group.rank], group.device)
        for name, variant in cases.variants():
            layer, planner, _ = cases.planned(name, variant, family, counts_RE, (native,))
            telemetry = Telemetry()
            experts = EPExperts(family, layer, planner, group, telemetry=telemetry)
            cases.fill(experts, weights)
            first, second = (experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK) for _ in range(2))
            assert torch.equal(first, second), f"{routing} {name}: two runs gave different bits"
            assert telemetry.loads().sum() == 2 * counts_RE.sum()
            if routing == "one_hot_expert":
                small_parts = exchange(group, max_padded_bytes=0, max_dispatch_bytes=64, overlaps=True)
                experts = EPExperts(family, layer, planner, group, exchange=small_parts)
                cases.fill(experts, weights)
                in_parts = experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
                cases.check_close(in_parts.cpu(), first.cpu())
            borrowed += planner(counts_RE).transfers
            results[f"{routing} {name} {variant}"] = first.cpu()
    assert bool(borrowed) == (group.size > 1), "experts are borrowed in some case, unless a rank is alone"
    return results


def two_formats(group: EPGroup) -> dict[str, torch.Tensor]:
    """Experts split over two formats, on every routing: this rank's outputs."""
    family, results = cases.FAMILIES["gated"], {}
    for routing in cases.ROUTINGS:
        num_experts = cases.ROUTINGS[routing][0]
        layer = cases.in_two_formats(num_experts, group.size, "fp32", "int8")
        experts = EPExperts(family, layer, make_strategy("rq_paper").planner(layer, Topology(group.size)), group)
        cases.fill(experts, cases.expert_weights(family, num_experts))
        batch = cases.to_device(cases.batches(routing)[group.rank], group.device)
        results[routing] = experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK).cpu()
    return results


def part_of_the_world(group: TorchGroup) -> dict[str, Any] | None:
    """A group of two of the ranks, whose numbers in it are not their global ones."""
    if group.rank == 0:
        return None
    part = TorchGroup("cpu", ranks=list(range(1, group.size)), timeout_s=TIMEOUT_S)
    seen = {"rank": part.rank, "size": part.size, "transfers": transfers(part)}
    part.close()
    return seen


def loss_of_a_rank(group: EPGroup) -> str:
    """The last rank is killed while rank 0 borrows an expert of it; returns the message of the others' failure."""
    landing = torch.zeros(1 << 20, dtype=torch.uint8, device=group.device)
    group.barrier()
    if group.rank == group.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        if group.rank == 0:
            group.start_transfers([], [(landing, group.size - 1)]).wait()
        else:
            group.gather_counts(torch.zeros(2, dtype=torch.int64, device=group.device))
    except RankFailure as failure:
        return str(failure)
    raise AssertionError("the loss of a rank went unnoticed")


def main(directory: Path, device: str) -> None:
    torch.set_num_threads(1)
    group = TorchGroup.from_environment(device, timeout_s=TIMEOUT_S)
    seen: dict[str, Any] = {"backend": group.backend, "device": group.device.type}
    seen["collectives"] = collectives(group)
    seen["transfers"] = transfers(group)
    seen["handed_on"] = handed_on(group)
    for dtype, native in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        seen[native] = layers(group, dtype, native)
    seen["two formats"] = two_formats(group)
    if group.size > 2:
        seen["part"] = part_of_the_world(group)
    path = directory / f"rank{group.rank}.pt"
    torch.save(seen, path)
    if group.size > 1 and group.backend == "gloo":  # NCCL notices nothing before its watchdog ends the process
        torch.save(seen | {"loss": loss_of_a_rank(group)}, path)
        os._exit(0)  # an orderly end would wait for the lost rank
    group.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
