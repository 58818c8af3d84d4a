"""`place`: from statistics and a budget to a placement, anew or from the one that serves now."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rq_ep.config import StrategyConfig
from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import UserError
from rq_ep.core.options import parse_bytes, selected, takes_options
from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem, SolverOptions, standard_ep_bytes
from rq_ep.core.rules import Rules
from rq_ep.core.stats import ExpertStats
from rq_ep.core.strategy import Strategy
from rq_ep.core.topology import Topology
from rq_ep.placing.engine_slots import EqualSlotsEplb
from rq_ep.placing.placement_settings import PlacementSettings
from rq_ep.solver.certificate.what_if import what_if as place_with_changes
from rq_ep.solver.migration.warm_start import place_again, survivors_of
from rq_ep.strategies import make_strategy, names_where
from rq_ep.strategies.eplb import Eplb

DEFAULT_STRATEGY = "rq"


@takes_options(PlacementSettings)
def place(
    stats: ExpertStats | str | Path,
    num_ranks: int,
    budget: str | int | Sequence[int] | None = "ep",
    settings: PlacementSettings | None = None,
    *,
    cost: LayerCost | None = None,
    equal_slots: bool = False,
    on_progress: Callable[[float], None] = lambda fraction: None,
    **options: Any,
) -> Placement:
    """Place a model's experts on `num_ranks` ranks.

    Args:
        stats: what `calibrate` returned, or the file it was written to.
        num_ranks: ranks of the expert-parallel group.
        budget: expert bytes of each rank, over all layers: `ep` for what standard EP's fullest rank takes, a number,
            text such as `80GiB` or `10GiB,12GiB` (one for each rank; 0: the rank shall hold nothing), a sequence, or
            None for no limit.
        settings: how to place; default: `PlacementSettings()`.
        cost: of a layer on the machine that will serve; pairs and bytes are weighed by it.
        equal_slots: place for an engine of equal slots, one format and even splits: eplb, then a search from there.
        on_progress: called with the fraction done, now and then.
        options: fields of `PlacementSettings` that differ from `settings`.

    Raises:
        UserError: an argument is out of range, or the budget too small (the message says what would do).
    """
    settings = replace(settings or PlacementSettings(), **options)
    if not isinstance(stats, ExpertStats):
        stats = ExpertStats.load(stats)
    if not stats.num_layers or not stats.num_experts:
        raise UserError(
            f"{stats.source}: {stats.num_layers} MoE layers of {stats.num_experts} experts: nothing to place"
        )
    if not stats.counts.any():
        raise UserError(f"{stats.source}: 0 routed pairs in {stats.num_steps} steps: calibrate again, on more text")
    topology = Topology(num_ranks, settings.ranks_per_node)
    strategy = _strategy(settings, equal_slots)
    problem = PlacementProblem(
        stats,
        topology,
        parse_budget(budget, stats, num_ranks) if isinstance(budget, str) else _as_tuple(budget, num_ranks),
        formats=tuple(dict.fromkeys(settings.formats or ([stats.native_format] if equal_slots else stats.formats))),
        cost=cost,
        rules=_rules(settings.rules),
        on_progress=on_progress,
        **selected(SolverOptions, settings),
    )
    current = settings.current
    survivors = None if current is None else survivors_of(current, stats, num_ranks, settings.lost_ranks)
    if survivors is None and (settings.lost_ranks or settings.max_moved_bytes is not None or settings.move_price):
        raise UserError("--lost-ranks, --max-moved-bytes and --move-price speak of the way from --current: name that")
    try:
        placement = (
            strategy.place(problem)
            if survivors is None
            else place_again(strategy, problem, survivors, settings.min_gain)
        )
    except UserError as error:
        if settings.num_redundant_experts and budget == "ep":
            raise UserError(
                f"--num-redundant-experts {settings.num_redundant_experts} needs more bytes than --budget ep, "
                f"which is what standard EP takes ({error})"
            ) from None
        raise
    if not settings.what_if:
        return placement
    quiet = replace(problem, on_progress=lambda fraction: None, max_moved_bytes=None, move_price=0.0)
    rows = place_with_changes(quiet, strategy)
    return replace(placement, certificate={**placement.certificate, "what_if": rows})


def _strategy(settings: PlacementSettings, equal_slots: bool) -> Strategy:
    """The strategy of the settings; a `UserError` refuses one that cannot do what they ask for."""
    strategy = settings.strategy or (Eplb.name if equal_slots else DEFAULT_STRATEGY)
    if isinstance(strategy, str):
        config = StrategyConfig.parse(strategy)
        strategy = make_strategy(config.name, **config.settings)
    if settings.num_redundant_experts and not strategy.counts_replicas:
        able = " and ".join(names_where(lambda kind: kind.counts_replicas))
        raise UserError(
            f"--num-redundant-experts {settings.num_redundant_experts}: only {able} counts replicas; strategy "
            f"{strategy.name!r} goes by --budget"
        )
    if not equal_slots:
        return strategy
    if strategy != Eplb():
        raise UserError(f"--for: these engines split evenly over equal slots; place with eplb, not {strategy.name!r}")
    return EqualSlotsEplb()


def _rules(rules: Rules | str | Path | None) -> Rules:
    if isinstance(rules, Rules):
        return rules
    return Rules() if rules is None else Rules.load(rules)


def parse_budget(text: str, stats: ExpertStats, num_ranks: int) -> tuple[int, ...]:
    """[R] expert bytes of each rank from `ep`, one size, or a comma-separated size for each rank."""
    if text.strip().lower() == "ep":
        return (standard_ep_bytes(stats, num_ranks),) * num_ranks
    parts = text.split(",")
    sizes = tuple(parse_bytes(part, "--budget", text, least=0 if len(parts) > 1 else 1) for part in parts)
    if len(sizes) not in (1, num_ranks):
        raise UserError(f"--budget {text}: {len(sizes)} sizes for {num_ranks} ranks; give one, or one for each rank")
    return sizes * num_ranks if len(sizes) == 1 else sizes


def _as_tuple(budget: int | Sequence[int] | None, num_ranks: int) -> tuple[int, ...] | None:
    if budget is None:
        return None
    return tuple(budget) if isinstance(budget, Iterable) else (budget,) * num_ranks
