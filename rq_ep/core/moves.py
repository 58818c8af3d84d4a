"""Moves from one placement to another: the replicas that each rank receives, converts and drops, as a file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError, check_choice, check_integer, check_text
from rq_ep.core.files.documents import read_document, write_json
from rq_ep.core.placement import Placement
from rq_ep.core.replicas import Replica
from rq_ep.core.stats import ModelIdentity
from rq_ep.core.topology import MAX_RANKS

FORMAT = "rq_ep.moves/1"
RECEIVE, DROP = "receive", "drop"

Held = Sequence[Sequence[Replica]]  # the replicas of each layer; unlike in a placement, an expert may have none


class Move(NamedTuple):
    """One change on one rank.

    `receive` puts a replica of the expert on the rank, in the format; it replaces one in another format that the rank
    may hold. It comes from rank `source`, which holds the expert in that format, or in the native one and converts it;
    `source` is the rank itself where it converts its own replica, and None where the checkpoint is read. `drop` frees
    the replica.
    """

    do: str
    rank: int
    expert: int
    format: str
    source: int | None = None


@dataclass(frozen=True)
class LayerMoves:
    """Changes of one layer, in order. While they run the layer serves no step; between layers every step can run."""

    index: int  # of the layer in the model
    moves: tuple[Move, ...]


@dataclass(frozen=True)
class Moves:
    """All changes, in the order to execute them; after each layer every expert of it has a replica.

    `room_bytes` is the most by which a rank exceeds its limit on the way; its limit is its budget or, where that is
    more, what it holds before or after.
    """

    num_ranks: int
    room_bytes: int
    layers: tuple[LayerMoves, ...]
    model: ModelIdentity | None = None
    previous_ranks: tuple[
        int | None, ...
    ] = ()  # the former number of each rank; None: the rank is new; (): all as before

    def __post_init__(self) -> None:
        if self.previous_ranks and len(self.previous_ranks) != self.num_ranks:
            raise UserError(f"previous_ranks names {len(self.previous_ranks)} ranks, but num_ranks is {self.num_ranks}")

    def received_bytes_R(self, expert_bytes: Mapping[str, int]) -> IntArray:
        """[R] bytes that reach each rank over a link or from the checkpoint, without what it converts itself."""
        received_R = np.zeros(self.num_ranks, np.int64)
        for layer in self.layers:
            for move in layer.moves:
                if move.do == RECEIVE and move.source != move.rank:
                    received_R[move.rank] += expert_bytes[move.format]
        return received_R

    def check(
        self,
        before: Mapping[int, Iterable[Replica]],
        after: Placement,
        expert_bytes: Mapping[str, int],
        native_format: str,
    ) -> None:
        """Replay the moves; raise a `UserError` that names the first wrong move, or the layer that ends up different.

        Args:
            before: layer -> replicas at the start.
            after: the placement that results; its budgets hold on the way, except for `room_bytes`.
            expert_bytes: format -> bytes of one expert.
            native_format: the format from which all others are converted.
        """
        held = {layer: {(one.rank, one.expert): one.format for one in replicas} for layer, replicas in before.items()}
        bytes_R = np.zeros(self.num_ranks, np.int64)
        for stored in held.values():
            for (rank, _), name in stored.items():
                bytes_R[rank] += expert_bytes[name]
        limit_R = self.room_bytes + byte_limits(bytes_R, after)
        for layer in self.layers:
            for number, move in enumerate(layer.moves):
                where = f"layer {layer.index}, move {number}"
                _replay(where, move, held.setdefault(layer.index, {}), bytes_R, limit_R, expert_bytes, native_format)
        for layer_after in after.layers:
            expected = {(one.rank, one.expert): one.format for one in layer_after.replicas}
            if held.get(layer_after.index) != expected:
                raise UserError(f"layer {layer_after.index}: the moves do not lead to the placement: make both again")

    def save(self, path: str | Path) -> None:
        """Write the JSON file."""
        document = {
            "format": FORMAT,
            "model": None if self.model is None else {"id": self.model.id, "hash": self.model.hash},
            "num_ranks": self.num_ranks,
            "previous_ranks": self.previous_ranks or list(range(self.num_ranks)),
            "room_bytes": self.room_bytes,
            "layers": [
                {"layer": layer.index, "moves": [move._asdict() for move in layer.moves]} for layer in self.layers
            ],
        }
        write_json(path, document)

    @classmethod
    def load(cls, path: str | Path) -> "Moves":
        """Read the JSON file; a `UserError` says what is wrong with one that is foreign, incomplete or cut short."""
        hint = "write it with `rq-ep place --current FILE --moves FILE`"
        return read_document(path, "moves", FORMAT, hint, _read)


def byte_limits(before_R: IntArray, after: Placement) -> IntArray:
    """[R] bytes that a rank may hold on the way: its budget, or what it holds before or after where that is more."""
    limit_R = np.maximum(before_R, np.array(after.bytes_R, np.int64))
    return limit_R if after.budget_bytes_R is None else np.maximum(limit_R, np.array(after.budget_bytes_R, np.int64))


def _replay(
    where: str,
    move: Move,
    stored: dict[tuple[int, int], str],
    bytes_R: IntArray,
    limit_R: IntArray,
    expert_bytes: Mapping[str, int],
    native_format: str,
) -> None:
    at = (move.rank, move.expert)
    if move.do == DROP:
        if stored.pop(at, None) != move.format:
            raise UserError(f"{where}: rank {move.rank} holds no {move.format} replica of expert {move.expert} to drop")
        bytes_R[move.rank] -= expert_bytes[move.format]
        return
    if stored.get(at) == move.format:
        raise UserError(f"{where}: rank {move.rank} holds expert {move.expert} in {move.format} already")
    if move.source is not None and stored.get((move.source, move.expert)) not in (move.format, native_format):
        raise UserError(
            f"{where}: rank {move.source} cannot give expert {move.expert} in {move.format}; "
            f"it holds {stored.get((move.source, move.expert), 'no replica of it')}"
        )
    bytes_R[move.rank] += expert_bytes[move.format]
    if bytes_R[move.rank] > limit_R[move.rank]:
        raise UserError(f"{where}: {bytes_R[move.rank]} bytes on rank {move.rank}, above {limit_R[move.rank]}")
    bytes_R[move.rank] -= expert_bytes[stored[at]] if at in stored else 0
    stored[at] = move.format


def _read(document: Mapping[str, Any]) -> Moves:
    num_ranks = check_integer("num_ranks", document["num_ranks"], 1, MAX_RANKS)
    model = document["model"]
    layers = [
        LayerMoves(check_integer("layer", row["layer"]), tuple(_read_move(move, num_ranks) for move in row["moves"]))
        for row in document["layers"]
    ]
    previous = [
        None if rank is None else check_integer("previous rank", rank, 0, MAX_RANKS - 1)
        for rank in document["previous_ranks"]
    ]
    return Moves(
        num_ranks,
        check_integer("room_bytes", document["room_bytes"]),
        tuple(layers),
        None if model is None else ModelIdentity(**model),
        () if previous == list(range(num_ranks)) else tuple(previous),
    )


def _read_move(row: Mapping[str, Any], num_ranks: int) -> Move:
    source = row["source"]
    return Move(
        check_choice("move", str(row["do"]), (RECEIVE, DROP)),
        check_integer("rank", row["rank"], 0, num_ranks - 1),
        check_integer("expert", row["expert"]),
        check_text("format", row["format"]),
        None if source is None else check_integer("source", source, 0, num_ranks - 1),
    )
