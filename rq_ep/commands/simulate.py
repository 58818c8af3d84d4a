"""`rq-ep simulate`: recorded loads replayed through several strategies' own planners."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rq_ep.commands.common import add_set_option

if TYPE_CHECKING:
    from rq_ep.core.arrays import IntArray
    from rq_ep.core.placement import Placement
    from rq_ep.core.stats import ExpertStats
    from rq_ep.core.strategy import Strategy

UNIFORM = "(uniform)"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stats", required=True, metavar="FILE", help="loads to replay, best held out from placing")
    parser.add_argument(
        "--trace", metavar="FILE", help="replay the tokens of this recorded routing instead; --stats still tells sizes"
    )
    parser.add_argument(
        "--placement", nargs="+", action="extend", default=[], metavar="FILE",
        help="placements, at most one of each strategy, served by the strategy that made them; a strategy without one "
        "places by itself, on uniform load",
    )  # fmt: skip
    parser.add_argument(
        "--strategies", default="standard,eplb,llep,rq", metavar="NAMES", help="strategies to replay, by commas"
    )
    parser.add_argument("--num-ranks", required=True, type=int, metavar="R", help="ranks the loads are dealt to")
    parser.add_argument(
        "--machine", metavar="NAME",
        help="add seconds: by the rates of h200, h100, a100, cpu or of a YAML file, or by the JSON file of "
        "`rq-ep profile`",
    )  # fmt: skip
    add_set_option(parser)
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON as well")


def run(args: argparse.Namespace) -> None:
    from rq_ep.commands.common import parse_names, parse_strategies
    from rq_ep.core.errors import UserError
    from rq_ep.core.files import check_writable, replacing
    from rq_ep.core.placement import Placement
    from rq_ep.core.stats import ExpertStats

    stats = ExpertStats.load(args.stats)
    counts = stats.counts if args.trace is None else _traced(args.trace, stats, args.num_ranks)
    if not counts.any():
        what, remedy = (args.trace, "record again") if args.trace else (args.stats, "calibrate again")
        raise UserError(f"{what}: no routed pairs to replay; {remedy}, on more text")
    if args.json:
        check_writable(args.json)
    placements: dict[str, tuple[str, Placement]] = {}
    for path in args.placement:
        placement = Placement.load(path)
        placement.check_serves(stats.model, args.num_ranks, path)
        shape = {layer.layer: layer.num_experts for layer in placement.layers}
        if shape != dict.fromkeys(stats.layers, stats.num_experts):
            raise UserError(
                f"{path}: experts per layer {shape}, but {args.stats} has {stats.num_experts} "
                f"in each of the layers {', '.join(map(str, stats.layers))}"
            )
        placement.check_bytes(stats.expert_bytes, path)
        if placement.strategy in placements:
            raise UserError(f"{path}: a second placement made by {placement.strategy!r}; give one for each strategy")
        placements[placement.strategy] = (Path(path).name, placement)
    names = [*parse_names(args.strategies), *placements]  # what was given is shown, named or not
    strategies = parse_strategies(names, args.set)
    rows = [_row(strategy, stats, counts, placements.get(name), args) for name, strategy in strategies.items()]
    _report(rows, len(counts), stats.num_layers, args.machine)
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n")


def _traced(path: str, stats: "ExpertStats", num_ranks: int) -> "IntArray":
    """[S, L, R, E] pairs of a recorded routing of the model that `stats` tells about."""
    from rq_ep.core.errors import UserError, check_integer
    from rq_ep.sim.traces import RoutingTrace

    trace = RoutingTrace.load(path)
    if (trace.layers, trace.num_experts) != (stats.layers, stats.num_experts):
        raise UserError(
            f"{path}: {trace.num_experts} experts in layers {list(trace.layers)}, but {stats.source} has "
            f"{stats.num_experts} in layers {list(stats.layers)}: record the model that was calibrated"
        )
    return trace.counts(check_integer("--num-ranks", num_ranks, 1))


def _row(
    strategy: "Strategy",
    stats: "ExpertStats",
    counts: "IntArray",
    given: "tuple[str, Placement] | None",
    args: argparse.Namespace,
) -> dict[str, Any]:
    import numpy as np

    from rq_ep.commands.common import layer_cost
    from rq_ep.core.stats import ExpertStats
    from rq_ep.sim.simulator import simulate
    from rq_ep.strategies.place import place

    if given is None:
        native = {stats.native_format: stats.expert_bytes[stats.native_format]}
        uniform = ExpertStats.uniform(stats.layers, stats.num_experts, native, stats.native_format)
        given = (UNIFORM, place(uniform, args.num_ranks, strategy=strategy))
    source, placement = given
    cost = layer_cost(args.machine, stats)
    result = simulate(strategy, placement, counts, stats.native_format, cost)
    row = {
        "strategy": strategy.name,
        "placement": source,
        "imbalance_mean": float(result.seen.mean()),
        "imbalance_p90": float(np.percentile(result.seen, 90)),
        "imbalance_worst": float(result.seen.max()),
        "bytes_max": max(placement.bytes_R),
        "bytes": placement.bytes_R,
        "low_precision_share": result.low_precision_share,
        "transfers_per_step": float(result.transfers_SL.sum(axis=1).mean()),
    }
    if result.layer_s_SL is not None:
        row["modelled_step_s"] = float(result.layer_s_SL.sum(axis=1).mean())
    return row


def _report(rows: list[dict[str, Any]], num_steps: int, num_layers: int, machine: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "strategy", "placement", "mean", "p90", "worst", "MiB/rank", "low", "moved", box=None, padding=(0, 2, 0, 0),
        title="max/mean over ranks, taken in every step and layer",
    )  # fmt: skip
    if machine:
        table.add_column("ms/step*")
    for row in rows:
        cells = [row["strategy"], row["placement"]]
        cells += [f"{row[key]:.3f}" for key in ("imbalance_mean", "imbalance_p90", "imbalance_worst")]
        cells += [
            f"{row['bytes_max'] / 2**20:,.2f}",
            f"{row['low_precision_share']:.1%}",
            f"{row['transfers_per_step']:.1f}",
        ]
        if machine:
            cells.append(f"{1000 * row['modelled_step_s']:.3g}")
        table.add_row(*cells)
    Console().print(table)
    print(f"{num_steps} steps of {num_layers} layers. MiB/rank: experts on the fullest rank.")
    print("low: share of pairs in low precision. moved: expert weights sent per step, all layers.")
    if any(row["placement"] == UNIFORM for row in rows):
        print(f"{UNIFORM}: no placement file was made by this strategy; it placed by itself, on uniform load.")
    if machine:
        from rq_ep.costs import cost_model

        print("* modelled, not measured: the slowest rank of every layer, nothing overlapped.")
        print(f"  {machine}: {cost_model(machine).description}")
