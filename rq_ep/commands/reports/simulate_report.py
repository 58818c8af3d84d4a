"""A replay as plain values, and as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.rebalancing.live_placement import LivePlacement
from rq_ep.sim.contenders import Contender
from rq_ep.sim.replayed_steps import ReplayedSteps
from rq_ep.sim.simulator import Simulation

UNIFORM = "(uniform)"  # where the placement is from: loads that were not calibrated


def row_of(contender: Contender, result: Simulation, phases: Mapping[str, IntArray]) -> dict[str, Any]:
    """The figures of a contender, as plain values."""
    by_phase = {name: result.imbalance_SL[places_S] for name, places_S in phases.items()}
    row: dict[str, Any] = {
        "strategy": contender.name,
        "placement": contender.source,
        "imbalance_mean": float(result.imbalances.mean()),
        "imbalance_mean_by_phase": {
            name: float(np.nanmean(values_SL)) for name, values_SL in by_phase.items() if np.isfinite(values_SL).any()
        },
        "imbalance_p90": float(np.percentile(result.imbalances, 90)),
        "imbalance_worst": float(result.imbalances.max()),
        "bytes_max": max(contender.placement.bytes_R),
        "bytes": contender.placement.bytes_R,
        "low_precision_share": result.low_precision_share,
        "transfers_per_step": float(result.transfers_SL.sum(axis=1).mean()),
    }
    if result.layer_s_SL is not None:
        row["modelled_step_s"] = float(result.layer_s_SL.sum(axis=1).mean())
    return row


def rebalancing_of(result: Simulation, live: LivePlacement | None) -> dict[str, Any]:
    """The figures of a contender over time, as plain values; None: it kept its placement."""
    used_SL = np.isfinite(result.imbalance_SL)
    series_S = np.where(used_SL, result.imbalance_SL, 0.0).sum(axis=1) / np.maximum(used_SL.sum(axis=1), 1)
    return {
        "imbalance": {
            "mean": float(result.imbalances.mean()),
            "p90": float(np.percentile(result.imbalances, 90)),
            "worst": float(result.imbalances.max()),
        },
        "series": np.maximum(series_S, 1.0).tolist(),
        "rebalances": 0 if live is None else live.num_rebalances,
        "moved_bytes": 0 if live is None else live.moved_bytes,
        "low_share": result.low_precision_share,
        "decisions": []
        if live is None
        else [{"step": step, "moves": not one.stays, "reason": one.reason} for step, one in live.decisions],
    }


def report(rows: Sequence[Mapping[str, Any]], replayed: ReplayedSteps, machine: str | None) -> None:
    """Print the rows, and what their columns mean.

    Args:
        rows: of `row_of`, with `rebalancing_of` in all of them or in none.
        replayed: the steps that were replayed.
        machine: that the modelled times are of; None: there are none.
    """
    from rich.table import Table

    from rq_ep.commands.console import MIN_WIDTH, wide_console

    phases = replayed.by_phase
    shown_phases = list(phases) if len(phases) > 1 else []
    table = Table(
        "strategy", "placement", "mean", *(f"in {name}" for name in shown_phases), "p90", "worst", "MiB/rank", "low",
        "moved", box=None, padding=(0, 2, 0, 0), title="max/mean over ranks, taken in every step and layer",
    )  # fmt: skip
    rebalances = "rebalances" in rows[0]
    if rebalances:
        table.add_column("rebalances")
        table.add_column("MiB moved")
    if machine:
        table.add_column("ms/step*")
    for row in rows:
        cells = [row["strategy"], row["placement"]]
        cells.append(f"{row['imbalance_mean']:.3f}")
        cells += [f"{row['imbalance_mean_by_phase'].get(name, np.nan):.3f}" for name in shown_phases]
        cells += [
            f"{row['imbalance_p90']:.3f}",
            f"{row['imbalance_worst']:.3f}",
            f"{row['bytes_max'] / 2**20:,.2f}",
            f"{row['low_precision_share']:.1%}",
            f"{row['transfers_per_step']:.1f}",
        ]
        if rebalances:
            cells += [str(row["rebalances"]), f"{row['moved_bytes'] / 2**20:,.2f}"]
        if machine:
            cells.append(f"{1000 * row['modelled_step_s']:.3g}")
        table.add_row(*cells)
    wide_console(130 if rebalances else MIN_WIDTH).print(table)
    parts = ", ".join(f"{places_S.size} of {name}" for name, places_S in phases.items())
    of_phases = f" ({parts})" if parts else ""
    print(
        f"{replayed.num_steps} steps{of_phases} of {replayed.stats.num_layers} layers. "
        "MiB/rank: experts on the fullest rank."
    )
    print("low: share of pairs in low precision. moved: expert weights sent per step, all layers.")
    if rebalances:
        print("rebalances: placements that were replaced, expert by expert; MiB moved: what ranks received for that.")
    if any(row["placement"] == UNIFORM for row in rows):
        print(f"{UNIFORM}: no placement was given or calibrated for; the strategy placed by itself, on uniform load.")
    if machine:
        from rq_ep.costs import cost_model

        print("* modelled, not measured: the slowest rank of every layer, nothing overlapped.")
        print(f"  {machine}: {cost_model(machine).description}")
