"""Running the contestants: the same rows, routing, weights and kernels in turn; only the plan differs."""

import time
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.layer.case import Batch, Case
from bench.layer.peers import Peer
from bench.layer.peers.comm_log import communication
from bench.layer.plan_figures import Planned
from bench.layer.summary import OwnFigures, rows_of
from rq_ep.core.arrays import FloatArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.topology import Topology
from rq_ep.formats import get_format, native_format_name
from rq_ep.moe import EPExperts, Telemetry
from rq_ep.parallel import DispatchHandle, EPGroup, Exchange, RoutingCounts
from rq_ep.parallel.host import short_collections
from rq_ep.parallel.reference import dense_moe

NUM_REFERENCE_ROWS = 32  # rows of each rank that are compared with the dense layer
NUM_CPU_WARM_UP_ROUNDS = 2  # on a GPU one for every batch: memory is allocated and kernels are chosen for its sizes


class Timing(NamedTuple):
    """One rank, one contestant, one round."""

    wall_s: float
    cpu_s: float
    working_bytes: int  # most that was allocated during the call, beyond what was before; 0 on a CPU


class RecordingExchange(Exchange):
    """An exchange that records the most rows of other ranks that were held at once."""

    held_rows = 0

    def dispatch(
        self,
        hidden_TD: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        plan: DispatchPlan,
        counts: RoutingCounts | None = None,
    ) -> DispatchHandle:
        handle = super().dispatch(hidden_TD, topk_ids_TK, topk_weights_TK, plan, counts)
        self.held_rows = max(self.held_rows, handle.max_rows_held)
        return handle


