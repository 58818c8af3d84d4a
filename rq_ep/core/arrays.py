"""Array types of the deciding side, and the letters that name their axes.

L MoE layers, E experts, P replicas (rank-major), R ranks, K top-k, T tokens here, N pairs, M rows received,
D hidden, F intermediate, Q formats, S steps. `counts_RE` has a row for each source rank and a column for each expert.
"""

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
