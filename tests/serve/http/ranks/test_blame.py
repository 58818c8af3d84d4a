"""Naming the rank that brought the group down."""

import pytest

from rq_ep.serve.http.ranks.blame import FailureReport, blame


def lost(rank: int) -> FailureReport:
    return FailureReport(rank, f"rank {rank}: connection closed", is_consequence=True)


BUG = FailureReport(1, "rank 1: KeyError: 3")
DIED = FailureReport(1, "rank 1 died")
SIGNALLED = FailureReport(0, "the server was shut down by a second SIGTERM", status=503)
STALL = FailureReport(None, "rank 2 has not been heard for 60 s")


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([BUG], BUG),
        ([lost(0), lost(2), BUG], BUG),
        ([lost(0), DIED], DIED),
        ([DIED, SIGNALLED, FailureReport(2, "rank 2 died")], DIED),
        ([SIGNALLED, DIED], SIGNALLED),
        ([STALL, BUG], STALL),
        ([lost(0), lost(1)], FailureReport(2, "rank 2 does not answer (rank 0: connection closed)")),
        ([lost(2), lost(0), lost(1)], FailureReport(2, "; ".join(lost(rank).text for rank in (2, 0, 1)))),
    ],
)
def test_the_first_cause_is_blamed(reports: list[FailureReport], expected: FailureReport) -> None:
    assert blame(range(3), reports) == expected
