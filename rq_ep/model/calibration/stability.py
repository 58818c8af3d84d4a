"""Whether a sample of text was large enough: how much the experts' ranking moves from one half of it to the other."""

import numpy as np
from scipy.stats import spearmanr

from rq_ep.core.arrays import IntArray


def ranking_agreement(counts_SLE: IntArray, domain_S: IntArray) -> float | None:
    """Spearman correlation of the experts' loads in one half of the steps with those in the other, mean over layers.

    Halves agree less with each other than the whole does with other text: a low estimate of what the sample is worth.

    Args:
        counts_SLE: [S, L, E] routed pairs of comparable steps.
        domain_S: [S] domain of each; its steps go to the halves in turns.

    Returns:
        1 if the ranking stays, 0 if it is chance; None where no domain has two steps, or all loads are equal.
    """
    if not len(domain_S):
        return None
    turn_S = np.zeros(len(domain_S), np.int64)
    for domain in np.unique(domain_S):
        of_domain = domain_S == domain
        turn_S[of_domain] = np.arange(of_domain.sum()) % 2
    halves_HLE = np.stack([counts_SLE[turn_S == half].sum(axis=0) for half in range(2)])
    varied_L = (np.ptp(halves_HLE, axis=2) > 0).all(axis=0)
    found = [spearmanr(first_E, second_E).statistic for first_E, second_E in zip(*halves_HLE[:, varied_L], strict=True)]
    return float(np.mean(found)) if found else None
