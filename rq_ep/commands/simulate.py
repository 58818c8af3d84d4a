"""`rq-ep simulate`: recorded loads replayed through several strategies' own planners."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rq_ep.commands.common import add_set_option

if TYPE_CHECKING:
    from rich.progress import Progress

    from rq_ep.core.arrays import IntArray
    from rq_ep.core.placement import Placement
    from rq_ep.core.stats import ExpertStats
    from rq_ep.core.strategy import Strategy
    from rq_ep.sim.simulator import Simulation

UNIFORM = "(uniform)"


class Row(NamedTuple):
    """What is replayed: a strategy as `--strategies` names it, and the placement it serves."""

    name: str
    strategy: "Strategy"
    placement: "Placement"
    source: str  # where the placement is from


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stats", required=True, metavar="FILE", help="loads to replay, best held out from placing")
    parser.add_argument(
        "--trace", metavar="FILE", help="replay the tokens of this recorded routing instead; --stats still tells sizes"
    )
    parser.add_argument(
        "--strategies", default="standard,eplb,llep,rq", metavar="NAMES",
        help="strategies to replay, by commas: standard, eplb, llep, rq, rq_paper, rq_llep; eplb+1 has one slot more "
        "on every rank and layer than --budget allows",
    )  # fmt: skip
    parser.add_argument("--num-ranks", required=True, type=int, metavar="R", help="ranks the loads are dealt to")
    parser.add_argument(
        "--max-steps", type=int, metavar="N", help="replay so many steps at most, spread over the record"
    )
    group = parser.add_argument_group("placements: given, or made here")
    group.add_argument(
        "--placement", nargs="+", action="extend", default=[], metavar="FILE",
        help="placements, at most one of each strategy, served by the strategy that made them",
    )  # fmt: skip
    group.add_argument(
        "--calibration", metavar="FILE",
        help="statistics on which strategies without a placement place; without them they place on uniform load",
    )  # fmt: skip
    group.add_argument(
        "--budget", default="ep", metavar="BYTES", help="expert bytes of each rank, as for `rq-ep place`"
    )
    group.add_argument(
        "--max-low-precision-share", type=float, default=0.25, metavar="F", help="cap, as for `rq-ep place`"
    )
    group.add_argument("--ranks-per-node", type=int, default=0, metavar="N", help="0: all ranks share one node")
    group.add_argument("--time-limit", type=float, metavar="S", help="seconds of each search, as for `rq-ep place`")
    parser.add_argument(
        "--machine", metavar="NAME",
        help="add seconds: by the rates of h200, h100, a100, cpu or of a YAML file, or by the JSON file of "
        "`rq-ep profile`",
    )  # fmt: skip
    add_set_option(parser)
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON as well")


def run(args: argparse.Namespace) -> None:
    from rq_ep.commands.common import layer_cost
    from rq_ep.commands.progress_bar import progress_bar
    from rq_ep.core.errors import UserError
    from rq_ep.core.files import check_writable, write_json
    from rq_ep.core.stats import ExpertStats
    from rq_ep.sim.simulator import simulate
    from rq_ep.sim.traces import RoutingTrace

    stats = ExpertStats.load(args.stats)
    trace = None if args.trace is None else RoutingTrace.load(args.trace)
    if trace is not None:
        trace.check(stats)
    chosen_S = _chosen(stats.num_steps if trace is None else len(trace.tokens_S), args.max_steps)
    if not (stats.counts[chosen_S].any() if trace is None else trace.ids_NLK.size):
        what, remedy = (args.trace, "record again") if args.trace else (args.stats, "calibrate again")
        raise UserError(f"{what}: no routed pairs to replay; {remedy}, on more text")
    if args.json:
        check_writable(args.json)
    cost = layer_cost(args.machine, stats)
    rows = []
    with progress_bar() as bar:
        for row in _rows(args, stats, partial(_placing, bar)):
            on_step = partial(bar.advance, bar.add_task(f"replaying {row.name}", total=len(chosen_S)))
            steps = stats.counts[chosen_S] if trace is None else trace.steps(chosen_S, args.num_ranks)
            result = simulate(row.strategy, row.placement, steps, stats.native_format, cost, on_step)
            rows.append(_told(row, result))
    _report(rows, len(chosen_S), stats.num_layers, args.machine)
    if args.json:
        write_json(args.json, rows)


def _placing(bar: "Progress", name: str) -> Callable[[float], None]:
    """A line of the progress bar for one strategy that places."""
    task = bar.add_task(f"placing {name}", total=100)
    return lambda fraction: bar.update(task, completed=100 * fraction)


def _chosen(num_steps: int, max_steps: int | None) -> "IntArray":
    """[S] the recorded steps to replay."""
    import numpy as np

    from rq_ep.core.errors import check_integer

    if max_steps is None:
        return np.arange(num_steps)
    number = min(check_integer("--max-steps", max_steps, 1), num_steps)
    return np.unique(((np.arange(number) + 0.5) * num_steps / number).astype(np.int64))


def _rows(
    args: argparse.Namespace, stats: "ExpertStats", placing: Callable[[str], Callable[[float], None]]
) -> "Iterator[Row]":
    """Strategies and what they serve, one after another; every name and file is looked at before the first."""
    from rq_ep.commands.common import parse_names, parse_strategies
    from rq_ep.core.errors import UserError
    from rq_ep.core.stats import ExpertStats
    from rq_ep.placing.place import place

    given = _given(args, stats)
    names = list(dict.fromkeys([*parse_names(args.strategies), *given]))  # what was given is shown, named or not
    extra = {name: _extra_slots(name) for name in names}
    strategies = parse_strategies([name.partition("+")[0] for name in names], args.set)
    calibration, source = _uniform(stats), UNIFORM
    if args.calibration is not None:
        calibration, source = ExpertStats.load(args.calibration), Path(args.calibration).name
        if (calibration.layers, calibration.num_experts) != (stats.layers, stats.num_experts):
            raise UserError(
                f"{args.calibration}: {calibration.num_experts} experts in {calibration.num_layers} layers, but "
                f"{args.stats} has {stats.num_experts} in {stats.num_layers}: calibrate the model that is replayed"
            )
    for name in names:
        strategy = strategies[name.partition("+")[0]]
        if name in given:
            yield Row(name, strategy, given[name][1], given[name][0])
            continue
        on_progress = placing(name)
        placement = place(
            calibration,
            args.num_ranks,
            _more(args.budget, extra[name], calibration, args.num_ranks),
            strategy=strategy,
            ranks_per_node=args.ranks_per_node,
            max_low_precision_share=args.max_low_precision_share,
            num_redundant_experts=_redundant(extra[name], calibration, args.num_ranks),
            time_limit_s=args.time_limit,
            on_progress=on_progress,
        )
        on_progress(1.0)
        yield Row(name, strategy, placement, source)


def _given(args: argparse.Namespace, stats: "ExpertStats") -> "dict[str, tuple[str, Placement]]":
    """Strategy -> the name of its file and the placement, each checked against the statistics."""
    from rq_ep.core.errors import UserError
    from rq_ep.core.placement import Placement

    given: dict[str, tuple[str, Placement]] = {}
    for path in args.placement:
        placement = Placement.load(path)
        placement.check_serves(stats.model, args.num_ranks, path)
        shape = {layer.index: layer.num_experts for layer in placement.layers}
        if shape != dict.fromkeys(stats.layers, stats.num_experts):
            raise UserError(
                f"{path}: experts per layer {shape}, but {args.stats} has {stats.num_experts} "
                f"in each of the layers {', '.join(map(str, stats.layers))}"
            )
        placement.check_bytes(stats.expert_bytes, path)
        if placement.strategy in given:
            raise UserError(f"{path}: a second placement made by {placement.strategy!r}; give one for each strategy")
        given[placement.strategy] = (Path(path).name, placement)
    return given


def _extra_slots(name: str) -> int:
    """1 of `eplb+1`."""
    from rq_ep.core.errors import UserError, check_integer

    base, plus, number = name.partition("+")
    if not plus:
        return 0
    if base != "eplb" or not number.isdecimal() or len(number) > 6:
        raise UserError(f"--strategies {name}: only eplb takes slots beside the budget, such as eplb+1")
    return check_integer(f"--strategies {name}", int(number), 1, 4096)


def _redundant(extra_slots: int, stats: "ExpertStats", num_ranks: int) -> int:
    """Redundant experts that fill standard EP's slots and `extra_slots` more on each rank."""
    if not extra_slots:
        return 0
    slots = min(-(-stats.num_experts // num_ranks) + extra_slots, stats.num_experts)
    return slots * num_ranks - stats.num_experts


def _more(budget: str, extra_slots: int, stats: "ExpertStats", num_ranks: int) -> tuple[int, ...]:
    """[R] the budget and native experts for the extra slots of every layer."""
    from rq_ep.core.topology import Topology
    from rq_ep.placing.place import parse_budget

    num_ranks = Topology(num_ranks).num_ranks
    extra = extra_slots * stats.num_layers * stats.expert_bytes[stats.native_format]
    return tuple(size + extra for size in parse_budget(budget, stats, num_ranks))


def _uniform(stats: "ExpertStats") -> "ExpertStats":
    from rq_ep.core.stats import ExpertStats

    native = {stats.native_format: stats.expert_bytes[stats.native_format]}
    return ExpertStats.uniform(stats.layers, stats.num_experts, native, stats.native_format)


def _told(row: Row, result: "Simulation") -> dict[str, Any]:
    import numpy as np

    told = {
        "strategy": row.name,
        "placement": row.source,
        "imbalance_mean": float(result.seen.mean()),
        "imbalance_p90": float(np.percentile(result.seen, 90)),
        "imbalance_worst": float(result.seen.max()),
        "bytes_max": max(row.placement.bytes_R),
        "bytes": row.placement.bytes_R,
        "low_precision_share": result.low_precision_share,
        "transfers_per_step": float(result.transfers_SL.sum(axis=1).mean()),
    }
    if result.layer_s_SL is not None:
        told["modelled_step_s"] = float(result.layer_s_SL.sum(axis=1).mean())
    return told


def _report(rows: list[dict[str, Any]], num_steps: int, num_layers: int, machine: str | None) -> None:
    from rich.table import Table

    from rq_ep.commands.console import wide_console

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
    wide_console().print(table)
    print(f"{num_steps} steps of {num_layers} layers. MiB/rank: experts on the fullest rank.")
    print("low: share of pairs in low precision. moved: expert weights sent per step, all layers.")
    if any(row["placement"] == UNIFORM for row in rows):
        print(f"{UNIFORM}: no placement was given or calibrated for; the strategy placed by itself, on uniform load.")
    if machine:
        from rq_ep.costs import cost_model

        print("* modelled, not measured: the slowest rank of every layer, nothing overlapped.")
        print(f"  {machine}: {cost_model(machine).description}")
