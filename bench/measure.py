"""Running the contestants: the same rows, routing, weights and kernels in turn; only the plan differs."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.case import NUM_BATCHES, Batch, Case
from bench.peers import Peer
from bench.planned import Planned
from rq_ep.core.arrays import FloatArray
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.topology import Topology
from rq_ep.formats import get_format, native_format_name
from rq_ep.moe import EPExperts, Telemetry
from rq_ep.moe.layer import transfer_bytes
from rq_ep.parallel import EPGroup
from rq_ep.parallel.reference import dense_moe

NUM_REFERENCE_ROWS = 32  # rows of each rank that are compared with the dense layer
WARM_UP_ROUNDS = 2
RATIOS = ("compute_s", "cpu_s", "wall_s", "total_s")


class Timing(NamedTuple):
    """One rank, one contestant, one round."""

    wall_s: float
    cpu_s: float


class OwnFigures(NamedTuple):
    """What one rank knows of one contestant. Peers do not tell how long their experts compute."""

    timings_S2: FloatArray
    compute_s_S: FloatArray | None
    plan_s_S: FloatArray | None
    resident_bytes: int
    borrowed_bytes: int
    error: tuple[float, float]


def measure(case: Case, group: EPGroup, topology: Topology, peers: Mapping[str, Peer]) -> list[dict[str, Any]]:
    """Run every contestant in turn, A B C then C B A, on the same batches; returns a row for each, on rank 0."""
    stats = case.stats(group.size)
    placements = {name: case.place(name, stats, topology) for name in case.contestants}
    layers: dict[str, nn.Module] = {
        name: _layer(case, name, placement, group, topology) for name, placement in placements.items()
    }
    layers |= {name: peer(case, group) for name, peer in peers.items()}
    batches = [case.batch(step, group.rank, group.size, group.device) for step in range(NUM_BATCHES)]
    timings = _time_rounds(case, layers, batches, group)
    mine = {name: _own_figures(case, layer, np.array(timings[name]), batches[0]) for name, layer in layers.items()}
    gathered = group.all_gather_object(mine)
    if group.rank:
        return []
    rows = []
    for name in layers:
        planned = Planned.of(case, name, placements[name], topology) if name in placements else None
        rows.append(_row(case, name, planned, [ranks[name] for ranks in gathered]))
    for row in rows:
        if group.backend == "local":
            row["_wall_s"] = row["wall_s"] = None  # ranks that take turns have no wall clock
        for figure in RATIOS:
            row[f"{figure}_ratio"] = _ratio(row[f"_{figure}"], rows[0][f"_{figure}"])
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def _layer(case: Case, name: str, placement: LayerPlacement, group: EPGroup, topology: Topology) -> EPExperts:
    # A rank's own time: of its thread on a CPU, of its stream on a GPU.
    telemetry = Telemetry(clock=time.thread_time if group.device.type == "cpu" else None)
    layer = EPExperts(case.family, placement, case.planner(name, placement, topology), group, telemetry=telemetry)
    for expert in layer.bank.experts:
        layer.bank.put(expert, case.expert(expert, group.device))
    return layer


def _time_rounds(
    case: Case, layers: Mapping[str, nn.Module], batches: list[Batch], group: EPGroup
) -> dict[str, list[Timing]]:
    timings: dict[str, list[Timing]] = {name: [] for name in layers}
    names = list(layers)
    for number in range(-WARM_UP_ROUNDS, case.num_rounds):
        if number == 0:
            for name, layer in layers.items():
                timings[name].clear()
                if isinstance(layer, EPExperts):
                    layer.telemetry.clear()
        for name in names[:: -1 if number % 2 else 1]:
            timings[name].append(_time_call(layers[name], batches[number % NUM_BATCHES], group))
    return timings


def _time_call(layer: nn.Module, batch: Batch, group: EPGroup) -> Timing:
    group.barrier()
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)
    wall_s, cpu_s = time.perf_counter(), time.thread_time()
    layer(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)
    return Timing(time.perf_counter() - wall_s, time.thread_time() - cpu_s)


def _own_figures(case: Case, layer: nn.Module, timings_S2: FloatArray, batch: Batch) -> OwnFigures:
    if not isinstance(layer, EPExperts):
        return OwnFigures(timings_S2, None, None, layer.resident_bytes, 0, _output_error(case, layer, batch))
    rank = layer.group.rank
    return OwnFigures(
        timings_S2,
        compute_s_S=layer.telemetry.seconds("compute")[:, 0, rank],
        plan_s_S=layer.telemetry.seconds("plan")[:, 0, rank],
        resident_bytes=layer.bank.nbytes,
        borrowed_bytes=layer.bank.spare.nbytes,
        error=_output_error(case, layer, batch),
    )


def _output_error(case: Case, layer: nn.Module, batch: Batch) -> tuple[float, float]:
    """Squared norms of the difference from the dense layer in full precision, and of the dense layer's output."""
    format_ = get_format(native_format_name(torch.float32))

    def expert(number: int, x_ND: Tensor) -> Tensor:
        weights = {name: weight.float() for name, weight in case.expert(number, x_ND.device).items()}
        return case.family.forward(x_ND, format_, weights)

    rows = slice(NUM_REFERENCE_ROWS)
    out_TD = layer(batch.hidden_TD, batch.ids_TK, batch.weights_TK)[rows].float()
    exact_TD = dense_moe(batch.hidden_TD[rows].float(), batch.ids_TK[rows], batch.weights_TK[rows], expert)
    return float((out_TD - exact_TD).square().sum()), float(exact_TD.square().sum())


