"""From what ranks hold to what they shall hold: which rank gives what to which, in an order that keeps to the bytes."""

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.moves import DROP, RECEIVE, Held, LayerMoves, Move, Moves, byte_limits
from rq_ep.core.placement import Placement
from rq_ep.core.replicas import Replica

Stored = dict[tuple[int, int], str]  # (rank, expert) -> format


def plan_moves(before: Held, after: Placement, expert_bytes: Mapping[str, int], native_format: str) -> Moves:
    """The moves from `before` to `after`.

    Layers that free bytes come before those that need them; within a layer, replicas that nobody waits for are dropped
    first, then whatever fits is received. Where full ranks exchange replicas, one of them needs room for a moment.

    Args:
        before: replicas of each layer of `after`, on the same ranks.
        after: the goal.
        expert_bytes: format -> bytes of one expert.
        native_format: the one from which every other is made.
    """
    num_ranks, nodes_R = after.topology.num_ranks, after.topology.nodes_R
    bytes_LR = np.stack([bytes_of(replicas, num_ranks, expert_bytes) for replicas in before])
    deltas_LR = np.stack([bytes_of(layer.replicas, num_ranks, expert_bytes) for layer in after.layers]) - bytes_LR
    bytes_R = bytes_LR.sum(axis=0)
    limit_R = byte_limits(bytes_R, after)
    room, layers = 0, []
    pending = list(range(len(before)))
    while pending:
        at = min(pending, key=lambda at: (int((bytes_R + deltas_LR[at] - limit_R).max()), at))
        pending.remove(at)
        stored = {(one.rank, one.expert): one.format for one in before[at]}
        wanted = {(one.rank, one.expert): one.format for one in after.layers[at].replicas}
        receives = _receives(stored, wanted, nodes_R, native_format)
        moves, peak = _ordered(receives, stored, wanted, bytes_R, limit_R, expert_bytes)
        room = max(room, peak)
        if moves:
            layers.append(LayerMoves(after.layers[at].index, tuple(moves)))
    return Moves(num_ranks, room, tuple(layers), after.model)


def bytes_of(replicas: Iterable[Replica], num_ranks: int, expert_bytes: Mapping[str, int]) -> IntArray:
    bytes_R = np.zeros(num_ranks, np.int64)
    for replica in replicas:
        bytes_R[replica.rank] += expert_bytes[replica.format]
    return bytes_R


def _receives(stored: Stored, wanted: Stored, nodes_R: IntArray, native_format: str) -> list[Move]:
    """What is missing and who gives it: the rank itself, then its node, then another, then the checkpoint."""
    holders: dict[int, list[int]] = {}
    for rank, expert in stored:
        holders.setdefault(expert, []).append(rank)
    given: Counter[int] = Counter()
    receives = []
    for (rank, expert), name in sorted(wanted.items()):
        if stored.get((rank, expert)) == name:
            continue
        able = [other for other in holders.get(expert, []) if stored[other, expert] in (name, native_format)]
        source = min(
            able,
            key=lambda other: (
                other != rank,
                nodes_R[other] != nodes_R[rank],
                stored[other, expert] != name,  # otherwise it has to be made there first
                given[other],
                other,
            ),
            default=None,
        )
        if source is not None and source != rank:
            given[source] += 1
        receives.append(Move(RECEIVE, rank, expert, name, source))
    return receives


def _ordered(
    receives: list[Move],
    stored: Stored,
    wanted: Stored,
    bytes_R: IntArray,
    limit_R: IntArray,
    expert_bytes: Mapping[str, int],
) -> tuple[list[Move], int]:
    """The moves of a layer in order, and by how many bytes a rank exceeds its limit; brings `bytes_R` up to date."""
    asked = Counter((move.source, move.expert) for move in receives if move.source not in (None, move.rank))
    drops = {at for at in stored if at not in wanted}
    moves: list[Move] = []
    peak = 0

    def excess(move: Move) -> int:
        return int(bytes_R[move.rank] + expert_bytes[move.format] - limit_R[move.rank])

    def drop_what_nobody_waits_for() -> None:
        for at in sorted(at for at in drops if not asked[at]):
            drops.remove(at)
            moves.append(Move(DROP, *at, stored[at]))
            bytes_R[at[0]] -= expert_bytes[stored[at]]

    def receive(move: Move) -> None:
        moves.append(move)
        old = stored.get((move.rank, move.expert))
        bytes_R[move.rank] += expert_bytes[move.format] - (expert_bytes[old] if old else 0)
        if move.source is not None and move.source != move.rank:
            asked[move.source, move.expert] -= 1

    while receives:
        drop_what_nobody_waits_for()
        ready = [move for move in receives if not asked[move.rank, move.expert]]  # what others wait for stays as it is
        ready.sort(key=lambda move: (move.source, move.expert) not in drops)  # those that free something come first
        fitting = [move for move in ready if excess(move) <= 0]
        for move in fitting or [min(ready, key=lambda move: (excess(move), move))]:
            if fitting and excess(move) > 0:
                continue  # what was received before it took its room
            peak = max(peak, excess(move))
            receive(move)
            receives.remove(move)
    drop_what_nobody_waits_for()
    return moves, peak
