"""A contestant's row of the result, from what every rank knows of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from bench.layer.case import Case
from bench.layer.plan_figures import Planned
from rq_ep.core.arrays import FloatArray
from rq_ep.moe.layer import transfer_bytes

RATIOS = ("compute_s", "cpu_s", "wall_s", "total_s")


class OwnFigures(NamedTuple):
    """What one rank knows of one contestant. Peers do not tell how long their experts compute."""

    timings_S3: FloatArray
    compute_s_S: FloatArray | None
    plan_s_S: FloatArray | None
    resident_bytes: int
    borrowed_bytes: int
    held_rows: int | None
    error: tuple[float, float]


def rows_of(
    case: Case, planned: Mapping[str, Planned | None], ranks: Sequence[Mapping[str, OwnFigures]], has_wall: bool
) -> list[dict[str, Any]]:
    """A row for each contestant; ratios are to the first one.

    Args:
        case: what was measured.
        planned: name -> its plans, None of a peer.
        ranks: what each rank knows of each contestant.
        has_wall: ranks that take turns have no wall clock, nor an allocator of their own.
    """
    rows = [_row(case, name, plans, [rank[name] for rank in ranks]) for name, plans in planned.items()]
    first = rows[0]
    for row in rows:
        if not has_wall:
            row["_wall_s"] = row["wall_s"] = row["working_bytes_by_rank"] = None
        for figure in RATIOS:
            row[f"{figure}_ratio"] = _ratio(row[f"_{figure}"], first[f"_{figure}"])
        row["of_ideal"] = first["steady_s"] / row["steady_s"] / first["ideal_speed_up"] if "steady_s" in row else None
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def _row(case: Case, name: str, planned: Planned | None, ranks: list[OwnFigures]) -> dict[str, Any]:
    """Figures of one contestant. Names that begin with _ are arrays over rounds, [S], for ratios."""
    timings_RS3 = np.stack([rank.timings_S3 for rank in ranks])
    difference, size = np.sum([rank.error for rank in ranks], axis=0)
    figures: dict[str, FloatArray | None] = {
        "wall_s": timings_RS3[..., 0].max(axis=0),
        "cpu_s": timings_RS3[..., 1].max(axis=0),
        "compute_s": None,
        "plan_s": None,
        "total_s": None,
    }
    row: dict[str, Any] = {"strategy": name}
    if planned is not None:
        compute_RS = np.stack([rank.compute_s_S for rank in ranks if rank.compute_s_S is not None])
        plan_s_S: FloatArray = np.stack([rank.plan_s_S for rank in ranks if rank.plan_s_S is not None]).max(axis=0)
        figures["compute_s"], figures["plan_s"] = compute_RS.max(axis=0), plan_s_S
        held_rows = max(rank.held_rows or 0 for rank in ranks)
        row["held_rows_peak"] = held_rows
        row["held_bytes_peak"] = held_rows * case.shape.hidden_size * case.dtype.itemsize
        # What does not change from round to round: the slowest rank by its own median, not the unluckiest of each.
        steady_s_R = np.median(compute_RS, axis=1)
        if planned.costs:
            steady_s_R = steady_s_R + np.mean([cost.exchange_s_R + cost.transfer_s_R for cost in planned.costs], axis=0)
        row["steady_s"] = float(np.median(plan_s_S) + steady_s_R.max())
        if planned.costs:
            moved_SR = [
                cost.exchange_s_R + cost.transfer_s_R
                for cost in (planned.costs[number % case.num_batches] for number in range(compute_RS.shape[1]))
            ]
            figures["total_s"] = plan_s_S + (compute_RS.T + np.stack(moved_SR)).max(axis=1)
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
        "working_bytes_by_rank": timings_RS3[..., 2].max(axis=1).astype(int).tolist(),
        "output_error": float(np.sqrt(difference / size)) if size else 0.0,
    }


def _quantiles(values_S: FloatArray) -> dict[str, float]:
    return {f"p{percent}": float(np.percentile(values_S, percent)) for percent in (25, 50, 75, 99)}


def _ratio(values_S: FloatArray | None, first_S: FloatArray | None) -> float | None:
    """Median over rounds of a figure to the first contestant's in the same round."""
    if values_S is None or first_S is None:
        return None
    return float(np.median(values_S / np.maximum(first_S, 1e-9)))
