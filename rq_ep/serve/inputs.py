"""Everything that can be wrong with a checkpoint and its settings, looked at before anything large is read."""

from pathlib import Path

from transformers import PretrainedConfig

from rq_ep.config import ServeConfig
from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.strategy import Strategy
from rq_ep.costs import cost_model
from rq_ep.engine.families import check_servable
from rq_ep.model.checkpoint import read_config, read_tokenizer
from rq_ep.strategies import make_strategy


def check_inputs(config: ServeConfig) -> PretrainedConfig:
    """The model's configuration, if it and everything named beside it can be served.

    Raises:
        UserError: no checkpoint, one that cannot be served, no tokenizer, no placement file, an unknown strategy
            or machine.
    """
    chosen_strategy(config)
    model_config = read_config(config.model)
    check_servable(model_config)
    if config.placement is not None:
        Placement.load(config.placement)
    if config.machine is not None:
        cost_model(config.machine)
    read_tokenizer(config.model)
    if config.record_dir is not None and not Path(config.record_dir).is_dir():
        raise UserError(f"--record-dir {config.record_dir}: no such directory")
    return model_config


def chosen_strategy(config: ServeConfig) -> Strategy | None:
    """The strategy that was asked for, with its settings; None: the placement's own, or standard EP."""
    chosen = config.strategy
    return None if chosen is None else make_strategy(chosen.name, **chosen.settings)


def choose_max_model_len(config: ServeConfig, model_config: PretrainedConfig, room: int) -> int:
    """The longest prompt and answer: what the model was made for, what was asked for, what the cache holds.

    Args:
        room: tokens that one request can have in the smallest KV cache of the group.
    """
    model_limit = int(model_config.get_text_config().max_position_embeddings)
    wanted = config.max_model_len
    if wanted is None:
        return min(model_limit, room)
    if wanted > model_limit:
        raise UserError(f"--max-model-len {wanted}: the model was made for {model_limit} tokens")
    if wanted > room:
        raise UserError(
            f"--max-model-len {wanted}: the KV cache holds {room} tokens of one request; "
            f"lower it, or raise --kv-cache-tokens to {wanted}"
        )
    return wanted
