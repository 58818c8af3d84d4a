"""`rq-ep simulate`: recorded loads replayed through several strategies' own planners."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rq_ep.commands.common import StrategyOptions, check_outputs, layer_cost, parse_strategies
from rq_ep.commands.place import PlaceOptions
from rq_ep.commands.reports.simulate_report import UNIFORM, rebalancing_of, report, row_of
from rq_ep.config import add_flags, read_settings
from rq_ep.core.errors import UserError
from rq_ep.core.files.documents import write_json
from rq_ep.core.options import option, options_of, same_option
from rq_ep.core.rebalance_options import REBALANCING, RebalanceOptions
from rq_ep.core.stats import ExpertStats
from rq_ep.placing.placement_settings import PlacementSettings
from rq_ep.rebalancing.live_placement import LivePlacement
from rq_ep.sim.contenders import Contender, load_placements, place_for, split_name, uniform_load
from rq_ep.sim.replayed_steps import ReplayedSteps
from rq_ep.sim.simulator import simulate
from rq_ep.sim.traces import RoutingTrace
from rq_ep.strategies import STRATEGIES

if TYPE_CHECKING:
    from rich.progress import Progress

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

    @property
    def placement_settings(self) -> PlacementSettings:
        """How contenders without a placement place."""
        return PlacementSettings(
            ranks_per_node=self.ranks_per_node,
            formats=self.formats,
            max_low_precision_share=self.max_low_precision_share,
            time_limit_s=self.time_limit_s,
        )


def configure(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, SimulateOptions)


def run(args: argparse.Namespace) -> None:
    from rq_ep.commands.progress_bar import progress_bar

    options = read_settings(SimulateOptions, args)
    _check_rebalancing(options)
    stats = ExpertStats.load(options.stats)
    trace = None if options.trace is None else RoutingTrace.load(options.trace)
    replayed = ReplayedSteps.of(stats, trace, options.max_steps)
    check_outputs(
        {"--json": options.json}, [options.stats, options.trace, options.calibration, options.start, *options.placement]
    )
    cost = layer_cost(options.machine, stats)
    rows = []
    with progress_bar() as bar:
        for contender in _contenders(options, stats, partial(_placing_progress, bar)):
            on_step = partial(bar.advance, bar.add_task(f"replaying {contender.name}", total=replayed.num_steps))
            steps = replayed.counts(options.num_ranks)
            live = _live_placement(options, stats, contender)
            result = simulate(contender.strategy, contender.placement, steps, stats.native_format, cost, on_step, live)
            row = row_of(contender, result, replayed.by_phase)
            rows.append(row | (rebalancing_of(result, live) if options.rebalance == "auto" else {}))
    report(rows, replayed, options.machine)
    if options.json:
        write_json(options.json, rows)


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


def _contenders(
    options: SimulateOptions, stats: ExpertStats, placing: Callable[[str], Callable[[float], None]]
) -> Iterator[Contender]:
    """Strategies with their placements, one after another; all names and files are checked before the first."""
    given = load_placements(options.placement, stats, options.num_ranks)
    names = list(dict.fromkeys([*options.strategies, *given]))  # what was given is shown, named or not
    bases = {name: split_name(name)[0] for name in names}
    strategies = parse_strategies(bases.values(), options.strategy_settings)
    calibration, source, settings = uniform_load(stats), UNIFORM, options.placement_settings
    if (path := options.calibration or options.start) is not None:
        calibration, source = ExpertStats.load(path), Path(path).name
        if (calibration.layers, calibration.num_experts) != (stats.layers, stats.num_experts):
            raise UserError(
                f"{path}: {calibration.num_experts} experts in {calibration.num_layers} layers, but "
                f"{options.stats} has {stats.num_experts} in {stats.num_layers}: calibrate the model that is replayed"
            )
        if stats.model is not None and calibration.model is not None:
            stats.model.check(calibration.model, path)
    elif options.rebalance == "auto":  # --formats are of the placements that come later
        settings = replace(settings, formats=None)
    for name in names:
        strategy = strategies[bases[name]]
        if name in given:
            yield Contender(name, strategy, given[name][1], given[name][0])
            continue
        on_progress = placing(name)
        placement = place_for(name, strategy, calibration, options.num_ranks, options.budget, settings, on_progress)
        on_progress(1.0)
        yield Contender(name, strategy, placement, source)


def _live_placement(options: SimulateOptions, stats: ExpertStats, contender: Contender) -> LivePlacement | None:
    """The contender's placement as one that follows the load; None: it stays."""
    if options.rebalance == "off":
        return None
    # Without --start the load is learnt; what a format does to an expert can be told from its weights.
    known = (
        replace(stats, importance=None, visits=None, gate_mass=None, kl=None)
        if options.start is None
        else ExpertStats.load(options.start)
    )
    return contender.following(known, options.placement_settings, options, options.rebalance_delay)


def _placing_progress(bar: "Progress", name: str) -> Callable[[float], None]:
    """A line of the progress bar for one strategy that places."""
    task = bar.add_task(f"placing {name}", total=100)
    return lambda fraction: bar.update(task, completed=100 * fraction)
