"""Groups of ranks and the exchange between them. The only room, besides the engine, that knows torch.distributed."""

from rq_ep.parallel.base import EPGroup, Piece, RankFailure, Transfers
from rq_ep.parallel.census import Census, Homes
from rq_ep.parallel.exchange import Exchange
from rq_ep.parallel.group import TorchGroup
from rq_ep.parallel.local import LocalGroup, LocalWorld, run_local, single_group
from rq_ep.parallel.trip import Received, Trip

__all__ = [
    "Census", "EPGroup", "Exchange", "Homes", "LocalGroup", "LocalWorld", "Piece", "RankFailure", "Received",
    "TorchGroup", "Transfers", "Trip", "run_local", "single_group",
]  # fmt: skip
