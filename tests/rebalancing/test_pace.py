"""How fast experts move."""

import pytest

from rq_ep.rebalancing.pace import MAX_REST_S, SHARE, rest_s


def test_work_takes_its_share_of_the_time_and_waiting_is_rest() -> None:
    assert SHARE * (0.002 + rest_s(0.002, 0.002)) == pytest.approx(0.002)
    assert rest_s(0.03, 0.002) == pytest.approx(rest_s(0.002, 0.002) - 0.028)
    assert rest_s(10.0, 0.002) == 0.0


def test_a_rest_is_short_however_long_the_work_took() -> None:
    assert rest_s(0.5, 0.5) == MAX_REST_S
