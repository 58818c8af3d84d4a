"""The load of an expert in the objective: its pairs, their seconds, or the bytes (seconds) of reading its weights."""

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.stats import PHASES
from rq_ep.solver.objective.calibration_steps import LayerSteps
from rq_ep.solver.objective.precision import Formats


def loads_SE(problem: PlacementProblem, formats: Formats, steps: LayerSteps, format_E: IntArray) -> FloatArray:
    """[S, E] load of each expert in units of the step's mean rank load; under perfect balance every rank is at 1.

    In prefill an expert weighs its pairs, times the seconds of a pair in its format where a cost is given. In decode it
    weighs the bytes (or the seconds) of reading its weights, if it computes a pair: ranks are memory-bound then. Whole
    experts are read, so that the optimal split of this load is a little better than any plan can be.

    Args:
        problem: its objective and its cost.
        formats: what the problem allows.
        steps: counts of one layer.
        format_E: number of each expert's format among them.
    """
    weight_SE = weights_SE(problem, formats, steps, format_E)
    load_SE: FloatArray = weight_SE * (steps.num_ranks / weight_SE.sum(axis=1, keepdims=True))
    return load_SE


def weights_SE(problem: PlacementProblem, formats: Formats, steps: LayerSteps, format_E: IntArray) -> FloatArray:
    """[S, E] the same in pairs, bytes or seconds."""
    pair_cost_F, read_cost_F = _costs(problem, formats)
    by_pairs_SE: FloatArray = steps.counts_SE * pair_cost_F[format_E]
    if problem.objective == "prefill":
        return by_pairs_SE
    by_reading_SE: FloatArray = (steps.counts_SE > 0) * read_cost_F[format_E]
    if problem.objective == "decode":
        return by_reading_SE
    assert steps.phase_S is not None
    is_decode_S1 = (steps.phase_S == PHASES.index("decode"))[:, None]
    return np.where(is_decode_S1, by_reading_SE, by_pairs_SE)


def _costs(problem: PlacementProblem, formats: Formats) -> tuple[FloatArray, FloatArray]:
    """[F] cost of a pair and [F] cost of reading an expert, in each format."""
    cost, names = problem.cost, formats.names
    if cost is None:
        return np.ones(len(names)), formats.bytes_F.astype(np.float64)
    pair_cost_F = np.array([cost.pair_s[name] for name in names])
    return pair_cost_F, np.array([cost.stream_s[name] + cost.overhead_s.get(name, 0.0) for name in names])
