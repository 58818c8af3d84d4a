"""Denoised calibration steps: truncated SVD of small steps, and new steps drawn from the estimated rates.

64 tokens route few pairs to each of 256 experts. A placement made for a handful of such steps over-fits their sampling
noise, which never comes again. But the noise is known: counts are drawn from a step's rates, with a variance of their
mean (Poisson). Steps of similar text have similar rates, so the table of steps by experts, scaled to noise of variance
one, has few directions that stand out: of noise alone no singular value exceeds sqrt(S) + sqrt(E) (Geman, A limit
theorem for the norm of random matrices, Annals of Probability 8, 1980). The table's part in these directions estimates
the rates, and any number of steps can be drawn from them.

Singular values are kept as they are: with optimal shrinkage (Gavish and Donoho, Optimal shrinkage of singular values,
2017) steps become too similar, and placements are worse. They are also worse if the recorded steps are left in.
"""

from collections.abc import Sequence

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.problem import PlacementProblem
from rq_ep.solver.objective.calibration_steps import LayerSteps
from rq_ep.solver.workers import ALONE, Workers

NOISY = 0.2  # share of noise in the variance between steps above which resampling pays
FEW_PAIRS = 8  # of an expert in a step, on average; from here on it gains a few thousandths for four times the search
LEAST_VARIANCE = 0.25  # in units of Poisson noise; a token's distinct experts lower it by top_k in experts
LEAST_RATE = 0.02  # of an expert's mean rate: no expert is known to be idle
MIN_DRAWS, MAX_DRAWS = 2, 6  # steps drawn for a recorded one; a single one is worse than none
MAX_WORK = 2**26  # draws times layers, steps, experts and ranks, as far as `MIN_DRAWS` allow


def denoise_steps(
    problem: PlacementProblem, layers: Sequence[LayerSteps], workers: Workers = ALONE
) -> list[LayerSteps]:
    """The steps to place for: as recorded, or resampled in layers whose counts are mostly noise.

    Only prefill steps are resampled: a memory-bound rank waits for experts of a single pair, which rates predict worst.
    """
    size = sum(layer.counts_SE.size * layer.num_ranks for layer in layers)
    num_draws = min(max(MAX_WORK // max(size, 1), MIN_DRAWS), MAX_DRAWS)

    def denoised(i: int, layer: LayerSteps) -> LayerSteps:
        if problem.objective != "prefill" or not _is_noisy(layer.counts_SE):
            return layer
        return _resampled(layer, num_draws, np.random.default_rng((problem.seed, i)))

    return list(workers.map(denoised, range(len(layers)), layers))


def _is_noisy(counts_SE: IntArray) -> bool:
    return counts_SE.size > 0 and counts_SE.mean() < FEW_PAIRS and noise_share(counts_SE) > NOISY


def noise_share(counts_SE: IntArray) -> float:
    """The share of sampling noise in the variance between steps; 0 where they differ less than by noise, or are few."""
    if len(counts_SE) < 2:
        return 0.0
    expected_SE = _expected_SE(counts_SE)
    variance = float(((counts_SE - expected_SE) ** 2 / expected_SE).mean())
    return 0.0 if variance < LEAST_VARIANCE else min(1 / variance, 1.0)


def denoised_rates_SE(counts_SE: IntArray) -> FloatArray:
    """[S, E] the probability that a pair of the step goes to the expert, denoised by truncated SVD.

    Args:
        counts_SE: pairs; each step has at least one.
    """
    if noise_share(counts_SE) <= NOISY:
        rate_SE: FloatArray = counts_SE / counts_SE.sum(axis=1, keepdims=True)
        return rate_SE
    scale_SE = np.sqrt(_expected_SE(counts_SE))  # the standard deviation of a count (Poisson)
    left_SV, values_V, right_VE = np.linalg.svd(counts_SE / scale_SE, full_matrices=False)
    stands_out_V = values_V > sum(np.sqrt(counts_SE.shape))
    clean_SE: FloatArray = (left_SV[:, stands_out_V] * values_V[stands_out_V]) @ right_VE[stands_out_V] * scale_SE
    clean_SE = np.maximum(clean_SE, LEAST_RATE * scale_SE**2)
    clean_SE /= clean_SE.sum(axis=1, keepdims=True)
    return clean_SE


def _expected_SE(counts_SE: IntArray) -> FloatArray:
    """[S, E] pairs if all steps had the same rates; an unused expert counts as if it had been used once."""
    pairs_E = np.maximum(counts_SE.sum(axis=0), 1)
    expected_SE: FloatArray = counts_SE.sum(axis=1, keepdims=True) * (pairs_E / counts_SE.sum())
    return expected_SE


def _resampled(layer: LayerSteps, num_draws: int, generator: np.random.Generator) -> LayerSteps:
    """Steps drawn from the denoised rates, `num_draws` for each recorded one."""
    rate_SE = denoised_rates_SE(layer.counts_SE if layer.recorded_SE is None else layer.recorded_SE)
    pairs_S = layer.counts_SE.sum(axis=1)
    counts_SE = np.concatenate([generator.multinomial(pairs_S, rate_SE) for _ in range(num_draws)])
    return LayerSteps(counts_SE, layer.num_ranks)
