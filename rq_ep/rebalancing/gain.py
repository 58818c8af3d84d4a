"""What a new placement gains over the one that serves, on steps that it was not planned for."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.strategy import Strategy
from rq_ep.solver.objective.calibration_steps import layer_steps, pairs_by_step
from rq_ep.solver.objective.objective import evaluator_of, step_balance

NUM_BLOCKS = 32  # of consecutive steps; those of one block resemble each other, as they run the same requests
NOISES = 3.0  # standard errors that a gain must exceed: one decision in about 700 is wrong by chance


class Gain(NamedTuple):
    """The gain of one placement over another, in max/mean, mean over steps (by their pairs) and layers."""

    mean: float
    noise: float  # standard error of the mean, from successive differences of blocks of steps
    before: float
    after: float

    @property
    def is_real(self) -> bool:
        """Whether the gain is more than chance."""
        return self.mean > NOISES * self.noise


def planned_and_held_out(num_steps: int) -> tuple[IntArray, IntArray]:
    """Indices of the steps to plan for, and of the others: alternate blocks of consecutive steps."""
    block_S = np.arange(num_steps) * NUM_BLOCKS // max(num_steps, 1)
    return np.flatnonzero(block_S % 2 == 0), np.flatnonzero(block_S % 2 == 1)


def gain_of(
    problem: PlacementProblem,
    strategy: Strategy,
    before: Sequence[LayerPlacement],
    after: Sequence[LayerPlacement],
) -> Gain:
    """The gain of the layers `after` over `before`, paired step by step.

    Args:
        problem: its statistics are the held-out steps, in blocks of equal length.
        strategy: serves both; its split is evaluated.
        before: the layers that serve.
        after: those that might.
    """
    weight_S = pairs_by_step(problem)
    before_S, after_S = (_imbalance_S(problem, strategy, layers) for layers in (before, after))
    blocks = [part for part in np.array_split(np.arange(len(weight_S)), NUM_BLOCKS // 2) if weight_S[part].any()]
    if len(blocks) < 2:
        return Gain(0.0, 0.0, 1.0, 1.0)
    gain_B = np.array([np.average((before_S - after_S)[part], weights=weight_S[part]) for part in blocks])
    share_B = np.array([weight_S[part].sum() for part in blocks]) / weight_S.sum()
    # From successive differences (von Neumann 1941): a load that has changed within the window is no noise.
    variance = float((np.diff(gain_B) ** 2).mean() / 2)
    mean = float(gain_B @ share_B)
    noise = float(np.sqrt(variance * (share_B**2).sum()))
    return Gain(
        mean,
        noise,
        float(np.average(before_S, weights=weight_S)),
        float(np.average(after_S, weights=weight_S)),
    )


def _imbalance_S(problem: PlacementProblem, strategy: Strategy, layers: Sequence[LayerPlacement]) -> FloatArray:
    """[S] max/mean over ranks of each step, mean over layers; a layer that routes nothing counts as balanced."""
    split = evaluator_of(problem, strategy)
    counts_SLE = problem.stats.counts
    imbalance_SL = np.ones(counts_SLE.shape[:2])
    for i, (layer, steps) in enumerate(zip(layers, layer_steps(problem, np.arange(len(counts_SLE))), strict=True)):
        imbalance_SL[counts_SLE[:, i].any(axis=1), i] = step_balance(problem, layer, steps, split).ratio_S
    mean_S: FloatArray = imbalance_SL.mean(axis=1)
    return mean_S
