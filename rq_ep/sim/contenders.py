"""The contenders of a replay: strategies, each with the placement that it serves or, rebalancing, begins from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rq_ep.core.errors import UserError, check_integer
from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.rebalance_options import RebalanceOptions
from rq_ep.core.stats import ExpertStats
from rq_ep.core.strategy import Strategy
from rq_ep.core.topology import Topology
from rq_ep.placing.place import parse_budget, place
from rq_ep.placing.placement_settings import PlacementSettings
from rq_ep.rebalancing.live_placement import LivePlacement
from rq_ep.rebalancing.rebalancer import Rebalancer
from rq_ep.strategies import names_where, strategy_class


@dataclass(frozen=True)
class Contender:
    """A strategy and the placement that it serves at first."""

    name: str  # as it was asked for: `eplb+1` has one slot more on every rank and layer than the budget allows
    strategy: Strategy
    placement: Placement
    source: str  # where the placement is from

    def following(
        self, known: ExpertStats, settings: PlacementSettings, options: RebalanceOptions, delay_steps: int
    ) -> LivePlacement | None:
        """Its placement as one that follows the load; None: the strategy keeps what it has.

        Args:
            known: statistics of the model; their loads do not count.
            settings: what every new placement must keep to, besides the bytes of the one that serves.
            options: what the user says of rebalancing.
            delay_steps: steps from a decision's request to its answer.
        """
        rule = self.strategy.rebalance_rule
        if rule is None:
            return None
        problem = PlacementProblem(
            known,
            self.placement.topology,
            self.placement.budget_bytes_R or self.placement.bytes_R,
            formats=tuple(dict.fromkeys(settings.formats or known.formats)),
            max_low_precision_share=settings.max_low_precision_share,
            time_limit_s=settings.time_limit_s,
            num_redundant_experts=_redundant_experts(self.name, known, self.placement.topology.num_ranks),
        )
        rebalancer = Rebalancer(problem, self.strategy, self.placement, options.applied_to(rule))
        return LivePlacement(rebalancer, delay_steps)


def split_name(name: str) -> tuple[str, int]:
    """The strategy and the slots beside the budget that a name such as `eplb+1` asks for.

    Raises:
        UserError: there is no such strategy, or it does not count slots.
    """
    base, plus, number = name.partition("+")
    kind = strategy_class(base)
    if not plus:
        return base, 0
    if not kind.counts_replicas or not number.isdecimal() or len(number) > 6:
        able = " and ".join(names_where(lambda kind: kind.counts_replicas))
        raise UserError(f"--strategies {name}: only {able} takes slots beside the budget, such as eplb+1")
    return base, check_integer(f"--strategies {name}", int(number), 1, 4096)


def load_placements(paths: Sequence[str], stats: ExpertStats, num_ranks: int) -> dict[str, tuple[str, Placement]]:
    """Read placements, at most one of each strategy.

    Args:
        paths: their files.
        stats: of the model and steps that are replayed.
        num_ranks: of the group.

    Returns:
        Strategy -> the name of its file, and the placement.

    Raises:
        UserError: one that does not fit the model or the ranks, or a second one of a strategy.
    """
    given: dict[str, tuple[str, Placement]] = {}
    for path in paths:
        placement = Placement.load(path)
        placement.check_serves(stats.model, num_ranks, path)
        placement.check_stats(stats, path)
        if placement.strategy in given:
            raise UserError(f"{path}: a second placement made by {placement.strategy!r}; give one for each strategy")
        given[placement.strategy] = (Path(path).name, placement)
    return given


def place_for(
    name: str,
    strategy: Strategy,
    stats: ExpertStats,
    num_ranks: int,
    budget: str,
    settings: PlacementSettings,
    on_progress: Callable[[float], None],
) -> Placement:
    """Make the placement of a contender.

    Args:
        name: of the contender, which may ask for slots beside the budget.
        strategy: that places.
        stats: on which.
        num_ranks: of the group.
        budget: expert bytes of each rank, as for `place`.
        settings: limits, as for `place`.
        on_progress: called with the fraction done.
    """
    _, slots = split_name(name)
    slot_bytes = slots * stats.num_layers * stats.expert_bytes[stats.native_format]
    return place(
        stats,
        num_ranks,
        [size + slot_bytes for size in parse_budget(budget, stats, Topology(num_ranks).num_ranks)],
        settings,
        strategy=strategy,
        num_redundant_experts=_redundant_experts(name, stats, num_ranks),
        on_progress=on_progress,
    )


def _redundant_experts(name: str, stats: ExpertStats, num_ranks: int) -> int:
    """Redundant experts that fill standard EP's slots and those beside the budget on each rank; 0 without such."""
    _, slots = split_name(name)
    if not slots:
        return 0
    slots_of_rank = min(-(-stats.num_experts // num_ranks) + slots, stats.num_experts)
    return slots_of_rank * num_ranks - stats.num_experts


def uniform_load(stats: ExpertStats) -> ExpertStats:
    """Statistics of the same model in which every expert is equally busy."""
    native = {stats.native_format: stats.expert_bytes[stats.native_format]}
    return ExpertStats.uniform(stats.layers, stats.num_experts, native, stats.native_format)
