"""Calibration steps for the solver: a sample of the record, thinned to the batch size that will be served."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.stats import ExpertStats


@dataclass(frozen=True)
class LayerSteps:
    """The steps of one layer that route at least one pair."""

    counts_SE: IntArray
    num_ranks: int
    phase_S: IntArray | None = None  # index into PHASES, where it was recorded
    recorded_SE: IntArray | None = None  # counts as recorded, where `counts_SE` are thinned

    def some(self, num_steps: int) -> "LayerSteps":
        """At most `num_steps` of these steps, at even distances."""
        chosen = np.unique(np.linspace(0, max(len(self.counts_SE) - 1, 0), num_steps).astype(np.int64))
        return self.take(chosen[: len(self.counts_SE)])

    def take(self, chosen: IntArray) -> "LayerSteps":
        """The chosen ones of these steps."""
        phase_S, recorded_SE = (None if rows is None else rows[chosen] for rows in (self.phase_S, self.recorded_SE))
        return LayerSteps(self.counts_SE[chosen], self.num_ranks, phase_S, recorded_SE)

    @cached_property
    def loads_SE(self) -> FloatArray:
        """Pairs of each expert in units of the step's mean rank load: under perfect balance every rank is at 1."""
        loads_SE: FloatArray = self.counts_SE * (self.num_ranks / self.counts_SE.sum(axis=1, keepdims=True))
        return loads_SE

    @cached_property
    def mean_E(self) -> FloatArray:
        """[E] mean of `loads_SE` over steps; equal loads if nothing was ever routed."""
        num_experts = self.counts_SE.shape[1]
        if not len(self.counts_SE):
            return np.full(num_experts, self.num_ranks / num_experts)
        mean_E: FloatArray = self.loads_SE.mean(axis=0)
        return mean_E


def calibration_steps(problem: PlacementProblem, max_steps: int) -> list[LayerSteps]:
    """At most `max_steps` steps for each layer, thinned to `problem.tokens_per_step`, spread over the record."""
    return layer_steps(problem, spread_steps(problem, max_steps))


def spread_steps(problem: PlacementProblem, max_steps: int) -> IntArray:
    """Indices of at most `max_steps` recorded steps, as `spread_by_pairs` chooses them."""
    return spread_by_pairs(pairs_by_step(problem), max_steps)


def spread_by_pairs(pairs_S: FloatArray, max_steps: int) -> IntArray:
    """Indices of at most `max_steps` steps, ascending.

    They lie at even distances in routed pairs: a record of few long prefill steps and many short decode steps is
    sampled by its pairs, not by its steps.
    """
    if not pairs_S.any():
        return np.zeros(0, np.int64)
    marks = (np.arange(max_steps) + 0.5) / max_steps * pairs_S.sum()
    return np.unique(np.searchsorted(np.cumsum(pairs_S), marks, side="right"))


def pairs_by_step(problem: PlacementProblem) -> FloatArray:
    """[S] pairs of each recorded step, all layers together, thinned to `problem.tokens_per_step`."""
    pairs_S: FloatArray = problem.stats.counts.sum(axis=(1, 2)).astype(np.float64)
    if problem.tokens_per_step is not None:
        pairs_S *= np.minimum(problem.tokens_per_step / np.maximum(_tokens(problem.stats), 1), 1)
    return pairs_S


def layer_steps(problem: PlacementProblem, chosen_S: IntArray) -> list[LayerSteps]:
    """These recorded steps for each layer, thinned to `problem.tokens_per_step`, without those that route nothing."""
    recorded_SLE = counts_SLE = problem.stats.counts[chosen_S]
    if problem.tokens_per_step is not None:
        counts_SLE = _thin(recorded_SLE, _tokens(problem.stats)[chosen_S], problem.tokens_per_step, problem.seed)
    phase_S = None if problem.stats.phase is None else problem.stats.phase[chosen_S]
    num_ranks = problem.topology.num_ranks
    layers = [
        LayerSteps(counts_SLE[:, i], num_ranks, phase_S, recorded_SLE[:, i]) for i in range(problem.stats.num_layers)
    ]
    return [layer.take(np.flatnonzero(layer.counts_SE.any(axis=1))) for layer in layers]


def _thin(counts_SLE: IntArray, tokens_S: IntArray, tokens_per_step: int, seed: int) -> IntArray:
    """Resample steps that are larger than served: a multinomial draw from each step's own frequencies."""
    generator = np.random.default_rng(seed)
    thinned = counts_SLE.copy()
    for step, tokens in enumerate(tokens_S.tolist()):
        for layer, counts_E in enumerate(counts_SLE[step]):
            pairs = int(counts_E.sum())
            num_draws = round(pairs * tokens_per_step / max(tokens, 1))
            if num_draws < pairs:
                thinned[step, layer] = generator.multinomial(num_draws, counts_E / pairs)
    return thinned


def _tokens(stats: ExpertStats) -> IntArray:
    if stats.tokens is not None:
        return stats.tokens
    if stats.top_k is None:
        raise UserError(
            f"--tokens-per-step: {stats.source} has neither tokens nor top_k, so its steps cannot be scaled"
        )
    tokens_S: IntArray = stats.counts.sum(axis=2).max(axis=1, initial=0) // stats.top_k
    return tokens_S
