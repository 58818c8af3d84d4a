"""The preview of a server: settings, placement, the bytes of each rank and what they leave. No weights are read."""

from collections.abc import Iterator

import torch

from rq_ep.config import ServeConfig, resolved
from rq_ep.core.placement import Placement
from rq_ep.core.strategy import Strategy
from rq_ep.engine.kv_cache import cache_size, kv_bytes_per_token
from rq_ep.engine.servable import PAGED
from rq_ep.model.checkpoint.generation_defaults import read_sampling_defaults
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.load.attach import check_layers, place_uniformly
from rq_ep.model.load.memory import arriving_bytes, available_bytes, expert_bytes, most_layer_bytes
from rq_ep.model.load.opened_model import OpenedModel
from rq_ep.model.model_folder import model_headers
from rq_ep.model.seam.expert_modules import family_of
from rq_ep.serve.check_settings import chosen_strategy
from rq_ep.serve.rank.check_inputs import check_inputs, in_folder, read_in_advance
from rq_ep.serve.rank.rebalance.move_inputs import MoveInputs
from rq_ep.serve.rank.rebalance.rebalance_inputs import RebalanceInputs
from rq_ep.strategies import choose_strategy


def preview(config: ServeConfig, num_ranks: int, num_ranks_here: int) -> str:
    """The text of `--dry-run`.

    Args:
        config: what to serve.
        num_ranks: size of the group.
        num_ranks_here: how many of them share this machine, and without GPUs its memory.

    Raises:
        UserError: what a real start would refuse before it reads weights.
    """
    with model_headers(config.model, config.revision) as (folder, missing_bytes):
        text = _preview(in_folder(config, folder), num_ranks, num_ranks_here)
    lines = [resolved(config), "", *_missing_lines(config, missing_bytes), text]
    return "\n".join(lines)


def _missing_lines(config: ServeConfig, missing_bytes: int) -> Iterator[str]:
    """What of a model of the hub is not here yet, and what cannot be said without it."""
    if missing_bytes:
        yield f"{config.model}: {missing_bytes:,} bytes of weights are still to be downloaded; their headers were"
        if named := [name for name in (config.placement, config.experts, config.stats) if name is not None]:
            yield f"whether {', '.join(named)} was made for this model is not compared: that takes its weights"


def _preview(config: ServeConfig, num_ranks: int, num_ranks_here: int) -> str:
    """The preview of a model in a folder, behind the settings."""
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    config = config.for_ranks(num_ranks)
    checked = check_inputs(config, device.type)
    rebalancing = RebalanceInputs.check(config)
    moves = rebalancing or MoveInputs.of_survivors(config, num_ranks)
    opened = OpenedModel.open(config.model, config.dtype, strict_weights=config.strict_weights)
    placement = None if config.placement is None else Placement.load(config.placement)
    strategy = choose_strategy(chosen_strategy(config), placement)
    placement = _checked(config, placement, strategy, opened, num_ranks)
    lines = [
        f"placement: made by {placement.strategy}, served by {strategy.name}; {len(placement.layers)} MoE layers of "
        f"{placement.layers[0].num_experts} experts on {num_ranks} ranks",
        str(read_sampling_defaults(config.model, config.generation_config)),
        *(f"{config.model}: {note}" for note in opened.reader.notes),
    ]
    if checked.why_text_only is None:
        lines.append("images in chat: of data: URLs" + ", and fetched" * config.allow_remote_images)
    elif checked.model_config.get_text_config() is not checked.model_config:
        lines.append(f"served text-only: {checked.why_text_only}")
    if rebalancing is not None:
        lines.append(rebalancing.summary())
    if in_advance := read_in_advance(config):
        numbers = ", ".join(f"{number} in {name}" for name, number in sorted(in_advance.items()))
        lines.append(f"quantized in advance, read from {config.experts}: {numbers}")
    num_sharing = 1 if device.type == "cuda" else min(num_ranks, num_ranks_here)
    return "\n".join([*lines, *_memory_lines(config, checked.cache, placement, opened, device, num_sharing, moves)])


def _checked(
    config: ServeConfig, placement: Placement | None, strategy: Strategy, opened: OpenedModel, num_ranks: int
) -> Placement:
    """The placement, if the model and the strategy go with it; None: the one for uniform load."""
    identity = model_identity(config.model)
    if placement is None:
        placement = place_uniformly(strategy, opened, num_ranks, identity)
    placement.check_serves(identity, num_ranks, config.placement or "the placement")
    check_layers(placement, opened.experts)
    for layer in placement.layers:
        strategy.planner(layer, placement.topology)
    return placement


def _memory_lines(
    config: ServeConfig,
    cache: str,
    placement: Placement,
    opened: OpenedModel,
    device: torch.device,
    num_sharing: int,
    moves: MoveInputs | None,
) -> Iterator[str]:
    """What each rank holds, and what that leaves of the memory that `num_sharing` ranks share."""
    layout = family_of(opened.experts[0].module).layout
    routed = sum(parameter.nbytes for module in opened.experts for parameter in module.module.parameters())
    others = sum(parameter.nbytes for parameter in opened.model.parameters()) - routed
    memory = available_bytes(device)
    token_bytes = kv_bytes_per_token(opened.model.config, opened.dtype) if cache == PAGED else None
    for rank in range(placement.topology.num_ranks):
        held = expert_bytes(placement, layout, [rank])
        formats = ", ".join(f"{size:,} in {name}" for name, size in sorted(held.items())) or "none"
        total = sum(held.values())
        arriving = 0 if moves is None else arriving_bytes(placement, [rank], moves.room_bytes)
        if moves is not None and moves.keeps_stacks:
            arriving += most_layer_bytes(placement, layout, [rank])
        moving = f", {arriving:,} for experts that arrive" if arriving else ""
        needed = total + others + arriving
        yield f"rank {rank}: {needed:,} bytes: experts {total:,} ({formats}), the rest {others:,}{moving}"
        if memory is not None:
            left = max(memory // num_sharing - needed, 0)
            tokens = "" if token_bytes is None else f": {left // token_bytes:,} tokens"
            yield f"        leaves {left:,} bytes for rows on their way and the KV cache{tokens}"
    cached = cache_size(config.kv_cache_tokens, device.type)
    if token_bytes is None:
        capacity = "what is left" if cached is None else f"{cached:,} positions a rank"
        yield f"padded cache: the model's own; {capacity}, rows times the longest one (--kv-cache-tokens)"
    else:
        capacity = "what is left" if cached is None else f"{cached:,} tokens, {cached * token_bytes:,} bytes a rank"
        yield f"paged KV cache: {token_bytes:,} bytes a token; {capacity} (--kv-cache-tokens)"
    if memory is not None:
        yield f"memory: {memory:,} bytes of {device.type}, for {num_sharing} rank{'s' * (num_sharing > 1)}"
