"""A rank's part in a round of moves: what it sends is made ready, and what arrives gets room and is verified."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.core.moves import Move
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.strategy import Planner
from rq_ep.formats import get_format
from rq_ep.moe.expert_bank import ExpertBank
from rq_ep.moe.migration.expert_transfers import ExpertTransfer
from rq_ep.solver.migration.move_rounds import MoveRound

# Reads an expert from the checkpoint: (index of the layer, expert, format) -> packed, uint8 [nbytes].
ReadExpert = Callable[[int, int, str], Tensor]
Transfers = Mapping[tuple[int, Move], ExpertTransfer]  # by the position of a layer
Arrivals = Mapping[tuple[int, int], tuple[Tensor, Tensor]]  # (position, expert) -> buffer, and where it lands


class MovableLayer(Protocol):
    """An expert-parallel layer whose replicas may change between two steps."""

    @property
    def placement(self) -> LayerPlacement: ...
    @property
    def bank(self) -> ExpertBank: ...

    def replace_placement(self, placement: LayerPlacement, planner: Planner) -> None:
        """Serve these replicas from the next call on."""


class RoundStaging:
    """Makes rounds ready on one rank.

    Args:
        layers: of the model, in the order of its placement.
        rank: this one.
        read_expert: for experts that no rank holds in a format they can be made from; None: there is no checkpoint.
        reads_formats: an expert in another format than a rank holds is read too, instead of converted there.
        max_piece_bytes: of an expert, that travel at once.
        on_activity: told what is about to be done.
    """

    def __init__(
        self,
        layers: Sequence[MovableLayer],
        rank: int,
        read_expert: ReadExpert | None,
        reads_formats: bool,
        max_piece_bytes: int,
        on_activity: Callable[[str], None],
    ) -> None:
        self._layers = layers
        self._rank = rank
        self._read_expert = read_expert
        self._reads_formats = reads_formats
        self._max_piece_bytes = max_piece_bytes
        self._on_activity = on_activity

    def transfers(self, moves: MoveRound) -> Transfers:
        """What this rank sends and receives in a round, without buffers."""
        rank, transfers = self._rank, {}
        for position, move in moves.receives:
            if move.source not in (None, move.rank) and rank in (move.source, move.rank):
                nbytes = get_format(move.format).nbytes(self._layers[position].bank.layout)
                peer = move.source if rank == move.rank else move.rank
                assert peer is not None
                transfers[position, move] = ExpertTransfer(peer, rank == move.source, nbytes, self._max_piece_bytes)
        return transfers

    def prepare(self, moves: MoveRound, transfers: Transfers) -> Arrivals:
        """Give transfers their buffers. What comes from this rank itself or from the checkpoint is in its own then."""
        arrivals = {}
        for position, move in moves.receives:
            layer = self._layers[position]
            if move.rank == self._rank:
                self._on_activity(f"makes room for {_named_expert(layer, move.expert)}")
                buffer = layer.bank.stage(move.expert, move.format)
                host = buffer
                if move.source == self._rank:
                    buffer.copy_(self._converted(layer, move))
                elif move.source is None:
                    buffer.copy_(self._read(layer, move))
                else:
                    host = buffer if buffer.device.type == "cpu" else torch.empty_like(buffer, device="cpu")
                    transfers[position, move].buffer = host
                arrivals[position, move.expert] = (buffer, host)
            elif move.source == self._rank:
                transfers[position, move].buffer = self._converted(layer, move).cpu()
        return arrivals

    def verify(self, arrivals: Arrivals) -> None:
        """Compare what has arrived with its checksums.

        Raises:
            DamagedExpert: one does not match.
        """
        for (position, expert), (buffer, host) in arrivals.items():
            layer = self._layers[position]
            self._on_activity(f"verifies {_named_expert(layer, expert)}")
            if buffer is not host:
                buffer.copy_(host)
            layer.bank.verify_staged(expert)

    def _converted(self, layer: MovableLayer, move: Move) -> Tensor:
        """An expert that this rank holds, in the format of a move."""
        if self._reads_formats and layer.bank.format_of(move.expert).name != move.format:
            return self._read(layer, move)
        self._on_activity(f"converts {_named_expert(layer, move.expert)}")
        return layer.bank.converted(move.expert, move.format)

    def _read(self, layer: MovableLayer, move: Move) -> Tensor:
        if self._read_expert is None:
            raise UserError(f"{_named_expert(layer, move.expert)}: no checkpoint to read")
        self._on_activity(f"reads {_named_expert(layer, move.expert)} from the checkpoint")
        return self._read_expert(layer.placement.index, move.expert, move.format)


def _named_expert(layer: MovableLayer, expert: int) -> str:
    return f"expert {expert} of layer {layer.placement.index}"
