"""Which rank brought the group down, from what is known when it falls."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FailureReport:
    """The error of a rank. `is_consequence`: it lost its connection to another rank, which is the one to blame."""

    text: str
    is_consequence: bool


def blame(num_ranks: int, reports: Mapping[int, FailureReport], lost: Collection[int]) -> str:
    """Name the rank to blame and its error.

    Args:
        num_ranks: size of the group.
        reports: errors by rank, in the order in which they came.
        lost: ranks whose connection ended without a good-bye.
    """
    for rank, report in reports.items():
        if not report.is_consequence:
            return f"rank {rank}: {report.text}"
    if died := sorted(set(lost) - set(reports)):
        return f"rank {died[0]} died (its process was killed or crashed)"
    if silent := sorted(set(range(num_ranks)) - set(reports) - set(lost)):
        first, report = next(iter(reports.items()))
        return f"rank {silent[0]} does not answer (rank {first}: {report.text})"
    return "; ".join(f"rank {rank}: {report.text}" for rank, report in reports.items())
