"""What more bytes or more low-precision tokens would buy, and how well the method holds on steps it did not see."""

from dataclasses import replace
from typing import Any, NamedTuple

from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.stats import ExpertStats
from rq_ep.core.strategy import Strategy
from rq_ep.solver.certificate.generalization import mean_of
from rq_ep.solver.objective.calibration_steps import layer_steps, spread_steps
from rq_ep.solver.objective.objective import evaluator_of, step_balances

GIB = 2**30
MORE_BUDGET = 0.1  # of the budget
SMALLEST_SHARE, LARGEST_SHARE = 0.01, 10  # of the budget that a GiB is, for a row about one GiB more
MORE_LOW = 0.05  # of all pairs


class Change(NamedTuple):
    """A problem with one limit moved."""

    name: str
    problem: PlacementProblem


def changes(problem: PlacementProblem) -> list[Change]:
    """The limits worth asking about; those that do not limit this problem are left out."""
    moved = []
    if problem.budget_bytes_R is not None:
        budget_R = problem.budget_bytes_R
        more_R = tuple(size + int(size * MORE_BUDGET) for size in budget_R)
        gib_R = tuple(size + GIB if size else 0 for size in budget_R)  # a rank of no bytes is meant to stay empty
        moved.append(Change(f"{MORE_BUDGET:.0%} more bytes", replace(problem, budget_bytes_R=more_R)))
        share = GIB / max(max(budget_R), 1)
        if SMALLEST_SHARE < share < LARGEST_SHARE:
            moved.append(Change(f"1 GiB per rank more ({share:.1%})", replace(problem, budget_bytes_R=gib_R)))
    has_low = any(problem.stats.expert_bytes[name] < problem.native_bytes for name in problem.formats)
    if has_low and problem.max_low_precision_share < 1:
        share = min(problem.max_low_precision_share + MORE_LOW, 1)
        moved.append(Change(f"low pairs up to {share:.0%}", replace(problem, max_low_precision_share=share)))
    return moved


def what_if(problem: PlacementProblem, strategy: Strategy) -> list[dict[str, Any]]:
    """Place again with each limit moved, and for the first half of the record alone.

    Args:
        problem: as it was solved.
        strategy: places once for each row.

    Returns:
        rows for the certificate: `change`, `predicted` and `bound`; the last, if the record can be halved, holds what
        is `held_out`: predicted on the second half for the placement made for the first.
    """
    rows = [_row(change.name, strategy.place(change.problem)) for change in changes(problem)]
    half = problem.stats.num_steps // 2
    if half:
        first = replace(problem, stats=_some_steps(problem.stats, slice(None, half)))
        second = replace(problem, stats=_some_steps(problem.stats, slice(half, None)))
        placement = strategy.place(first)
        held_out = _predicted(placement, second, strategy)
        rows.append({**_row("placed for half of the record", placement), "held_out": held_out})
    return rows


def _row(change: str, placement: Placement) -> dict[str, Any]:
    return {"change": change, **{name: placement.certificate[name] for name in ("predicted", "bound")}}


def _predicted(placement: Placement, problem: PlacementProblem, strategy: Strategy) -> float:
    """max/mean of a placement on the steps of another problem that the strategy's certificate would look at."""
    split = evaluator_of(problem, strategy)
    steps = layer_steps(problem, spread_steps(problem, strategy.max_steps))
    return mean_of([balance.ratio_S for balance in step_balances(problem, placement.layers, steps, split)])


def _some_steps(stats: ExpertStats, chosen: slice) -> ExpertStats:
    per_step = {
        name: getattr(stats, name)[chosen]
        for name in ("counts", "tokens", "phase", "domain")
        if getattr(stats, name) is not None
    }
    return replace(stats, **per_step)
