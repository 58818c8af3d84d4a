"""The fits find what made the timings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq_ep.core.errors import UserError
from rq_ep.costs.fit import ExpertFit, fit_expert, fit_line

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@pytest.mark.parametrize(
    "truth",
    [
        ExpertFit(overhead_s=2e-5, pair_s=1e-6, stream_s=2e-5),  # waits for weights up to 20 rows
        ExpertFit(overhead_s=0.0, pair_s=3e-9, stream_s=1e-7),
        ExpertFit(overhead_s=5e-2, pair_s=7e-3, stream_s=5e-2),
    ],
)
def test_an_expert_is_recovered(truth: ExpertFit) -> None:
    fit = fit_expert(ROWS, truth.seconds(np.array(ROWS)).tolist())
    found = (fit.overhead_s, fit.pair_s, fit.stream_s)
    assert found == pytest.approx((truth.overhead_s, truth.pair_s, truth.stream_s), rel=1e-6, abs=1e-12)


def test_without_a_flat_part_there_is_overhead_and_arithmetic() -> None:
    fit = fit_expert(ROWS, [3e-5 + 1e-6 * rows for rows in ROWS])
    assert (fit.overhead_s, fit.pair_s) == pytest.approx((3e-5, 1e-6))
    assert fit.stream_s <= fit.pair_s * (1 + 1e-6)  # hidden behind the first row


@given(st.lists(st.floats(0.5, 2.0), min_size=len(ROWS), max_size=len(ROWS)))
def test_noise_neither_breaks_the_fit_nor_makes_more_rows_cheaper(noise: list[float]) -> None:
    truth = ExpertFit(2e-5, 1e-6, 2e-5).seconds(np.array(ROWS))
    fit = fit_expert(ROWS, (truth * noise).tolist())
    seconds = fit.seconds(np.arange(1, 1000))
    assert (np.diff(seconds) >= 0).all()
    assert min(fit.overhead_s, fit.stream_s) >= 0
    assert fit.pair_s == pytest.approx(1e-6, rel=3)


def test_a_disturbed_timing_of_few_rows_is_corrected_by_those_of_more() -> None:
    truth = ExpertFit(2e-5, 1e-6, 2e-5)
    seconds = truth.seconds(np.array(ROWS))
    seconds[:3] *= 5
    fit = fit_expert(ROWS, seconds.tolist())
    assert fit.seconds(np.array(ROWS)) == pytest.approx(truth.seconds(np.array(ROWS)), rel=0.01)


def test_time_must_grow_with_the_rows() -> None:
    with pytest.raises(UserError, match="do not grow from 1 to 256 rows"):
        fit_expert(ROWS, [1e-3 / rows for rows in ROWS])


def test_a_line_is_recovered_and_never_falls() -> None:
    line = fit_line([10, 1000, 100_000], [5e-6 + 2e-9 * size for size in (10, 1000, 100_000)])
    assert (line.start_s, line.each_s) == pytest.approx((5e-6, 2e-9))
    assert fit_line([1, 2, 3], [3.0, 2.0, 1.0]).each_s == 0
