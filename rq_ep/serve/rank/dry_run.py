"""The preview of a server: settings, placement, the bytes of each rank and what they leave. No weights are read."""

import torch

from rq_ep.config import ServeConfig, resolved
from rq_ep.core.placement import Placement
from rq_ep.engine.kv_cache import cache_size, kv_bytes_per_token
from rq_ep.model.checkpoint.generation_defaults import read_sampling_defaults
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.checkpoint.quantized_checkpoint import expert_format
from rq_ep.model.load.attach import check_layers, choose_strategy, place_uniformly
from rq_ep.model.load.memory import available_bytes, expert_bytes
from rq_ep.model.load.opened_model import OpenedModel
from rq_ep.model.seam.expert_modules import family_of
from rq_ep.serve.rank.check_inputs import check_inputs, chosen_strategy, read_in_advance


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
    placement = None if config.placement is None else Placement.load(config.placement)
    strategy = choose_strategy(chosen_strategy(config), placement)
    identity = model_identity(config.model)
    opened = OpenedModel.open(config.model, config.dtype)
    model, experts, dtype = opened.model, opened.experts, opened.dtype
    layout = family_of(experts[0].module).layout
    if placement is None:
        native = expert_format(opened.checkpoint, dtype)
        placement = place_uniformly(strategy, experts, layout, native, num_ranks, identity)
    placement.check_serves(identity, num_ranks, config.placement or "the placement")
    check_layers(placement, experts)
    for layer in placement.layers:
        strategy.planner(layer, placement.topology)
    routed = sum(parameter.nbytes for module in experts for parameter in module.module.parameters())
    others = sum(parameter.nbytes for parameter in model.parameters()) - routed
    lines = [
        resolved(config),
        "",
        f"placement: made by {placement.strategy}, served by {strategy.name}; {len(placement.layers)} MoE layers of "
        f"{placement.layers[0].num_experts} experts on {num_ranks} ranks",
    ]
    lines.append(f"{read_sampling_defaults(config.model, config.generation_config)}")
    lines += [f"{config.model}: {note}" for note in opened.reader.notes]
    if in_advance := read_in_advance(config):
        numbers = ", ".join(f"{number} in {name}" for name, number in sorted(in_advance.items()))
        lines.append(f"quantized in advance, read from {config.experts}: {numbers}")
    memory = available_bytes(device)
    sharers = 1 if device.type == "cuda" else min(num_ranks, num_ranks_here)
    token_bytes = kv_bytes_per_token(model.config, dtype)
    for rank in range(num_ranks):
        held = expert_bytes(placement, layout, [rank])
        formats = ", ".join(f"{size:,} in {name}" for name, size in sorted(held.items())) or "none"
        total = sum(held.values())
        lines.append(f"rank {rank}: {total + others:,} bytes: experts {total:,} ({formats}), the rest {others:,}")
        if memory is not None:
            left = max(memory // sharers - total - others, 0)
            lines.append(
                f"        leaves {left:,} bytes for rows on their way and the KV cache: {left // token_bytes:,} tokens"
            )
    tokens = cache_size(config.kv_cache_tokens, device.type)
    capacity = "what is left" if tokens is None else f"{tokens:,} tokens, {tokens * token_bytes:,} bytes a rank"
    lines.append(f"KV cache: {token_bytes:,} bytes a token; {capacity} (--kv-cache-tokens)")
    if memory is not None:
        lines.append(f"memory: {memory:,} bytes of {device.type}, for {sharers} rank{'s' * (sharers > 1)}")
    return "\n".join(lines)
