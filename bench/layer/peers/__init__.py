"""Other people's layers in the same run: each is built from the case, and called like ours."""

from collections.abc import Callable

from torch import nn

from bench.layer.case import Case
from bench.layer.peers.deepspeed_autoep import deepspeed_autoep
from bench.layer.peers.deepspeed_moe import deepspeed_moe
from bench.layer.peers.transformers_ep import transformers_ep
from rq_ep.parallel import EPGroup

Peer = Callable[[Case, EPGroup], nn.Module]  # forward(hidden_TD, topk_ids_TK, topk_weights_TK) -> out_TD

PEERS: dict[str, tuple[str, Peer]] = {  # name -> label in tables, constructor
    "transformers": ("transformers EP (all-to-all)", transformers_ep),
    "deepspeed": ("DeepSpeed MoE (capacity-padded EP)", deepspeed_moe),
    "autoep": ("DeepSpeed AutoEP", deepspeed_autoep),
}
LOGGED = ("deepspeed", "autoep")  # those that DeepSpeed's communication logger sees
