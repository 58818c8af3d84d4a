"""Checks of settings that need no model, but NumPy: a rank makes them before it imports torch, which takes seconds."""

from rq_ep.config import ServeConfig
from rq_ep.core.errors import UserError
from rq_ep.core.files.documents import check_writable
from rq_ep.core.placement import Placement
from rq_ep.core.strategy import Strategy
from rq_ep.costs import cost_model
from rq_ep.model.checkpoint.generation_defaults import AUTO, VLLM, read_sampling_defaults
from rq_ep.strategies import choose_strategy, make_strategy


def check_settings(config: ServeConfig, num_ranks: int) -> None:
    """Check what is named by settings, as far as it can be known without the model.

    Args:
        config: what to serve, by `for_ranks`.
        num_ranks: size of the group.

    Raises:
        UserError: an unknown strategy, setting of it or machine; a placement that is none, or of another number of
            ranks; no generation_config.json where one is named; a strategy that keeps its placement, though it is to be
            replaced; a file that cannot be written.
    """
    strategy = chosen_strategy(config)
    placement = None if config.placement is None else Placement.load(config.placement)
    if placement is not None:
        placement.check_serves(None, num_ranks, config.placement or "")
    if config.machine is not None:
        cost_model(config.machine)
    if config.generation_config not in (AUTO, VLLM):
        read_sampling_defaults(config.model, config.generation_config)
    if config.rebalance == "auto":
        _check_rebalancing(config, choose_strategy(strategy, placement), placement)


def chosen_strategy(config: ServeConfig) -> Strategy | None:
    """The strategy that was asked for, with its settings; None: the placement's own, or standard EP."""
    chosen = config.strategy
    return None if chosen is None else make_strategy(chosen.name, **chosen.settings)


def _check_rebalancing(config: ServeConfig, strategy: Strategy, placement: Placement | None) -> None:
    if strategy.rebalance_rule is None:
        raise UserError(f"--rebalance auto: strategy {strategy.name!r} keeps the placement it has; choose rq")
    if placement is not None and any(layer.replicas.mixed_formats for layer in placement.layers):
        raise UserError(
            f"--rebalance auto: replicas of an expert in {config.placement} may differ in format: place again with rq"
        )
    if config.placement_out is not None:
        check_writable(config.placement_out)
