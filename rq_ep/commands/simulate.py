"""`rq-ep simulate`: recorded loads replayed through several strategies' own planners."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rq_ep.commands.common import StrategyOptions, layer_cost, parse_strategies
from rq_ep.commands.place import PlaceOptions
from rq_ep.config import add_flags, read_settings
from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError, check_integer
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.core.options import option, options_of, same_option
from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.rebalance_options import REBALANCING, RebalanceOptions
from rq_ep.core.stats import PHASES, ExpertStats
from rq_ep.core.strategy import Strategy
from rq_ep.core.topology import Topology
from rq_ep.placing.place import parse_budget, place
from rq_ep.rebalancing.live_placement import LivePlacement
from rq_ep.rebalancing.rebalancer import Rebalancer
from rq_ep.sim.simulator import Simulation, simulate
from rq_ep.sim.traces import RoutingTrace
from rq_ep.strategies import STRATEGIES, names_where, strategy_class

if TYPE_CHECKING:
    from rich.progress import Progress

UNIFORM = "(uniform)"
PLACEMENTS = "placements: given, or made here"


@dataclass(frozen=True, kw_only=True)
class SimulateOptions(StrategyOptions, RebalanceOptions):
    """What `rq-ep simulate` takes."""

    stats: str = option("", help="loads to replay, best held out from placing", required=True, metavar="FILE")
    num_ranks: int = same_option(PlaceOptions, "num_ranks", help="ranks that the loads are divided among")
    trace: str | None = option(
        None,
        help="replay the tokens of this recorded routing instead; sizes are still those of --stats",
        metavar="FILE",
    )
    strategies: Sequence[str] = option(
        ("standard", "eplb", "llep", "rq"),
        help=f"strategies to replay, by commas: {', '.join(STRATEGIES)} or package.module:Class; eplb+1 has "
        "one slot more on every rank and layer than --budget allows",
    )
    max_steps: int | None = option(None, help="replay so many steps at most, spread over the record", minimum=1)
    machine: str | None = option(
        None,
        help="add seconds: by the rates of h200, h100, a100, cpu or of a YAML file, or by the JSON file of "
        "`rq-ep profile`",
    )
    json: str | None = option(None, help="write the rows as JSON as well", metavar="FILE")
    placement: Sequence[str] = option(
        (),
        help="placements, at most one of each strategy, served by the strategy that made them",
        several=True,
        metavar="FILE",
        group=PLACEMENTS,
    )
    calibration: str | None = option(
        None,
        help="statistics on which strategies without a placement place; without them they place on uniform load",
        metavar="FILE",
        group=PLACEMENTS,
    )
    budget: str = same_option(
        PlaceOptions, "budget", help="expert bytes of each rank, as for `rq-ep place`", group=PLACEMENTS
    )
    max_low_precision_share: float = same_option(PlaceOptions, "max_low_precision_share", group=PLACEMENTS)
    ranks_per_node: int = same_option(PlaceOptions, "ranks_per_node", group=PLACEMENTS)
    time_limit_s: float | None = same_option(
        PlaceOptions, "time_limit_s", help="seconds of each search, as for `rq-ep place`", group=PLACEMENTS
    )
    start: str | None = option(
        None,
        help="with --rebalance: statistics on which the placement is made that serves at first; default: standard EP's "
        "blocks, from which strategies learn",
        metavar="FILE",
        group=REBALANCING,
    )
    rebalance_delay: int = option(
        0, help="steps from a decision's request to its answer: how long planning takes", minimum=0, group=REBALANCING
    )
    formats: Sequence[str] | None = same_option(
        PlaceOptions,
        "formats",
        help="weight formats that may be used, by commas; default: all that were measured",
        group=PLACEMENTS,
    )


class Row(NamedTuple):
    """A row of the table: a strategy as `--strategies` names it, and the placement it serves."""

    name: str
    strategy: Strategy
    placement: Placement
    source: str  # where the placement is from


def configure(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, SimulateOptions)


def run(args: argparse.Namespace) -> None:
    from rq_ep.commands.progress_bar import progress_bar

    options = read_settings(SimulateOptions, args)
    _check_rebalancing(options)
    stats = ExpertStats.load(options.stats)
    trace = None if options.trace is None else RoutingTrace.load(options.trace)
    if trace is not None:
        trace.check(stats)
    replayed_S = _replayed_steps(stats.num_steps if trace is None else len(trace.tokens_S), options.max_steps)
    if not (stats.counts[replayed_S].any() if trace is None else trace.ids_NLK.size):
        what, remedy = (options.trace, "record again") if options.trace else (options.stats, "calibrate again")
        raise UserError(f"{what}: no routed pairs to replay; {remedy}, on more text")
    if options.json:
        check_writable(options.json)
    cost = layer_cost(options.machine, stats)
    phases = _steps_by_phase(stats.phase if trace is None else trace.phase_S, replayed_S)
    rebalances = options.rebalance == "auto"
    rows = []
    with progress_bar() as bar:
        for row in _rows(options, stats, partial(_placing_progress, bar)):
            on_step = partial(bar.advance, bar.add_task(f"replaying {row.name}", total=len(replayed_S)))
            steps = stats.counts[replayed_S] if trace is None else trace.steps(replayed_S, options.num_ranks)
            live = _live_placement(options, stats, row) if rebalances else None
            result = simulate(row.strategy, row.placement, steps, stats.native_format, cost, on_step, live)
            rows.append(_summary(row, result, phases) | (_rebalanced(result, live) if rebalances else {}))
    _report(rows, phases, len(replayed_S), stats.num_layers, options.machine)
    if options.json:
        write_json(options.json, rows)


def _steps_by_phase(phase_S: IntArray | None, replayed_S: IntArray) -> dict[str, IntArray]:
    """Phase -> its places among the replayed steps, in the order of `PHASES`; empty where steps have no phase."""
    if phase_S is None:
        return {}
    places = {name: np.flatnonzero(phase_S[replayed_S] == number) for number, name in enumerate(PHASES)}
    return {name: places_S for name, places_S in places.items() if places_S.size}


def _check_rebalancing(options: SimulateOptions) -> None:
    """Raise a `UserError` where settings of rebalancing are given and it is off, or two files for the beginning."""
    if options.rebalance == "off":
        declared = options_of(SimulateOptions)
        for name in (*options_of(RebalanceOptions), "start", "rebalance_delay"):
            item = declared[name]
            if getattr(options, name) != item.default:
                raise UserError(f"{item.flag} {getattr(options, name)}: needs --rebalance auto")
    if options.start is not None and options.calibration is not None:
        raise UserError(f"--start {options.start} and --calibration {options.calibration} say the same: give one")


def _live_placement(options: SimulateOptions, stats: ExpertStats, row: Row) -> LivePlacement | None:
    """The row's placement as one that follows the load; None: its strategy keeps what it has."""
    rule = row.strategy.rebalance_rule
    if rule is None:
        return None
    known = stats if options.start is None else ExpertStats.load(options.start)
    if options.start is None:  # the load is learnt; what a format does to an expert can be told from its weights
        known = replace(stats, importance=None, visits=None, gate_mass=None, kl=None)
    problem = PlacementProblem(
        known,
        row.placement.topology,
        row.placement.budget_bytes_R or row.placement.bytes_R,
        formats=tuple(dict.fromkeys(options.formats or known.formats)),
        max_low_precision_share=options.max_low_precision_share,
        time_limit_s=options.time_limit_s,
        num_redundant_experts=_redundant_experts(_extra_slots(row.name), stats, options.num_ranks),
    )
    return LivePlacement(
        Rebalancer(problem, row.strategy, row.placement, options.applied_to(rule)), options.rebalance_delay
    )


