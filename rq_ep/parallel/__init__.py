"""Groups of ranks and the exchange between them. Only this package uses torch.distributed."""

from rq_ep.parallel.dispatch_handle import Combine, DispatchHandle, Received
from rq_ep.parallel.ep_group import EPGroup, PeerTensor, RankFailure, Transfers
from rq_ep.parallel.exchange import Exchange, ExchangeSettings
from rq_ep.parallel.gathered_rows import GatheredRows
from rq_ep.parallel.local_group import LocalGroup, LocalWorld, run_local, single_group
from rq_ep.parallel.routing_counts import RoutingCounts, SoleHolders
from rq_ep.parallel.torch_group import TorchGroup

__all__ = [
    "Combine", "DispatchHandle", "EPGroup", "Exchange", "ExchangeSettings", "GatheredRows", "LocalGroup", "LocalWorld",
    "PeerTensor", "RankFailure", "Received", "RoutingCounts", "SoleHolders", "TorchGroup", "Transfers", "run_local",
    "single_group",
]  # fmt: skip
