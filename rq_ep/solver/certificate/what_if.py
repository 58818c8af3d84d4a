"""What more bytes or more low-precision tokens would buy, and how well the method holds on steps it did not see."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.stats import ExpertStats
from rq_ep.solver.certificate.certify import MAX_STEPS
from rq_ep.solver.certificate.generalization import mean_of
from rq_ep.solver.objective.calibration_steps import layer_steps, spread_steps
from rq_ep.solver.objective.objective import judge_as_asked
from rq_ep.solver.objective.step_balance import SplitRule

GIB = 2**30
MORE_BUDGET = 0.1  # of the budget
SMALLEST_SHARE, LARGEST_SHARE = 0.01, 10  # of the budget that a GiB is, where it is asked about as well
MORE_LOW = 0.05  # of all pairs


class Change(NamedTuple):
    """A problem with one limit moved."""

    name: str
    problem: PlacementProblem


def changes(problem: PlacementProblem) -> list[Change]:
    """The limits worth asking about; those that do not limit this problem are left out."""
    found = []
    if problem.budget_bytes_R is not None:
        budget_R = problem.budget_bytes_R
        more_R = tuple(size + int(size * MORE_BUDGET) for size in budget_R)
        gib_R = tuple(size + GIB if size else 0 for size in budget_R)  # a rank of no bytes is meant to stay empty
        found.append(Change(f"{MORE_BUDGET:.0%} more bytes", replace(problem, budget_bytes_R=more_R)))
        share = GIB / max(max(budget_R), 1)
        if SMALLEST_SHARE < share < LARGEST_SHARE:
            found.append(Change(f"1 GiB per rank more ({share:.1%})", replace(problem, budget_bytes_R=gib_R)))
    has_low = any(problem.stats.expert_bytes[name] < problem.native_bytes for name in problem.formats)
    if has_low and problem.max_low_precision_share < 1:
        share = min(problem.max_low_precision_share + MORE_LOW, 1)
        found.append(Change(f"low pairs up to {share:.0%}", replace(problem, max_low_precision_share=share)))
    return found


def what_if(problem: PlacementProblem, solve: Callable[[PlacementProblem], Placement]) -> list[dict[str, Any]]:
    """Solve again with each limit moved, and for the first half of the record alone.

    Args:
        problem: as it was solved.
        solve: the strategy; it is called once for each row.

    Returns:
        rows for the certificate: `change`, `predicted` and `bound`; the last, if the record can be halved, holds what
        is `held_out`: predicted on the second half for the placement made for the first.
    """
    rows = []
    for change in changes(problem):
        found = solve(change.problem).certificate
        rows.append({"change": change.name, "predicted": found["predicted"], "bound": found["bound"]})
    half = problem.stats.num_steps // 2
    if half:
        first = replace(problem, stats=_some_steps(problem.stats, slice(None, half)))
        second = replace(problem, stats=_some_steps(problem.stats, slice(half, None)))
        placement = solve(first)
        rows.append(
            {
                "change": "placed for half of the record",
                "predicted": placement.certificate["predicted"],
                "bound": placement.certificate["bound"],
                "held_out": _predicted(placement, second),
            }
        )
    return rows


def _predicted(placement: Placement, problem: PlacementProblem) -> float:
    """max/mean of a placement on the steps of another problem that a certificate would look at, under its own split."""
    rule: SplitRule = placement.certificate["split"]
    steps = layer_steps(problem, spread_steps(problem, MAX_STEPS))
    return mean_of(
        [
            judge_as_asked(problem, layer, of_layer, rule).ratio_S
            for layer, of_layer in zip(placement.layers, steps, strict=True)
        ]
    )


def _some_steps(stats: ExpertStats, chosen: slice) -> ExpertStats:
    per_step = {
        name: getattr(stats, name)[chosen]
        for name in ("counts", "tokens", "phase", "domain")
        if getattr(stats, name) is not None
    }
    return replace(stats, **per_step)
