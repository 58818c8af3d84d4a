"""The placement that serves, as `placement.json` holds it, in the middle of a migration too."""

import asyncio
from typing import Any

from rq_ep.core.placement import Placement
from rq_ep.serve.messages import MigrationPlanned, PlacementServed, RoundServed
from rq_ep.solver.migration.move_rounds import read_rounds


class PlacementView:
    """Follows the migrations of a group. What serves in the middle of one is made out when somebody asks."""

    def __init__(self) -> None:
        self._document: dict[str, Any] | None = None  # before the migration under way
        self._planned: MigrationPlanned | None = None
        self._num_rounds = 0  # of it, that serve

    def begin(self, document: dict[str, Any]) -> None:
        """The group serves a placement."""
        self._document, self._planned, self._num_rounds = document, None, 0

    def take(self, message: MigrationPlanned | RoundServed | PlacementServed) -> None:
        """Take what the rank that leads says."""
        match message:
            case MigrationPlanned():
                self._planned, self._num_rounds = message, 0
            case RoundServed():
                if self._planned is not None and message.generation == self._planned.generation:
                    self._num_rounds = message.num_rounds
            case PlacementServed():
                self.begin(message.placement)

    async def document(self) -> dict[str, Any] | None:
        """The placement; None: none serves yet."""
        if self._document is None or self._planned is None or self._num_rounds == 0:
            return self._document
        # For many layers and rounds it takes most of a second, in which the event loop has other clients to answer.
        return await asyncio.to_thread(_amid, self._document, self._planned, self._num_rounds)


def _amid(document: dict[str, Any], planned: MigrationPlanned, num_rounds: int) -> dict[str, Any]:
    """The placement once some rounds of a migration serve."""
    before, goal = Placement.from_dict(document), Placement.from_dict(planned.placement)
    layers = list(before.layers)
    for moves in read_rounds(planned.rounds[:num_rounds]):
        layers = moves.applied_to(layers, goal)
    return before.with_layers(layers, planned.expert_bytes).to_dict()
