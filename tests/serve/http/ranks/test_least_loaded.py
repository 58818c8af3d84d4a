"""Spreading requests over ranks."""

import pytest

from rq_ep.serve.http.ranks.routed_requests import least_loaded


@pytest.mark.parametrize(
    ("loads_R", "rank"), [([0, 0, 0], 0), ([5, 0, 0], 1), ([5, 7, 6], 0), ([5, 7, 5], 0), ([9, 8, 1], 2), ([4], 0)]
)
def test_the_least_loaded_rank_is_chosen(loads_R: list[int], rank: int) -> None:
    assert least_loaded(dict(enumerate(loads_R))) == rank


def test_equal_requests_go_round() -> None:
    loads_R = [0, 0, 0]
    chosen = []
    for _ in range(6):
        rank = least_loaded(dict(enumerate(loads_R)))
        loads_R[rank] += 10
        chosen.append(rank)
    assert chosen == [0, 1, 2, 0, 1, 2]
