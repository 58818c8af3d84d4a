"""Settings of `place`: what the command line, a file or a call of `rq_ep.place` may say of a placement."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rq_ep.core.options import check_options, option
from rq_ep.core.placement import Placement
from rq_ep.core.problem import LIMITS, MIGRATION, SEARCH, SolverOptions
from rq_ep.core.rules import Rules
from rq_ep.core.strategy import Strategy
from rq_ep.solver.migration.warm_start import MIN_GAIN
from rq_ep.strategies import STRATEGIES


@dataclass(frozen=True, kw_only=True)
class PlacementSettings(SolverOptions):
    """How experts are placed; see `SolverOptions` for the limits that every strategy keeps."""

    ranks_per_node: int = option(0, help="ranks on a node; 0: all ranks share one", minimum=0)
    formats: Sequence[str] | None = option(
        None, help="weight formats that may be used, by commas; default: all that were measured", group=LIMITS
    )
    rules: Rules | str | Path | None = option(
        None,
        help="YAML file: `fixed` and `forbidden` lists of {layer: 3, expert: 0-7, rank: [0, 1]} (what is not named is "
        "all), `spread_nodes: true` for replicas on different nodes, `whole_groups: true` for expert groups on one",
        metavar="FILE",
        group=LIMITS,
    )
    strategy: Strategy | str | None = option(
        None,
        help=f"strategy that places: {', '.join(STRATEGIES)} or package.module:Class; with settings "
        "{name: llep, max_borrowed: 2}; default: rq, or eplb for engines of equal slots",
        group=SEARCH,
    )
    what_if: bool = option(
        False,
        help="solve again with 10% more bytes, a GiB more per rank (if that is 1% to ten times the budget), 5 points "
        "more low pairs, and for half the record",
        group=SEARCH,
    )
    current: Placement | str | Path | None = option(
        None,
        help="the placement that serves now: staying, moving in part and moving all are compared; it may have another "
        "number of ranks",
        metavar="FILE",
        group=MIGRATION,
    )
    lost_ranks: Sequence[int] = option(
        (),
        help="ranks of the current placement that are gone, by commas; the others close up, and what they hold is used "
        "again",
        minimum=0,
        group=MIGRATION,
    )
    min_gain: float = option(
        MIN_GAIN,
        help="max/mean by which a placement must be better than the current one, which stays otherwise",
        minimum=0,
        group=MIGRATION,
    )

    def __post_init__(self) -> None:
        check_options(self)
