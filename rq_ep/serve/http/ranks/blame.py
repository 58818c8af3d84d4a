"""Which rank or event brought the group down, from the reports of its fall."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FailureReport:
    """One report of a group that falls: the error of a rank, its death, or what ends all ranks together.

    `rank` is None where the report is about no single rank. `is_consequence`: the rank lost its connection to another
    one, which is to blame. `status` is what clients get.
    """

    rank: int | None
    text: str
    is_consequence: bool = False
    status: int = 500


def blame(ranks: Collection[int], reports: Sequence[FailureReport]) -> FailureReport:
    """The report of what happened first, or one that names the rank that does not answer.

    A launcher ends all ranks once one has died, within a tenth of a second: what comes later than the first report is
    its work, or the other ranks'.

    Args:
        ranks: of the group.
        reports: in the order in which they came, at least one.
    """
    for report in reports:
        if not report.is_consequence:
            return report
    first = reports[0]
    if silent := sorted(set(ranks) - {report.rank for report in reports}):
        return FailureReport(silent[0], f"rank {silent[0]} does not answer ({first.text})")
    return FailureReport(first.rank, "; ".join(report.text for report in reports))
