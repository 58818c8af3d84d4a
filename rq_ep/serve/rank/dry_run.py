"""The preview of a server: settings, placement, the bytes of each rank and what they leave. No weights are read."""

from collections.abc import Iterator

import torch

from rq_ep.config import ServeConfig, resolved
from rq_ep.core.placement import Placement
from rq_ep.core.strategy import Strategy
from rq_ep.engine.kv_cache import cache_size, kv_bytes_per_token
from rq_ep.model.checkpoint.generation_defaults import read_sampling_defaults
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.load.attach import check_layers, choose_strategy, place_uniformly
from rq_ep.model.load.memory import available_bytes, expert_bytes
from rq_ep.model.load.opened_model import OpenedModel
from rq_ep.model.seam.expert_modules import family_of
from rq_ep.serve.rank.check_inputs import check_inputs, chosen_strategy, read_in_advance
from rq_ep.serve.rank.rebalance.rebalance_inputs import RebalanceInputs


def preview(config: ServeConfig, num_ranks: int, num_ranks_here: int) -> str:
    """The text of `--dry-run`.

    Args:
        config: what to serve.
        num_ranks: size of the group.
        num_ranks_here: how many of them share this machine, and without GPUs its memory.

    Raises:
        UserError: what a real start would refuse before it reads weights.
    """
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    check_inputs(config, device.type)
    rebalancing = RebalanceInputs.check(config, num_ranks)
    opened = OpenedModel.open(config.model, config.dtype)
    placement = None if config.placement is None else Placement.load(config.placement)
    strategy = choose_strategy(chosen_strategy(config), placement)
    placement = _checked(config, placement, strategy, opened, num_ranks)
    lines = [
        resolved(config),
        "",
        f"placement: made by {placement.strategy}, served by {strategy.name}; {len(placement.layers)} MoE layers of "
        f"{placement.layers[0].num_experts} experts on {num_ranks} ranks",
        str(read_sampling_defaults(config.model, config.generation_config)),
        *(f"{config.model}: {note}" for note in opened.reader.notes),
    ]
    if rebalancing is not None:
        lines.append(rebalancing.summary())
