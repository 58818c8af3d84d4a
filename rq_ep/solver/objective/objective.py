"""The objective of a problem: to balance pairs, their seconds, or the reading of activated experts."""

from collections.abc import Sequence

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.stats import PHASES
from rq_ep.core.strategy import Strategy
from rq_ep.solver.objective.calibration_steps import LayerSteps
from rq_ep.solver.objective.expert_weights import weights_SE
from rq_ep.solver.objective.planner_replay import PlannerReplay
from rq_ep.solver.objective.precision import Formats
from rq_ep.solver.objective.step_balance import EvenSplit, ExactSplit, SplitEvaluator, StepBalance


def described(problem: PlacementProblem) -> str:
    """What `predicted` is, in the words of the certificate."""
    unit = "" if problem.cost is None else "seconds of "
    return {
        "prefill": f"max/mean of {unit}pairs over ranks",
        "decode": f"max/mean over ranks of {'seconds' if unit else 'bytes'} of reading activated experts",
        "mixed": f"max/mean over ranks of {unit}pairs in prefill steps, of reading activated experts in decode steps",
    }[problem.objective]


def is_plain(problem: PlacementProblem) -> bool:
    """Whether every pair of every step weighs the same."""
    return problem.objective == "prefill" and problem.cost is None


def evaluator_of(problem: PlacementProblem, strategy: Strategy) -> SplitEvaluator:
    """How the strategy splits steps: by its closed rule or, where it has none, by its planner."""
    match strategy.split:
        case None:
            return PlannerReplay(strategy, problem.topology, problem.cost)
        case "exact":
            return ExactSplit(problem.topology.num_ranks)
        case rule:
            return EvenSplit(problem.topology.num_ranks, rule)


def step_balance(
    problem: PlacementProblem, layer: LayerPlacement, steps: LayerSteps, split: SplitEvaluator
) -> StepBalance:
    """The balance of the steps over the layer, in the unit of the objective."""
    if is_plain(problem):
        return split.by_pairs(layer, steps.counts_SE)
    weight_SE, reads_S = _weights(problem, layer, steps)
    computed = split.by_pairs(layer, steps.counts_SE[~reads_S], weight_SE[~reads_S])
    read = split.by_reading(layer, steps.counts_SE[reads_S], weight_SE[reads_S])
    ratio_S = np.ones(len(reads_S))
    ratio_S[~reads_S] = computed.ratio_S
    ratio_S[reads_S] = read.ratio_S
    return StepBalance(ratio_S, computed.pairs_P + read.pairs_P)


def step_balances(
    problem: PlacementProblem, layers: Sequence[LayerPlacement], steps: Sequence[LayerSteps], split: SplitEvaluator
) -> list[StepBalance]:
    """The balance of each layer."""
    return [step_balance(problem, layer, of_layer, split) for layer, of_layer in zip(layers, steps, strict=True)]


def busiest_S(problem: PlacementProblem, layer: LayerPlacement, steps: LayerSteps, ratio_S: FloatArray) -> FloatArray:
    """[S] load of the busiest rank in pairs, bytes or seconds, which is comparable between formats of unlike means."""
    weight_SE = steps.counts_SE if is_plain(problem) else _weights(problem, layer, steps)[0]
    carried_S: FloatArray = ratio_S * weight_SE.sum(axis=1) / steps.num_ranks
    return carried_S


def least_ratio_S(problem: PlacementProblem, layer: LayerPlacement, steps: LayerSteps) -> FloatArray:
    """[S] lower bound on max/mean of every placement that stores experts in the same formats, whatever its bytes.

    An active expert is read whole by some rank; and of m active ones some rank reads at least ceil(m / ranks), no less
    than the smallest of them.
    """
    weight_SE, reads_S = _weights(problem, layer, steps)
    least_S = np.ones(len(reads_S))
    for step in np.flatnonzero(reads_S).tolist():
        active = np.sort(weight_SE[step][weight_SE[step] > 0])
        together = active[: -(-len(active) // steps.num_ranks)].sum()
        least_S[step] = max(1.0, max(active[-1], together) * steps.num_ranks / active.sum())
    return least_S


def _weights(problem: PlacementProblem, layer: LayerPlacement, steps: LayerSteps) -> tuple[FloatArray, BoolArray]:
    """[S, E] weight of each expert in each step, and [S] whether the weights are those of reading, not of pairs."""
    formats, format_E = Formats.of(problem), np.zeros(layer.num_experts, np.int64)
    for _, expert, name in layer.replicas:
        if name in formats.names:  # else a cap of 0 leaves the native one alone
            format_E[expert] = max(format_E[expert], formats.names.index(name))
    reads_S = np.full(len(steps.counts_SE), problem.objective == "decode")
    if problem.objective == "mixed" and steps.phase_S is not None:
        reads_S = steps.phase_S == PHASES.index("decode")
    return weights_SE(problem, formats, steps, format_E), reads_S
