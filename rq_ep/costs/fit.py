"""Straight lines through timings, by least squares of relative errors: a microsecond counts where it is a tenth."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rq_ep.core.arrays import FloatArray
from rq_ep.core.errors import UserError


@dataclass(frozen=True)
class Line:
    """`start_s` plus `each_s` for each row or byte; neither is negative."""

    start_s: float
    each_s: float


@dataclass(frozen=True)
class ExpertFit:
    """One expert on n rows takes overhead_s + max(n * pair_s, stream_s): never less for more rows."""

    overhead_s: float
    pair_s: float
    stream_s: float

    def seconds(self, rows_n: FloatArray) -> FloatArray:
        result: FloatArray = self.overhead_s + np.maximum(rows_n * self.pair_s, self.stream_s)
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


def fit_expert(rows: Sequence[int], seconds: Sequence[float]) -> ExpertFit:
    """Overhead, arithmetic and streaming of one expert from its time on few and many rows.

    Where streaming ends is tried at every gap between two row counts; the rest is linear. Without a flat part
    there is no streaming to see, and all that does not grow is overhead.

    Args:
        rows: [n] ascending, at least two.
        seconds: [n] positive.

    Raises:
        UserError: the seconds do not grow with the rows.
    """
    rows_n = np.asarray(rows, np.float64)
    # Fewer rows never take longer: where they seem to, something else used the machine.
    seconds_n = np.minimum.accumulate(np.asarray(seconds, np.float64)[::-1])[::-1]
    best, least = ExpertFit(0.0, 0.0, 0.0), np.inf
    for num_flat in range(len(rows_n) - 1):
        is_flat_n = np.arange(len(rows_n)) < num_flat
        columns = [np.ones(len(rows_n)), np.where(is_flat_n, 0, rows_n), is_flat_n]
        overhead_s, pair_s, stream_s = _solve(np.stack(columns, 1), seconds_n)
        fit = ExpertFit(float(overhead_s), float(pair_s), float(stream_s))
        error = float(np.square(fit.seconds(rows_n) / seconds_n - 1).sum())
        if error < least - 1e-12:
            best, least = fit, error
    if best.pair_s <= 0:
        raise UserError(f"seconds of an expert do not grow from {rows[0]} to {rows[-1]} rows: profile more rows")
    return best


def _solve(columns_nk: FloatArray, seconds_n: FloatArray) -> FloatArray:
    """[k] coefficients, none negative, that make the sum of squared relative errors least."""
    from scipy.optimize import nnls

    scale_k = np.abs(columns_nk).max(axis=0)  # rows and ones differ by orders of magnitude
    scale_k[scale_k == 0] = 1.0
    coefficients_k: FloatArray = nnls(columns_nk / scale_k / seconds_n[:, None], np.ones(len(seconds_n)))[0] / scale_k
    return coefficients_k
