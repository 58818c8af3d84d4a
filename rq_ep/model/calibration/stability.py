"""Stability of calibration: how much the experts' ranking by load differs between two halves of the text."""

import numpy as np
from scipy.stats import spearmanr

from rq_ep.core.arrays import IntArray


def ranking_agreement(counts_SLE: IntArray, domain_S: IntArray) -> float | None:
    """Spearman correlation of the experts' loads in one half of the steps with those in the other, mean over layers.

    Two halves agree less than the whole agrees with other text, so this is a low estimate of the sample's worth.

    Args:
        counts_SLE: [S, L, E] routed pairs of comparable steps.
        domain_S: [S] domain of each; the steps of a domain go to the two halves in turns.

    Returns:
        1 if the ranking stays, 0 if it is chance; None where no domain has two steps, or all loads are equal.
    """
    if not len(domain_S):
        return None
    half_S = np.zeros(len(domain_S), np.int64)
    for domain in np.unique(domain_S):
        of_domain = domain_S == domain
        half_S[of_domain] = np.arange(of_domain.sum()) % 2
    loads_HLE = np.stack([counts_SLE[half_S == half].sum(axis=0) for half in range(2)])
    is_uneven_L = (np.ptp(loads_HLE, axis=2) > 0).all(axis=0)
    correlations = [
        spearmanr(first_E, second_E).statistic for first_E, second_E in zip(*loads_HLE[:, is_uneven_L], strict=True)
    ]
    return float(np.mean(correlations)) if correlations else None
