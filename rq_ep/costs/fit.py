"""Linear fits of timings by least squares of relative errors, so that small timings count as much as large ones.

Axes: n timings, k coefficients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.errors import UserError


@dataclass(frozen=True)
class Line:
    """`start_s` plus `each_s` for each row or byte; neither is negative."""

    start_s: float
    each_s: float


@dataclass(frozen=True)
class ExpertFit:
    """A call for several experts takes call_s, and for each of them overhead_s + max(rows * pair_s, stream_s)."""

    call_s: float
    overhead_s: float
    pair_s: float
    stream_s: float

    def seconds(self, experts_n: IntArray, rows_n: IntArray) -> FloatArray:
        """[n] seconds of calls for so many experts with so many rows each: never less for more of either."""
        each_s_n = self.overhead_s + np.maximum(rows_n * self.pair_s, self.stream_s)
        result: FloatArray = self.call_s + experts_n * each_s_n
        return result


def fit_line(sizes: Sequence[int], seconds: Sequence[float]) -> Line:
    """The line closest to timings of different sizes.

    Args:
        sizes: [n] rows or bytes, at least two different ones.
        seconds: [n] positive.
    """
    sizes_n, seconds_n = np.asarray(sizes, np.float64), np.asarray(seconds, np.float64)
    start_s, each_s = _solve(np.stack([np.ones(len(sizes_n)), sizes_n], 1), seconds_n)
    return Line(float(start_s), float(each_s))


def fit_experts(experts: Sequence[int], rows: Sequence[int], seconds: Sequence[float]) -> ExpertFit:
    """Fit the time of a call: a constant and, for each expert, overhead, arithmetic and streaming of its weights.

    The row count up to which streaming dominates is tried at every gap between two row counts; the rest is linear.
    Without a flat part there is no streaming to see, and the constant part is overhead. Only calls for different
    numbers of experts can separate the overhead of a call from that of its experts.

    Args:
        experts: [n] experts in a call.
        rows: [n] rows of each of them, at least two different ones.
        seconds: [n] of the call, positive.

    Raises:
        UserError: the seconds do not grow with the rows.
    """
    experts_n, rows_n = np.asarray(experts, np.int64), np.asarray(rows, np.int64)
    seconds_n = _undisturbed(experts_n, rows_n, np.asarray(seconds, np.float64))
    is_call_seen = len(set(experts)) > 1
    best, least = ExpertFit(0.0, 0.0, 0.0, 0.0), np.inf
    for last_flat in [0, *sorted(set(rows))[:-2]]:
        is_flat_n = rows_n <= last_flat
        columns = [is_call_seen * np.ones(len(rows_n)), np.ones(len(rows_n)), np.where(is_flat_n, 0, rows_n), is_flat_n]
        columns[1:] = [column * experts_n for column in columns[1:]]
        fit = ExpertFit(*_solve(np.stack(columns, 1), seconds_n).tolist())
        error = float(np.square(fit.seconds(experts_n, rows_n) / seconds_n - 1).sum())
        if error < least - 1e-12:
            best, least = fit, error
    if best.pair_s <= 0:
        raise UserError(f"seconds of an expert do not grow from {min(rows)} to {max(rows)} rows: profile more rows")
    return best


def _undisturbed(experts_n: IntArray, rows_n: IntArray, seconds_n: FloatArray) -> FloatArray:
    """[n] the least seconds of any call as large: where less work took longer, the measurement was disturbed."""
    is_as_large_nn = (experts_n >= experts_n[:, None]) & (rows_n >= rows_n[:, None])
    least_n: FloatArray = np.where(is_as_large_nn, seconds_n, np.inf).min(axis=1)
    return least_n


def _solve(columns_nk: FloatArray, seconds_n: FloatArray) -> FloatArray:
    """[k] coefficients, none negative, that make the sum of squared relative errors least."""
    from scipy.optimize import nnls

    scale_k = np.abs(columns_nk).max(axis=0)  # rows and ones differ by orders of magnitude
    scale_k[scale_k == 0] = 1.0
    coefficients_k: FloatArray = nnls(columns_nk / scale_k / seconds_n[:, None], np.ones(len(seconds_n)))[0] / scale_k
    return coefficients_k