def _rebalanced(result: Simulation, live: LivePlacement | None) -> dict[str, Any]:
    """The figures of a row over time, as plain values."""
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


def _placing_progress(bar: "Progress", name: str) -> Callable[[float], None]:
    """A line of the progress bar for one strategy that places."""
    task = bar.add_task(f"placing {name}", total=100)
    return lambda fraction: bar.update(task, completed=100 * fraction)


def _replayed_steps(num_steps: int, max_steps: int | None) -> IntArray:
    """[S] the recorded steps to replay."""
    if max_steps is None:
        return np.arange(num_steps)
    number = min(max_steps, num_steps)
    return np.unique(((np.arange(number) + 0.5) * num_steps / number).astype(np.int64))


def _rows(
    options: SimulateOptions, stats: ExpertStats, placing: Callable[[str], Callable[[float], None]]
) -> Iterator[Row]:
    """Strategies with their placements, one after another; all names and files are checked before the first."""
    given = _load_placements(options, stats)
    names = list(dict.fromkeys([*options.strategies, *given]))  # what was given is shown, named or not
    extra = {name: _extra_slots(name) for name in names}
    strategies = parse_strategies([name.partition("+")[0] for name in names], options.strategy_settings)
    calibration, source = _uniform(stats), UNIFORM
    if (path := options.calibration or options.start) is not None:
        calibration, source = ExpertStats.load(path), Path(path).name
        if (calibration.layers, calibration.num_experts) != (stats.layers, stats.num_experts):
            raise UserError(
                f"{path}: {calibration.num_experts} experts in {calibration.num_layers} layers, but "
                f"{options.stats} has {stats.num_experts} in {stats.num_layers}: calibrate the model that is replayed"
            )
    for name in names:
        strategy = strategies[name.partition("+")[0]]
        if name in given:
            yield Row(name, strategy, given[name][1], given[name][0])
            continue
        on_progress = placing(name)
        placement = place(
            calibration,
            options.num_ranks,
            _budget(options.budget, extra[name], calibration, options.num_ranks),
            strategy=strategy,
            ranks_per_node=options.ranks_per_node,
            formats=None if options.rebalance == "auto" and source == UNIFORM else options.formats,
            max_low_precision_share=options.max_low_precision_share,
            num_redundant_experts=_redundant_experts(extra[name], calibration, options.num_ranks),
            time_limit_s=options.time_limit_s,
            on_progress=on_progress,
        )
        on_progress(1.0)
        yield Row(name, strategy, placement, source)


