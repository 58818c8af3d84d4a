"""The moves from one placement to another: who sends what to whom, in an order that keeps to the byte budgets."""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.moves import DROP, RECEIVE, Held, LayerMoves, Move, Moves, byte_limits
from rq_ep.core.placement import Placement
from rq_ep.core.replicas import replica_bytes

Stored = dict[tuple[int, int], str]  # (rank, expert) -> format


def plan_moves(before: Held, after: Placement, expert_bytes: Mapping[str, int], native_format: str) -> Moves:
    """The moves from `before` to `after`.

    Layers that free bytes come before layers that need them. Within a layer, replicas that no other rank still has to
    receive are dropped first, then what fits is received. Where full ranks exchange replicas, one of them exceeds its
    limit for a moment.

    Args:
        before: replicas of each layer of `after`, on the same ranks.
        after: the goal.
        expert_bytes: format -> bytes of one expert.
        native_format: the one from which every other is made.
    """
    num_ranks, nodes_R = after.topology.num_ranks, after.topology.nodes_R
    bytes_LR = np.stack([replica_bytes(replicas, num_ranks, expert_bytes) for replicas in before])
    deltas_LR = np.stack([replica_bytes(layer.replicas, num_ranks, expert_bytes) for layer in after.layers]) - bytes_LR
    bytes_R = bytes_LR.sum(axis=0)
    limit_R = byte_limits(bytes_R, after)
    room_bytes, layers = 0, []
    pending = list(range(len(before)))
    while pending:
        i = min(pending, key=lambda i: (int((bytes_R + deltas_LR[i] - limit_R).max()), i))
        pending.remove(i)
        stored = {(replica.rank, replica.expert): replica.format for replica in before[i]}
        target = {(replica.rank, replica.expert): replica.format for replica in after.layers[i].replicas}
        receives = _receives(stored, target, nodes_R, native_format)
        moves, excess = _ordered(receives, stored, target, bytes_R, limit_R, expert_bytes)
        room_bytes = max(room_bytes, excess)
        if moves:
            layers.append(LayerMoves(after.layers[i].index, tuple(moves)))
    return Moves(num_ranks, room_bytes, tuple(layers), after.model)


def _receives(stored: Stored, target: Stored, nodes_R: IntArray, native_format: str) -> list[Move]:
    """What is missing, and its source: the rank itself, else its node, else another rank, else the checkpoint."""
    holders: dict[int, list[int]] = {}
    for rank, expert in stored:
        holders.setdefault(expert, []).append(rank)
    num_sent: Counter[int] = Counter()
    receives = []
    for (rank, expert), name in sorted(target.items()):
        if stored.get((rank, expert)) == name:
            continue
        able = [other for other in holders.get(expert, []) if stored[other, expert] in (name, native_format)]
        source = min(
            able,
            key=lambda other: (
                other != rank,
                nodes_R[other] != nodes_R[rank],
                stored[other, expert] != name,  # otherwise it has to be made there first
                num_sent[other],
                other,
            ),
            default=None,
        )
        if source is not None and source != rank:
            num_sent[source] += 1
        receives.append(Move(RECEIVE, rank, expert, name, source))
    return receives


def _ordered(
    receives: list[Move],
    stored: Stored,
    target: Stored,
    bytes_R: IntArray,
    limit_R: IntArray,
    expert_bytes: Mapping[str, int],
) -> tuple[list[Move], int]:
    """The moves of a layer in order, and by how many bytes a rank exceeds its limit at most; updates `bytes_R`."""
    awaited = Counter((move.source, move.expert) for move in receives if move.source not in (None, move.rank))
    drops = {key for key in stored if key not in target}
    moves: list[Move] = []
    peak = 0

    def excess(move: Move) -> int:
        return int(bytes_R[move.rank] + expert_bytes[move.format] - limit_R[move.rank])

    def drop_what_no_rank_awaits() -> None:
        for key in sorted(key for key in drops if not awaited[key]):
            drops.remove(key)
            moves.append(Move(DROP, *key, stored[key]))
            bytes_R[key[0]] -= expert_bytes[stored[key]]

    def receive(move: Move) -> None:
        moves.append(move)
        old = stored.get((move.rank, move.expert))
        bytes_R[move.rank] += expert_bytes[move.format] - (expert_bytes[old] if old else 0)
        if move.source is not None and move.source != move.rank:
            awaited[move.source, move.expert] -= 1

    while receives:
        drop_what_no_rank_awaits()
        ready = [move for move in receives if not awaited[move.rank, move.expert]]  # the others' old replica is needed
        ready.sort(key=lambda move: (move.source, move.expert) not in drops)  # those that free bytes come first
        fitting = [move for move in ready if excess(move) <= 0]
        for move in fitting or [min(ready, key=lambda move: (excess(move), move))]:
            if fitting and excess(move) > 0:
                continue  # the moves before have taken the bytes
            peak = max(peak, excess(move))
            receive(move)
            receives.remove(move)
    drop_what_no_rank_awaits()
    return moves, peak
