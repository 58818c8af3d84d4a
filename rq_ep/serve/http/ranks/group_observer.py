"""What is told of the ranks to whoever shows it."""

from collections.abc import Mapping
from typing import Protocol

from rq_ep.serve.messages import (
    Checked,
    MigrationPlanned,
    PlacementServed,
    RankStats,
    Ready,
    RebalanceAnswer,
    RebalanceStatus,
    Recorded,
    RecordingFailed,
    RoundServed,
)


class GroupObserver(Protocol):
    """Receives what the ranks report."""

    def on_checked(self, checked: Checked) -> None:
        """Rank 0 begins to load a checkpoint that is in order."""

    def on_ready(self, ready: Ready) -> None:
        """Every rank can serve."""

    def on_stats(self, rank: int, stats: RankStats) -> None:
        """Figures of a rank have come."""

    def on_recorded(self, result: Recorded | RecordingFailed) -> None:
        """A recording has ended."""

    def on_rebalance(self, message: RebalanceStatus | RebalanceAnswer) -> None:
        """Something has changed in the re-placements."""

    def on_placement(self, message: MigrationPlanned | RoundServed | PlacementServed) -> None:
        """Another placement is to serve, or more of it does, or all."""

    def on_rank_lost(self, rank: int, was_member: bool) -> None:
        """A rank is lost."""

    def on_recovery(self, seconds: Mapping[str, float]) -> None:
        """The members serve again after a loss, or a request goes on that was moved; seconds by part."""

    def on_resumption(self) -> None:
        """A request is moved to another rank."""

    def on_end(self) -> None:
        """Serving is over, in whatever way; called once."""
