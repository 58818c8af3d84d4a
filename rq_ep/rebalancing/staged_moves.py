"""When the rounds of a migration serve: replicas arrive beside the steps, so many bytes of a rank in each."""

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from rq_ep.solver.migration.move_rounds import MoveRound


class StagedMoves:
    """The rounds of a migration under way. A round begins when the one before it serves.

    Args:
        rounds: in their order.
        num_ranks: of the group.
        expert_bytes: format -> bytes of one expert.
        bytes_per_step: that reach a rank in a step at most; None: a round arrives within a step, however
            long that may take.
    """

    def __init__(
        self,
        rounds: Sequence[MoveRound],
        num_ranks: int,
        expert_bytes: Mapping[str, int],
        bytes_per_step: int | None = None,
    ) -> None:
        self._rounds = deque(rounds)
        self._num_ranks = num_ranks
        self._expert_bytes = expert_bytes
        self._bytes_per_step = bytes_per_step
        self._left_R = np.zeros(num_ranks, np.int64)
        self.moved_bytes = 0
        self._begin()

    @property
    def is_done(self) -> bool:
        return not self._rounds

    def step(self) -> MoveRound | None:
        """Let a step pass; the round that has arrived in it, and serves from the next one on."""
        arrived_R = self._left_R if self._bytes_per_step is None else np.minimum(self._left_R, self._bytes_per_step)
        self._left_R = self._left_R - arrived_R
        self.moved_bytes += int(arrived_R.sum())
        if self._left_R.any() or not self._rounds:
            return None
        arrived = self._rounds.popleft()
        self._begin()
        return arrived

    def _begin(self) -> None:
        if self._rounds:
            self._left_R = self._rounds[0].received_bytes_R(self._num_ranks, self._expert_bytes)
