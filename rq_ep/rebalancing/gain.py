"""What a new placement gains over the one that serves, on steps that it was not planned for.

Axes: B blocks of consecutive steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.strategy import Strategy
from rq_ep.solver.objective.calibration_steps import layer_steps, pairs_by_step
from rq_ep.solver.objective.objective import evaluator_of, is_plain, step_balances

NUM_BLOCKS = 32  # of consecutive steps; those of one block resemble each other, as they run the same requests
NOISES = 3.0  # standard errors by which a mean must exceed a limit: by chance it does so in one of about 700 decisions


class StepMean(NamedTuple):
    """The mean of a figure over steps, by their pairs, and its standard error."""

    mean: float
    noise: float

    def surely_exceeds(self, limit: float) -> bool:
        """Whether the mean is above a limit by more than chance."""
        return self.mean - limit > NOISES * self.noise

    @classmethod
    def of(cls, value_S: FloatArray, weight_S: FloatArray) -> "StepMean":
        """The weighted mean; its error is taken from successive differences of blocks of steps (von Neumann, 1941).

        So a load that changes within the window, once, is not taken for noise.
        """
        blocks = np.array_split(np.arange(len(value_S)), NUM_BLOCKS // 2)
        blocks = [part for part in blocks if weight_S[part].any()]
        if not blocks:
            return cls(0.0, 0.0)
        mean_B = np.array([np.average(value_S[part], weights=weight_S[part]) for part in blocks])
        share_B = np.array([weight_S[part].sum() for part in blocks]) / weight_S.sum()
        variance = float((np.diff(mean_B) ** 2).mean() / 2) if len(blocks) > 1 else np.inf
        return cls(float(mean_B @ share_B), float(np.sqrt(variance * (share_B**2).sum())))


class Gain(NamedTuple):
    """The gain of one placement over another, in max/mean, mean over layers."""

    estimate: StepMean
    before: float
    after: float
    floor: float = 1.0  # below which no placement gets, as pairs are whole


def planned_and_held_out(num_steps: int) -> tuple[IntArray, IntArray]:
    """Indices of the steps to plan for, and of the others: alternate blocks of consecutive steps."""
    block_S = np.arange(num_steps) * min(NUM_BLOCKS, num_steps) // max(num_steps, 1)
    return np.flatnonzero(block_S % 2 == 0), np.flatnonzero(block_S % 2 == 1)


def gain_of(
    problem: PlacementProblem,
    strategy: Strategy,
    before: Sequence[LayerPlacement],
    after: Sequence[LayerPlacement],
) -> Gain:
    """The gain of the layers `after` over `before`, paired step by step.

    Args:
        problem: its statistics are the held-out steps, in their order.
        strategy: serves both; its split is evaluated.
        before: the layers that serve.
        after: those that might.
    """
    weight_S = pairs_by_step(problem)
    before_S, after_S = (_imbalance_S(problem, strategy, layers) for layers in (before, after))
    means = [StepMean.of(value_S, weight_S).mean for value_S in (before_S, after_S, _floor_S(problem))]
    return Gain(StepMean.of(before_S - after_S, weight_S), *means)


def low_share(problem: PlacementProblem, layers: Sequence[LayerPlacement]) -> StepMean:
    """The share of the problem's pairs that these layers compute in another format than the native one."""
    counts_SLE, native = problem.stats.counts, problem.stats.native_format
    low_S = np.zeros(len(counts_SLE))
    for i, layer in enumerate(layers):
        table = layer.replicas
        is_low_P = np.array([name != native for name in table.formats_P])
        low_E = np.bincount(table.experts_P, layer.shares_P * is_low_P, minlength=layer.num_experts)
        low_S += counts_SLE[:, i] @ low_E
    pairs_S = counts_SLE.sum(axis=(1, 2))
    return StepMean.of(low_S / np.maximum(pairs_S, 1), pairs_S.astype(np.float64))


def _floor_S(problem: PlacementProblem) -> FloatArray:
    """[S] the least max/mean of each step, mean over layers: two pairs keep two ranks busy, however many there are."""
    if not is_plain(problem):
        return np.ones(len(problem.stats.counts))
    num_ranks, pairs_SL = problem.topology.num_ranks, problem.stats.counts.sum(axis=2)
    fullest_SL = -(-pairs_SL // num_ranks)
    floor_SL = np.where(pairs_SL > 0, fullest_SL * num_ranks / np.maximum(pairs_SL, 1), 1.0)
    floor_S: FloatArray = floor_SL.mean(axis=1)
    return floor_S


def _imbalance_S(problem: PlacementProblem, strategy: Strategy, layers: Sequence[LayerPlacement]) -> FloatArray:
    """[S] max/mean over ranks of each step, mean over layers; a layer that routes nothing counts as balanced."""
    split = evaluator_of(problem, strategy)
    counts_SLE = problem.stats.counts
    imbalance_SL = np.ones(counts_SLE.shape[:2])
    balances = step_balances(problem, layers, layer_steps(problem, np.arange(len(counts_SLE))), split)
    for i, balance in enumerate(balances):
        imbalance_SL[counts_SLE[:, i].any(axis=1), i] = balance.ratio_S
    mean_S: FloatArray = imbalance_SL.mean(axis=1)
    return mean_S
