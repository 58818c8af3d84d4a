"""Naming the rank that brought the group down."""

import pytest

from rq_ep.serve.http.blame import FailureReport, blame

LOST = FailureReport("connection closed", is_consequence=True)
BUG = FailureReport("KeyError: 3", is_consequence=False)


@pytest.mark.parametrize(
    ("reports", "lost", "expected"),
    [
        ({1: BUG}, [], "rank 1: KeyError: 3"),
        ({0: LOST, 1: BUG, 2: LOST}, [0, 1, 2], "rank 1: KeyError: 3"),
        ({0: LOST, 2: LOST}, [1], "rank 1 died (its process was killed or crashed)"),
        ({}, [2], "rank 2 died (its process was killed or crashed)"),
        ({0: LOST, 1: LOST}, [], "rank 2 does not answer (rank 0: connection closed)"),
        ({0: LOST, 1: LOST, 2: LOST}, [], "; ".join(f"rank {rank}: connection closed" for rank in range(3))),
    ],
)
def test_the_first_cause_is_blamed(reports: dict[int, FailureReport], lost: list[int], expected: str) -> None:
    assert blame(3, reports, lost) == expected