def measure(
    case: Case, group: EPGroup, topology: Topology, peers: Mapping[str, Peer], logged: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Run every contestant in turn, A B C then C B A, on the same batches; returns a row for each, on rank 0.

    Args:
        case: what to measure.
        group: the ranks; every one calls this.
        topology: their nodes.
        peers: other people's layers, by name.
        logged: those peers whose communication is logged afterwards, in calls that are not timed.
    """
    # Rank 0 places for all: ranks of one process would do it one after another.
    own_placements = None if group.rank else _place(case, group, topology)
    placements: dict[str, LayerPlacement] = group.all_gather_object(own_placements)[0]
    layers: dict[str, nn.Module] = {
        name: _layer(case, name, placement, group, topology) for name, placement in placements.items()
    }
    layers |= {name: peer(case, group) for name, peer in peers.items()}
    batches = [case.batch(step, group.rank, group.size, group.device) for step in range(case.num_batches)]
    with short_collections():
        timings = _time_rounds(case, layers, batches, group)
    exact_TD = _dense_output(case, batches[0])
    mine = {name: _own_figures(layer, np.array(timings[name]), batches[0], exact_TD) for name, layer in layers.items()}
    logs = {name: communication(layers[name], batches[0]) for name in logged}
    gathered = group.all_gather_object(mine)
    if group.rank:
        return []
    routes = case.all_ids(group.size)
    planned = {
        name: Planned.of(case, name, placements[name], topology, routes) if name in placements else None
        for name in layers
    }
    rows = rows_of(case, planned, gathered, has_wall=group.backend != "local")
    for row in rows:
        row["communication"] = logs.get(row["strategy"])
    return rows


def _place(case: Case, group: EPGroup, topology: Topology) -> dict[str, LayerPlacement]:
    stats = case.stats(group.size)
    placements = {name: case.place(name, stats, topology) for name in case.contestants}
    _check_room(case, group, placements)
    return placements


def _check_room(case: Case, group: EPGroup, placements: Mapping[str, LayerPlacement]) -> None:
    """Every contestant holds its own experts all the time: say before loading them that a GPU cannot hold them."""
    if group.device.type != "cuda":
        return
    ranks = range(group.size) if group.backend == "local" else (group.rank,)
    wanted_bytes = sum(
        get_format(placement.replicas.formats_P[p]).nbytes(case.family.layout)
        for placement in placements.values()
        for rank in ranks
        for p in placement.replicas.on_rank(rank)
    )
    free_bytes = torch.cuda.mem_get_info(group.device)[0]
    if wanted_bytes > free_bytes:
        raise UserError(
            f"--strategies {','.join(placements)}: their experts take {wanted_bytes / 2**30:.1f} GiB of the GPU, which "
            f"has {free_bytes / 2**30:.1f} GiB free: name fewer, or lower --hidden-size"
        )


def _layer(case: Case, name: str, placement: LayerPlacement, group: EPGroup, topology: Topology) -> EPExperts:
    # A rank's own time: of its thread on a CPU, of its stream on a GPU.
    telemetry = Telemetry(clock=time.thread_time if group.device.type == "cpu" else None)
    planner = case.planner(name, placement, topology)
    exchange = RecordingExchange(group)
    layer = EPExperts(case.family, placement, planner, group, exchange=exchange, telemetry=telemetry)
    for expert in layer.bank.experts:
        layer.bank.put(expert, case.expert(expert, group.device))
    return layer


def _time_rounds(
    case: Case, layers: Mapping[str, nn.Module], batches: list[Batch], group: EPGroup
) -> dict[str, list[Timing]]:
    timings: dict[str, list[Timing]] = {name: [] for name in layers}
    names = list(layers)
    num_warm_up = NUM_CPU_WARM_UP_ROUNDS if group.device.type == "cpu" else case.num_batches
    for number in range(-num_warm_up, case.num_rounds):
        if number == 0:
            for name, layer in layers.items():
                timings[name].clear()
                if isinstance(layer, EPExperts):
                    assert isinstance(layer.telemetry, Telemetry)
                    layer.telemetry.clear()
        for name in names[:: -1 if number % 2 else 1]:
            timings[name].append(_time_call(layers[name], batches[number % case.num_batches], group))
    return timings


def _time_call(layer: nn.Module, batch: Batch, group: EPGroup) -> Timing:
    group.barrier()
    on_gpu, before_bytes, working_bytes = group.device.type == "cuda", 0, 0
    if on_gpu:
        torch.cuda.synchronize(group.device)
        torch.cuda.reset_peak_memory_stats(group.device)
        before_bytes = torch.cuda.memory_allocated(group.device)
    wall_s, cpu_s = time.perf_counter(), time.thread_time()
    layer(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
    if on_gpu:
        torch.cuda.synchronize(group.device)
        working_bytes = torch.cuda.max_memory_allocated(group.device) - before_bytes
    return Timing(time.perf_counter() - wall_s, time.thread_time() - cpu_s, working_bytes)


def _own_figures(layer: nn.Module, timings_S3: FloatArray, batch: Batch, exact_TD: Tensor) -> OwnFigures:
    if not isinstance(layer, EPExperts):
        peer: Any = layer
        return OwnFigures(timings_S3, None, None, peer.resident_bytes, 0, None, _output_error(layer, batch, exact_TD))
    assert isinstance(layer.exchange, RecordingExchange)
    assert isinstance(layer.telemetry, Telemetry)
    rank = layer.group.rank
    return OwnFigures(
        timings_S3,
        compute_s_S=layer.telemetry.seconds("compute")[:, 0, rank],
        plan_s_S=layer.telemetry.seconds("plan")[:, 0, rank],
        resident_bytes=layer.bank.nbytes,
        borrowed_bytes=layer.bank.borrow_buffers.nbytes,
        held_rows=layer.exchange.held_rows,
        error=_output_error(layer, batch, exact_TD),  # last: it is one more call
    )


def _dense_output(case: Case, batch: Batch) -> Tensor:
    """The first rows' output of the dense layer, in full precision."""
    format_ = get_format(native_format_name(torch.float32))

    def expert(number: int, x_ND: Tensor) -> Tensor:
        weights = {name: weight.float() for name, weight in case.expert(number, x_ND.device).items()}
        return case.family.forward(x_ND, format_, weights)

    rows = slice(NUM_REFERENCE_ROWS)
    return dense_moe(batch.hidden_TD[rows].float(), batch.ids_TK[rows], batch.weights_TK[rows], expert)


def _output_error(layer: nn.Module, batch: Batch, exact_TD: Tensor) -> tuple[float, float]:
    """Squared norms of the difference from the dense layer's output, and of that."""
    out_TD = layer(batch.hidden_TD, batch.ids_TK, batch.weights_TK)[:NUM_REFERENCE_ROWS].float()
    return float((out_TD - exact_TD).square().sum()), float(exact_TD.square().sum())