def _load_placements(options: SimulateOptions, stats: ExpertStats) -> dict[str, tuple[str, Placement]]:
    """Strategy -> the name of its file and the placement, each checked against the statistics."""
    given: dict[str, tuple[str, Placement]] = {}
    for path in options.placement:
        placement = Placement.load(path)
        placement.check_serves(stats.model, options.num_ranks, path)
        shape = {layer.index: layer.num_experts for layer in placement.layers}
        if shape != dict.fromkeys(stats.layers, stats.num_experts):
            raise UserError(
                f"{path}: experts per layer {shape}, but {options.stats} has {stats.num_experts} "
                f"in each of the layers {', '.join(map(str, stats.layers))}"
            )
        placement.check_bytes(stats.expert_bytes, path)
        if placement.strategy in given:
            raise UserError(f"{path}: a second placement made by {placement.strategy!r}; give one for each strategy")
        given[placement.strategy] = (Path(path).name, placement)
    return given


def _extra_slots(name: str) -> int:
    """The number behind the plus of a name such as `eplb+1`."""
    base, plus, number = name.partition("+")
    if not plus:
        return 0
    if not strategy_class(base).counts_replicas or not number.isdecimal() or len(number) > 6:
        able = " and ".join(names_where(lambda kind: kind.counts_replicas))
        raise UserError(f"--strategies {name}: only {able} takes slots beside the budget, such as eplb+1")
    return check_integer(f"--strategies {name}", int(number), 1, 4096)


def _redundant_experts(extra_slots: int, stats: ExpertStats, num_ranks: int) -> int:
    """Redundant experts that fill standard EP's slots and `extra_slots` more on each rank."""
    if not extra_slots:
        return 0
    slots = min(-(-stats.num_experts // num_ranks) + extra_slots, stats.num_experts)
    return slots * num_ranks - stats.num_experts


def _budget(budget: str, extra_slots: int, stats: ExpertStats, num_ranks: int) -> tuple[int, ...]:
    """[R] the budget and native experts for the extra slots of every layer."""
    num_ranks = Topology(num_ranks).num_ranks
    extra = extra_slots * stats.num_layers * stats.expert_bytes[stats.native_format]
    return tuple(size + extra for size in parse_budget(budget, stats, num_ranks))


def _uniform(stats: ExpertStats) -> ExpertStats:
    """Statistics of the same model in which every expert is equally busy."""
    native = {stats.native_format: stats.expert_bytes[stats.native_format]}
    return ExpertStats.uniform(stats.layers, stats.num_experts, native, stats.native_format)


def _summary(row: Row, result: Simulation, phases: Mapping[str, IntArray]) -> dict[str, Any]:
    """The figures of a row, as plain values."""
    by_phase = {name: result.imbalance_SL[places_S] for name, places_S in phases.items()}
    summary: dict[str, Any] = {
        "strategy": row.name,
        "placement": row.source,
        "imbalance_mean": float(result.imbalances.mean()),
        "imbalance_mean_by_phase": {
            name: float(np.nanmean(values_SL)) for name, values_SL in by_phase.items() if np.isfinite(values_SL).any()
        },
        "imbalance_p90": float(np.percentile(result.imbalances, 90)),
        "imbalance_worst": float(result.imbalances.max()),
        "bytes_max": max(row.placement.bytes_R),
        "bytes": row.placement.bytes_R,
        "low_precision_share": result.low_precision_share,
        "transfers_per_step": float(result.transfers_SL.sum(axis=1).mean()),
    }
    if result.layer_s_SL is not None:
        summary["modelled_step_s"] = float(result.layer_s_SL.sum(axis=1).mean())
    return summary


def _report(
    rows: list[dict[str, Any]], phases: Mapping[str, IntArray], num_steps: int, num_layers: int, machine: str | None
) -> None:
    from rich.table import Table

    from rq_ep.commands.console import wide_console

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
    wide_console().print(table)
    parts = ", ".join(f"{places_S.size} of {name}" for name, places_S in phases.items())
    print(f"{num_steps} steps{parts and f' ({parts})'} of {num_layers} layers. MiB/rank: experts on the fullest rank.")
    print("low: share of pairs in low precision. moved: expert weights sent per step, all layers.")
    if rebalances:
        print("rebalances: placements that were replaced, expert by expert; MiB moved: what ranks received for that.")
    if any(row["placement"] == UNIFORM for row in rows):
        print(f"{UNIFORM}: no placement was given or calibrated for; the strategy placed by itself, on uniform load.")
    if machine:
        from rq_ep.costs import cost_model

        print("* modelled, not measured: the slowest rank of every layer, nothing overlapped.")
        print(f"  {machine}: {cost_model(machine).description}")
