"""Rounds of moves for a group that goes on serving: what arrives together, and what is dropped when it serves.

In a round a rank sends at most one expert to another rank and receives at most one. What has arrived serves from a
common step on, and replicas are dropped at that step, as many as the bytes ask for. So every rank holds what it may,
and one round's arrivals at most besides; every step finds a replica of every expert, all of them in one format; and the
cap on low pairs holds at every step, where it does at first.

Without other constraints the rounds are as few as there can be: as many as the busiest rank sends or receives, because
every round serves all ranks that are that busy (Koenig, Ueber Graphen und ihre Anwendung, Math. Annalen 77, 1916: the
edges of a bipartite graph need as many colours as its largest degree).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.moves import Held, LayerMoves, Move, Moves
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.replicas import Replica
from rq_ep.solver.migration.rounds.format_changes import FormatChanges, LowCap
from rq_ep.solver.migration.rounds.holdings import Holdings
from rq_ep.solver.migration.rounds.round_filling import ReplicaValue, RoundFilling
from rq_ep.solver.migration.rounds.senders import Senders


class MoveRound(NamedTuple):
    """Replicas that arrive together, and those that are dropped when they serve; with positions of layers."""

    receives: tuple[tuple[int, Move], ...]
    drops: tuple[tuple[int, Move], ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Positions of the layers that change, ascending."""
        return tuple(sorted({layer for layer, _ in (*self.receives, *self.drops)}))

    def received_bytes_R(self, num_ranks: int, expert_bytes: Mapping[str, int]) -> IntArray:
        """[R] bytes that reach each rank from another one or from the checkpoint."""
        moves = [LayerMoves(layer, (move,)) for layer, move in self.receives]
        return Moves(num_ranks, 0, tuple(moves)).received_bytes_R(expert_bytes)

    def applied_to(self, layers: Sequence[LayerPlacement], goal: Placement | None = None) -> list[LayerPlacement]:
        """The layers after the round.

        A layer that has reached the goal takes its shares. In others that have changed, replicas of an expert share
        its pairs evenly.
        """
        arrived: dict[int, list[Replica]] = {layer: [] for layer in self.layers}
        dropped: dict[int, list[tuple[int, int]]] = {layer: [] for layer in self.layers}
        for layer, move in self.receives:
            arrived[layer].append(Replica(move.rank, move.expert, move.format))
        for layer, move in self.drops:
            dropped[layer].append((move.rank, move.expert))
        result = list(layers)
        for layer in self.layers:
            old = layers[layer]
            replicas = old.replicas.changed(arrived[layer], dropped[layer])
            if goal is not None and replicas.are_those_of(goal.layers[layer].replicas):
                result[layer] = goal.layers[layer]
            else:
                result[layer] = LayerPlacement.sharing_evenly(old.index, old.num_experts, replicas)
        return result


def move_rounds(
    before: Held,
    after: Placement,
    expert_bytes: Mapping[str, int],
    native_format: str,
    room_bytes: int,
    value: ReplicaValue = lambda layer, replica: 0.0,
    low_cap: LowCap | None = None,
) -> list[MoveRound]:
    """The rounds that lead from `before` to `after`.

    Args:
        before: replicas of each layer of `after`, on the same ranks. An expert that has none is read from the
            checkpoint. Those of an expert share a format, before and after, where the layer does not mix formats.
        after: the goal.
        expert_bytes: format -> bytes of one expert.
        native_format: the one from which every other is made.
        room_bytes: by which a rank may exceed its limit (its budget, or what it holds before or after) while something
            arrives.
        value: of a replica at a position of a layer.
        low_cap: holds after every round; a cap that does not hold before, or after, is not exceeded further.

    Raises:
        UserError: there is too little room; the message says how much would do for the next round.
    """
    held = Holdings(before, after, expert_bytes)
    changes = FormatChanges(held, before, native_format, low_cap)
    senders = Senders(held, after.topology.nodes_R.tolist(), native_format)
    filling = RoundFilling(held, changes, senders, value)
    rounds = []
    while changes or held.missing:
        moves = filling.next_moves(room_bytes)
        if not moves:
            size = max(expert_bytes.values())
            raise UserError(
                f"--rebalance-room {room_bytes}: too little for any of {len(held.missing)} replicas to arrive; "
                f"raise it to {(room_bytes // size + 1) * size} bytes or more"
            )
        drops = held.serve(moves)
        changes.serve(slot.of for slot in moves)
        rounds.append(MoveRound(tuple((slot.of.layer, move) for slot, move in sorted(moves.items())), tuple(drops)))
    if drops := held.drop_surplus():
        rounds.append(MoveRound((), tuple(drops)))
    return rounds


def with_early_drops(rounds: Sequence[MoveRound]) -> list[MoveRound]:
    """The rounds for a strategy that serves one replica of each expert: it is dropped once another one has arrived.

    Args:
        rounds: in which an expert arrives once at most.
    """
    arrivals = {(layer, move.expert): at for at, one in enumerate(rounds) for layer, move in one.receives}
    drops: list[list[tuple[int, Move]]] = [[] for _ in rounds]
    for at, one in enumerate(rounds):
        for layer, move in one.drops:
            drops[min(at, arrivals.get((layer, move.expert), at))].append((layer, move))
    early = [MoveRound(one.receives, tuple(dropped)) for one, dropped in zip(rounds, drops, strict=True)]
    return [one for one in early if one.receives or one.drops]


def read_rounds(rows: Sequence[Any]) -> tuple[MoveRound, ...]:
    """The rounds of a message: of each what arrives and what goes, as (position of a layer, fields of a `Move`)."""
    return tuple(
        MoveRound(*(tuple((position, Move(*move)) for position, move in moves) for moves in row)) for row in rows
    )
