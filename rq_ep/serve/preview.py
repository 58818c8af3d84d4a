"""What a server would be: its settings, its placement, the bytes of each rank. No weights are read."""

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from rq_ep.config import ServeConfig, resolved
from rq_ep.core.placement import Placement
from rq_ep.formats import native_format_name
from rq_ep.model.checkpoint import read_config
from rq_ep.model.identity import model_identity
from rq_ep.model.memory import expert_bytes
from rq_ep.model.placing import check_layers, choose_strategy, place_uniformly
from rq_ep.model.seam import family_of, find_expert_modules
from rq_ep.serve.inputs import check_inputs, chosen_strategy


def preview(config: ServeConfig, num_ranks: int) -> str:
    """The text of `--dry-run`.

    Raises:
        UserError: whatever a real start would refuse before it reads weights.
    """
    check_inputs(config)
    placement = None if config.placement is None else Placement.load(config.placement)
    strategy = choose_strategy(chosen_strategy(config), placement)
    model_config = read_config(config.model)
    identity = model_identity(config.model)
    dtype = getattr(torch, config.dtype) if config.dtype != "auto" else model_config.dtype or torch.bfloat16
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    experts = find_expert_modules(model)
    layout = family_of(experts[0].module).layout
    if placement is None:
        placement = place_uniformly(strategy, experts, layout, native_format_name(dtype), num_ranks, identity)
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
    for rank in range(num_ranks):
        held = expert_bytes(placement, layout, [rank])
        formats = ", ".join(f"{size:,} in {name}" for name, size in sorted(held.items())) or "none"
        total = sum(held.values())
        lines.append(f"rank {rank}: {total + others:,} bytes: experts {total:,} ({formats}), the rest {others:,}")
    return "\n".join(lines)
