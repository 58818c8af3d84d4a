"""The fits find what made the timings."""

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq_ep.core.errors import UserError
from rq_ep.costs.fit import ExpertFit, fit_experts, fit_line

ROWS = np.tile([1, 2, 4, 8, 16, 32, 64, 128, 256], 2)
EXPERTS = np.repeat([1, 8], 9)


@pytest.mark.parametrize(
    "truth",
    [
        ExpertFit(call_s=2e-4, overhead_s=2e-5, pair_s=1e-6, stream_s=2e-5),  # waits for weights up to 20 rows
        ExpertFit(call_s=5e-6, overhead_s=0.0, pair_s=3e-9, stream_s=1e-7),
        ExpertFit(call_s=0.0, overhead_s=5e-2, pair_s=7e-3, stream_s=5e-2),
    ],
)
def test_calls_and_experts_are_recovered(truth: ExpertFit) -> None:
    fit = fit_experts(EXPERTS, ROWS, truth.seconds(EXPERTS, ROWS))
    assert astuple(fit) == pytest.approx(astuple(truth), rel=1e-6, abs=1e-12)


def test_without_a_flat_part_there_is_overhead_and_arithmetic() -> None:
    fit = fit_experts(EXPERTS, ROWS, 1e-4 + EXPERTS * (3e-5 + 1e-6 * ROWS))
    assert (fit.call_s, fit.overhead_s, fit.pair_s) == pytest.approx((1e-4, 3e-5, 1e-6))
    assert fit.stream_s <= fit.pair_s * (1 + 1e-6)  # hidden behind the first row


def test_calls_for_one_number_of_experts_put_all_into_overhead() -> None:
    one = EXPERTS == 8
    fit = fit_experts(EXPERTS[one], ROWS[one], 8 * (3e-5 + 1e-6 * ROWS[one]))
    assert (fit.call_s, fit.overhead_s) == pytest.approx((0.0, 3e-5))


@given(st.lists(st.floats(0.5, 2.0), min_size=len(ROWS), max_size=len(ROWS)))
def test_noise_neither_breaks_the_fit_nor_makes_more_work_cheaper(noise: list[float]) -> None:
    truth = ExpertFit(1e-4, 2e-5, 1e-6, 2e-5)
    fit = fit_experts(EXPERTS, ROWS, truth.seconds(EXPERTS, ROWS) * noise)
    rows = np.arange(1, 1000)
    assert (np.diff(fit.seconds(np.array(3), rows)) >= 0).all()
    assert (np.diff(fit.seconds(np.arange(9), np.array(10))) >= 0).all()
    assert min(astuple(fit)) >= 0
    assert fit.pair_s == pytest.approx(1e-6, rel=3)


def test_disturbed_timings_of_few_rows_are_corrected_by_those_of_more() -> None:
    truth = ExpertFit(1e-5, 2e-5, 1e-6, 2e-5)
    seconds = truth.seconds(EXPERTS, ROWS)
    seconds[ROWS < 8] *= 5
    assert fit_experts(EXPERTS, ROWS, seconds).seconds(EXPERTS, ROWS) == pytest.approx(
        truth.seconds(EXPERTS, ROWS), rel=0.01
    )


def test_time_must_grow_with_the_rows() -> None:
    with pytest.raises(UserError, match="do not grow from 1 to 256 rows"):
        fit_experts(EXPERTS, ROWS, 1e-3 / ROWS)


def test_a_line_is_recovered_and_never_falls() -> None:
    line = fit_line([10, 1000, 100_000], [5e-6 + 2e-9 * size for size in (10, 1000, 100_000)])
    assert (line.start_s, line.each_s) == pytest.approx((5e-6, 2e-9))
    assert fit_line([1, 2, 3], [3.0, 2.0, 1.0]).each_s == 0
