"""How fast experts move."""

import pytest

from rq_ep.rebalancing.pace import MAX_REST_S, MAX_SHARE, MIN_SHARE, Pace, share_of_a_core

PACE = Pace(share=0.1)


def test_work_takes_its_share_of_the_time_and_waiting_is_rest() -> None:
    assert 0.1 * (0.002 + PACE.rest_s(0.002, 0.002)) == pytest.approx(0.002)
    assert PACE.rest_s(0.01, 0.002) == pytest.approx(PACE.rest_s(0.002, 0.002) - 0.008)
    assert PACE.rest_s(10.0, 0.002) == 0.0


def test_a_rest_is_short_however_long_the_work_took() -> None:
    assert PACE.rest_s(0.5, 0.5) == MAX_REST_S


def test_experts_move_faster_where_every_rank_has_a_core_to_spare() -> None:
    assert share_of_a_core(num_cores=2, num_ranks=4, num_threads=1) == MIN_SHARE
    assert share_of_a_core(num_cores=15, num_ranks=8, num_threads=1) == MIN_SHARE
    assert share_of_a_core(num_cores=16, num_ranks=8, num_threads=1) == MAX_SHARE
    assert share_of_a_core(num_cores=16, num_ranks=4, num_threads=4) == MIN_SHARE
