"""One rank of a server that stops for its re-placements, as synchronous rebalancing does: for the bench alone.

    torchrun --nproc-per-node 4 -m bench.serving.stop_the_world --model DIR --strategy rq --rebalance auto

The decisions, the rounds and the messages are those of `rq_ep.serve`. Only the mover differs: once every rank knows of
a migration, all of them make all of its moves on their engines' threads, between the same two steps.
"""

import sys

from rq_ep.moe.migration.expert_mover import ExpertMover, Migration, _code, _Progress
from rq_ep.serve.__main__ import main
from rq_ep.serve.process import exit_quickly
from rq_ep.serve.rank.rebalance import group_mover


class StopTheWorldMover(ExpertMover):
    """Stages and commits on the engine's thread. What fails ends the server."""

    def begin(self, migration: Migration) -> None:
        with self._changed:
            self._current = _Progress(migration)
            self._flags = self._flags._replace(staged=_code(migration, 1))  # this rank can begin

    def between_steps(self, staged: int, failed: int, is_idle: bool = False) -> None:
        current = self._current
        if current is None or failed >= current.migration.generation or staged <= _code(current.migration, 0):
            super().between_steps(0, failed, is_idle)
            return
        for number, moves in enumerate(current.migration.rounds):
            self._stage(current, number, moves)
            if self._flags.staged <= _code(current.migration, number):
                raise RuntimeError(f"round {number} of re-placement {current.migration.generation} has failed")
            self._commit(current)
        for layer in self._layers:
            layer.bank.discard_staged()

    def _rest(self, migration: Migration) -> None:
        """No step waits beside."""


if __name__ == "__main__":
    group_mover.ExpertMover = StopTheWorldMover  # type: ignore[attr-defined]  # that room does not export its imports
    exit_quickly(main([*sys.argv[1:], "--on-rank-failure", "stop"]))  # else the rank would be another process