def _row(case: Case, name: str, planned: Planned | None, ranks: list[OwnFigures]) -> dict[str, Any]:
    """Figures of one contestant. Names that begin with _ are arrays over rounds, [S], for ratios."""
    timings_RS2 = np.stack([rank.timings_S2 for rank in ranks])
    difference, size = np.sum([rank.error for rank in ranks], axis=0)
    figures: dict[str, FloatArray | None] = {
        "wall_s": timings_RS2[..., 0].max(axis=0),
        "cpu_s": timings_RS2[..., 1].max(axis=0),
        "compute_s": None,
        "plan_s": None,
        "total_s": None,
    }
    row: dict[str, Any] = {"strategy": name}
    if planned is not None:
        compute_RS = np.stack([rank.compute_s_S for rank in ranks])
        figures["compute_s"] = compute_RS.max(axis=0)
        figures["plan_s"] = np.stack([rank.plan_s_S for rank in ranks]).max(axis=0)
        if planned.costs:
            moved_SR = [
                cost.exchange_s_R + cost.transfer_s_R
                for cost in (planned.costs[number % NUM_BATCHES] for number in range(compute_RS.shape[1]))
            ]
            figures["total_s"] = figures["plan_s"] + (compute_RS.T + np.stack(moved_SR)).max(axis=1)
        contestant = case.contestants[name]
        row["settings"] = asdict(contestant.strategy)  # type: ignore[call-overload]  # strategies are dataclasses
        row["num_extra_replicas"] = contestant.num_extra_replicas
        row["compute_s_by_rank"] = {f"p{p}": np.percentile(compute_RS, p, axis=1).tolist() for p in (50, 99)}
        row |= planned.facts()
        moved_BR = [transfer_bytes(plan, case.family) for plan in planned.plans]
        row["transfer_bytes_per_step"] = float(np.sum(moved_BR, axis=1).mean())
    return row | {
        **{f"_{figure}": values_S for figure, values_S in figures.items()},
        **{figure: None if values_S is None else _quantiles(values_S) for figure, values_S in figures.items()},
        "resident_bytes_by_rank": [rank.resident_bytes for rank in ranks],
        "borrowed_bytes_by_rank": [rank.borrowed_bytes for rank in ranks],
        "output_error": float(np.sqrt(difference / size)) if size else 0.0,
    }


def _quantiles(values_S: FloatArray) -> dict[str, float]:
    return {f"p{percent}": float(np.percentile(values_S, percent)) for percent in (25, 50, 75, 99)}


def _ratio(values_S: FloatArray | None, first_S: FloatArray | None) -> float | None:
    """Median over rounds of a figure to the first contestant's in the same round."""
    if values_S is None or first_S is None:
        return None
    return float(np.median(values_S / np.maximum(first_S, 1e-9)))
