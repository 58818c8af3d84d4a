"""Small steps drawn anew: what the search looks at where the recorded counts are mostly chance.

64 tokens route few pairs to each of 256 experts. A placement made for a handful of such steps fits their chance, which
never comes again. But the chance is known: counts are drawn from a step's rates, with a variance of their mean. Steps
of alike text have alike rates, so the table of steps by experts, scaled to noise of variance one, has few directions
that stand out: of noise alone no singular value exceeds sqrt(S) + sqrt(E) (Geman, A limit theorem for the norm of
random matrices, Annals of Probability 8, 1980). Its part in these directions estimates the rates, and steps drawn from
them are as many as one likes.

Singular values are kept as they are: shrunk to the least mean square error (Gavish and Donoho, 2017) steps become too
alike, and placements are worse. So they are with the recorded steps left in.
"""

from collections.abc import Sequence

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.problem import PlacementProblem
from rq_ep.solver.objective.calibration_steps import LayerSteps

NOISY = 0.2  # share of chance in what steps differ by, from which drawing anew pays
FEW_PAIRS = 8  # of an expert in a step, on average; with as many it gains a few thousandths for four times the search
LEAST_CHANCE = 0.25  # of a drawn count's variance; distinct experts of a token lower it by top_k in experts
LEAST_RATE = 0.02  # of an expert's mean rate: nobody is known to be idle
MIN_DRAWS, MAX_DRAWS = 2, 4  # steps drawn for a recorded one; a single one is worse than none, eight gain little
MAX_WORK = 2**26  # draws times layers, steps, experts and ranks, as far as `MIN_DRAWS` allow


def denoise_steps(problem: PlacementProblem, layers: Sequence[LayerSteps]) -> list[LayerSteps]:
    """Steps to place for: as recorded, or drawn anew in layers whose counts are mostly chance.

    Only pairs are drawn: a rank that waits for weights waits for experts of one pair, which rates tell worst.
    """
    size = sum(layer.counts_SE.size * layer.num_ranks for layer in layers)
    num_draws = min(max(MAX_WORK // max(size, 1), MIN_DRAWS), MAX_DRAWS)
    return [
        _resampled(layer, num_draws, np.random.default_rng((problem.seed, at)))
        if problem.objective == "prefill" and _is_mostly_chance(layer.counts_SE)
        else layer
        for at, layer in enumerate(layers)
    ]


def _is_mostly_chance(counts_SE: IntArray) -> bool:
    return counts_SE.size > 0 and counts_SE.mean() < FEW_PAIRS and noise_share(counts_SE) > NOISY


def noise_share(counts_SE: IntArray) -> float:
    """Of what steps differ by, the part that is due to chance; 0 where they differ less than by chance, or are few."""
    if len(counts_SE) < 2:
        return 0.0
    expected_SE = _expected_SE(counts_SE)
    in_chance = float(((counts_SE - expected_SE) ** 2 / expected_SE).mean())
    return 0.0 if in_chance < LEAST_CHANCE else min(1 / in_chance, 1.0)


def denoised_rates_SE(counts_SE: IntArray) -> FloatArray:
    """[S, E] the chance of each expert to be a pair's, in every step, with what is likely to be chance left out.

    Args:
        counts_SE: pairs; each step has some.
    """
    if noise_share(counts_SE) <= NOISY:
        rate_SE: FloatArray = counts_SE / counts_SE.sum(axis=1, keepdims=True)
        return rate_SE
    scale_SE = np.sqrt(_expected_SE(counts_SE))  # the deviation of a count from what is expected of it
    left_SK, values_K, right_KE = np.linalg.svd(counts_SE / scale_SE, full_matrices=False)
    stands_out_K = values_K > sum(np.sqrt(counts_SE.shape))
    clean_SE: FloatArray = (left_SK[:, stands_out_K] * values_K[stands_out_K]) @ right_KE[stands_out_K] * scale_SE
    clean_SE = np.maximum(clean_SE, LEAST_RATE * scale_SE**2)
    clean_SE /= clean_SE.sum(axis=1, keepdims=True)
    return clean_SE


def _expected_SE(counts_SE: IntArray) -> FloatArray:
    """[S, E] pairs if all steps had the same rates; of an expert that nobody used, as if it had been once."""
    pairs_E = np.maximum(counts_SE.sum(axis=0), 1)
    expected_SE: FloatArray = counts_SE.sum(axis=1, keepdims=True) * (pairs_E / counts_SE.sum())
    return expected_SE


def _resampled(layer: LayerSteps, num_draws: int, generator: np.random.Generator) -> LayerSteps:
    rate_SE = denoised_rates_SE(layer.counts_SE if layer.larger_SE is None else layer.larger_SE)
    pairs_S = layer.counts_SE.sum(axis=1)
    counts_SE = np.concatenate([generator.multinomial(pairs_S, rate_SE) for _ in range(num_draws)])
    return LayerSteps(counts_SE, layer.num_ranks)
