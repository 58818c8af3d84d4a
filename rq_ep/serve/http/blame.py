"""Which rank brought the group down, out of what is known when it falls."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """A rank's last words. `is_consequence`: it lost its connection to another rank, which is the one to blame."""

    text: str
    is_consequence: bool


def verdict(num_ranks: int, reports: Mapping[int, Report], gone: Collection[int]) -> str:
    """Name the rank to blame and what it said.

    Args:
        num_ranks: size of the group.
        reports: last words by rank, in the order they came.
        gone: ranks whose connection has closed.
    """
    for rank, report in reports.items():
        if not report.is_consequence:
            return f"rank {rank}: {report.text}"
    if died := sorted(set(gone) - set(reports)):
        return f"rank {died[0]} died (its process was killed or crashed)"
    if silent := sorted(set(range(num_ranks)) - set(reports) - set(gone)):
        first, report = next(iter(reports.items()))
        return f"rank {silent[0]} does not answer (rank {first}: {report.text})"
    return "; ".join(f"rank {rank}: {report.text}" for rank, report in reports.items())
