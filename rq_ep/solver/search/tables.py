"""From the solver's bit table of who holds what to replicas."""

from collections.abc import Sequence

import numpy as np

from rq_ep.core.arrays import BoolArray
from rq_ep.core.replicas import Replicas


def replicas_of(held_ER: BoolArray, formats_E: Sequence[str] | None = None) -> Replicas:
    """The replicas of a layer in which rank r holds expert e where `held_ER` is true, in the format of the expert."""
    ranks_P, experts_P = np.nonzero(held_ER.T)
    formats = tuple(formats_E[expert] for expert in experts_P.tolist()) if formats_E else ("",) * len(ranks_P)
    return Replicas(ranks_P.astype(np.int64), experts_P.astype(np.int64), formats)
