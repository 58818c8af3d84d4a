"""How well a balance predicted on calibration steps generalizes: to halves of the record, and to held-out steps."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.problem import PlacementProblem
from rq_ep.solver.objective.calibration_steps import layer_steps, pairs_by_step
from rq_ep.solver.objective.objective import step_balances
from rq_ep.solver.objective.step_balance import SplitEvaluator

FEWEST_STEPS = 16  # with fewer, held-out balance is clearly worse (measured: twice the excess at 8 steps)
ALIKE = 1.5  # steps are compared whose pairs differ by no larger a factor
NOTABLE = 0.03  # of max/mean: smaller differences are not worth a warning
STANDARD_ERRORS = 3.0  # beyond so many of them, a difference is taken to be real


def generalization(
    problem: PlacementProblem,
    layers: Sequence[LayerPlacement],
    split: SplitEvaluator,
    seen_S: IntArray,
    ratios: Sequence[FloatArray],
) -> dict[str, Any]:
    """Entries of a certificate: `halves`, `unseen` and `warnings`. Nothing is solved anew.

    Unseen steps are of the same record and of similar size, as small steps are never as even. They show over-fitting
    alone, not how the placement serves traffic of another kind.

    Args:
        problem: statistics, ranks and limits.
        layers: the placement.
        split: how it is served.
        seen_S: recorded steps that were looked at.
        ratios: max/mean of each of these, layer by layer.
    """
    first = [ratio_S[: len(ratio_S) // 2] for ratio_S in ratios]
    second = [ratio_S[len(ratio_S) // 2 :] for ratio_S in ratios]
    unseen: dict[str, Any] | None = None
    warnings = []
    num_seen = max((len(ratio_S) for ratio_S in ratios), default=0)
    if num_seen < FEWEST_STEPS:
        warnings.append(f"calibrated on {num_seen} steps, fewer than {FEWEST_STEPS}: record more text or smaller steps")
    if _differ(first, second):
        warnings.append(
            f"the load drifts: predicted {mean_of(first):.3f} on the first half of the record, {mean_of(second):.3f} "
            "on the second; place again as it moves on"
        )
    pairs_S = pairs_by_step(problem)
    usual = float(np.median(pairs_S[seen_S])) if len(seen_S) else 0.0
    alike_S = np.flatnonzero((pairs_S > 0) & (pairs_S >= usual / ALIKE) & (pairs_S <= usual * ALIKE))
    rest_S = np.setdiff1d(alike_S, seen_S)
    if len(rest_S):
        spread_S = rest_S[np.unique(np.linspace(0, len(rest_S) - 1, max(num_seen, 1)).astype(np.int64))]
        steps = layer_steps(problem, spread_S)
        others = [balance.ratio_S for balance in step_balances(problem, layers, steps, split)]
        unseen = {"steps": len(spread_S), "predicted": mean_of(others)}
        if mean_of(others) > mean_of(ratios) and _differ(ratios, others):
            warnings.append(
                f"over-fitted: predicted {mean_of(ratios):.3f} on the steps it was placed for, {mean_of(others):.3f} "
                f"on {len(spread_S)} others of the record; look at more steps"
            )
    return {"halves": [mean_of(first), mean_of(second)], "unseen": unseen, "warnings": warnings}


def mean_of(ratios: Sequence[FloatArray]) -> float:
    """max/mean, mean over the steps of each layer and then over layers; a layer without pairs is balanced."""
    return float(np.mean([ratio_S.mean() if len(ratio_S) else 1.0 for ratio_S in ratios]))


def _differ(one: Sequence[FloatArray], other: Sequence[FloatArray]) -> bool:
    """Whether two means differ notably, and by more than the scatter of their steps explains."""
    variance = sum(part.var(ddof=1) / len(part) for part in (*one, *other) if len(part) > 1)
    difference = abs(mean_of(one) - mean_of(other))
    return bool(difference > max(NOTABLE * mean_of(one), STANDARD_ERRORS * sqrt(variance) / len(one)))
