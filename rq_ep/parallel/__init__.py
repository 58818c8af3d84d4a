"""Groups of ranks and the exchange between them. The only room, besides the engine, that knows torch.distributed."""

from rq_ep.parallel.dispatch_handle import Received, Trip
from rq_ep.parallel.ep_group import EPGroup, Piece, RankFailure, Transfers
from rq_ep.parallel.exchange import Exchange
from rq_ep.parallel.local_group import LocalGroup, LocalWorld, run_local, single_group
from rq_ep.parallel.routing_counts import Census, Homes
from rq_ep.parallel.torch_group import TorchGroup

__all__ = [
    "Census", "EPGroup", "Exchange", "Homes", "LocalGroup", "LocalWorld", "Piece", "RankFailure", "Received",
    "TorchGroup", "Transfers", "Trip", "run_local", "single_group",
]  # fmt: skip
