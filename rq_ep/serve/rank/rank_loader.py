"""Loading a rank's model for serving, and what the HTTP process and the log learn of it."""

import logging
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from rq_ep.config import ServeConfig
from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.engine.engine import vocab_size
from rq_ep.engine.servable import set_attention
from rq_ep.formats.kernels.blocked_product import has_fast_products
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.load.attach import check_layers, place_uniformly
from rq_ep.model.load.load_model import load
from rq_ep.model.load.load_report import LoadReport, report_of
from rq_ep.model.load.memory import expert_bytes
from rq_ep.moe import EPExperts
from rq_ep.moe.telemetry import CallRecorder
from rq_ep.parallel import TorchGroup
from rq_ep.parallel.host import keep_freed_memory
from rq_ep.serve.check_settings import chosen_strategy
from rq_ep.serve.messages import Ready
from rq_ep.serve.rank.rebalance.move_inputs import MoveInputs, recovered

log = logging.getLogger("rq_ep.serve")


def place_first(config: ServeConfig, group: TorchGroup, moves: MoveInputs) -> tuple[Placement, Placement]:
    """The placement for all ranks of a group that begins without some of them, and the one that it begins with.

    Raises:
        UserError: the ranks that are there cannot hold the model in the budget of the placement.
    """
    home = (
        place_uniformly(moves.strategy, moves.opened, group.size, model_identity(config.model))
        if config.placement is None
        else Placement.load(config.placement)
    )
    home.check_serves(model_identity(config.model), group.size)
    check_layers(home, moves.opened.experts)
    try:
        # Without a budget, what does not fit a rank's memory is refused when it loads.
        first = recovered(moves, home, home, group.members, None).placement
    except UserError as error:
        raise UserError(f"--min-ranks {config.min_ranks}: {error}, or wait for more ranks") from None
    budget_R = tuple(map(max, home.budget_bytes_R or home.bytes_R, first.bytes_R))
    return home, replace(first, budget_bytes_R=budget_R)


def load_served_model(
    config: ServeConfig,
    placement: Placement | str | None,
    group: TorchGroup,
    loads: CallRecorder | None,
    moves: MoveInputs | None = None,
    joins_later: bool = False,
) -> PreTrainedModel:
    """Load the model onto this rank; every rank calls this.

    Args:
        config: what to serve.
        placement: of the members, or its file; None: the strategy places the experts.
        group: the ranks.
        loads: counts the load of every MoE layer; None: it is not counted here.
        moves: how the placement may be replaced; None: it stays.
        joins_later: this rank joins others that serve already, and reads no experts.

    Raises:
        UserError: it cannot be loaded or served, on every rank where the model itself is at fault.
    """
    if group.device.type == "cpu":
        keep_freed_memory()
    model = load(
        config.model,
        placement,
        chosen_strategy(config),
        group=group,
        dtype=config.dtype,
        packed_experts=config.experts,
        machine=config.machine,
        telemetry=loads,
        max_tokens=config.max_num_batched_tokens,
        max_dispatch_bytes=config.max_dispatch_bytes,
        movable_formats=None if moves is None else moves.formats,
        room_bytes=0 if moves is None else moves.room_bytes,
        keeps_stacks=moves is not None and moves.keeps_stacks,
        joins_later=joins_later,
        strict_weights=config.strict_weights,
    )
    set_attention(model, config.attn_implementation)
    return model


def ep_layers(report: LoadReport) -> list[EPExperts]:
    """The expert-parallel layers of a model that was loaded onto a group."""
    return [layer for layer in report.layers if isinstance(layer, EPExperts)]


def ready_message(model: PreTrainedModel, group: TorchGroup, max_model_len: int, routes_evenly: bool) -> Ready:
    """The description of a model that every rank can serve, for the HTTP process."""
    report = report_of(model)
    layout = ep_layers(report)[0].family.layout
    return Ready(
        max_model_len=max_model_len,
        vocab_size=vocab_size(model),
        expert_bytes=[expert_bytes(report.placement, layout, [rank]) for rank in range(group.size)],
        placement=report.placement.to_dict(),
        info={"backend": group.backend, "device": str(group.device), "dtype": str(model.dtype)},
        routes_evenly=routes_evenly,
        members=list(group.members),
        generation=group.generation,
    )


def log_ready(
    ready: Ready, model: PreTrainedModel, group: TorchGroup, cache: str, load_s: float, warmup_s: float
) -> None:
    """Log what was started, and how long it took."""
    log.info(
        "%d ranks on %s (%s), %d threads each, computing in %s; %s cache, at most %d tokens a request; in %.1f s, "
        "%.2f of them for a first prompt",
        len(group.members), group.device.type, group.backend, torch.get_num_threads(), model.dtype, cache,
        ready.max_model_len, load_s, warmup_s,
    )  # fmt: skip
    if group.device.type == "cpu" and not has_fast_products(model.dtype):
        log.info(
            "this CPU multiplies in %s more slowly than in float32: --dtype float32 takes more memory for attention "
            "and dense layers, and less time", model.dtype,
        )  # fmt: skip
    for rank, by_format in enumerate(ready.expert_bytes):
        sizes = ", ".join(f"{size / 2**20:.2f} MiB {name}" for name, size in sorted(by_format.items()))
        log.info("rank %d: experts %s", rank, sizes or "none")
