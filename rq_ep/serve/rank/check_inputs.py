"""Checks of a checkpoint and its settings, before anything large is read."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig

from rq_ep.config import ServeConfig
from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.strategy import Strategy
from rq_ep.costs import cost_model
from rq_ep.engine.servable import check_servable
from rq_ep.model.checkpoint.checkpoint_files import read_config
from rq_ep.model.checkpoint.generation_defaults import end_token_ids, read_sampling_defaults
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.checkpoint.packed_experts import PackedExperts
from rq_ep.model.checkpoint.quantized_checkpoint import expert_format, open_checkpoint
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.model.dtypes import stored_dtype
from rq_ep.strategies import make_strategy


class CheckedInputs(NamedTuple):
    """What the files of a model say, before it is loaded."""

    model_config: PretrainedConfig
    end_token_ids: list[int]  # with which an answer ends


def check_inputs(config: ServeConfig) -> CheckedInputs:
    """What the model's files say, if they and everything named beside them can be served.

    Raises:
        UserError: no checkpoint, one that cannot be served, no tokenizer, no placement file, an unknown strategy
            or machine, quantized experts that are not the placement's.
    """
    chosen_strategy(config)
    model_config = read_config(config.model)
    check_servable(model_config)
    if config.placement is not None:
        Placement.load(config.placement)
    read_in_advance(config)
    if config.machine is not None:
        cost_model(config.machine)
    tokenizer = read_tokenizer(config.model)
    read_sampling_defaults(config.model, config.generation_config)
    end_tokens = end_token_ids(config.model, model_config, tokenizer, config.generation_config)
    if config.record_dir is not None and not Path(config.record_dir).is_dir():
        raise UserError(f"--record-dir {config.record_dir}: no such directory")
    return CheckedInputs(model_config, end_tokens)


def read_in_advance(config: ServeConfig) -> Counter[str]:
    """Format -> how many experts `--experts` gives.

    Raises:
        UserError: no placement asks for them, or what it asks for is not there or of another model.
    """
    if config.experts is None:
        return Counter()
    if config.placement is None:
        raise UserError(f"--experts {config.experts}: without --placement no expert is stored in low bits")
    identity = model_identity(config.model)
    placement = Placement.load(config.placement)
    placement.check_serves(identity, placement.topology.num_ranks, config.placement)
    stored_format = expert_format(open_checkpoint(config.model), stored_dtype(read_config(config.model)))
    return PackedExperts.open(config.experts, identity).check_holds(placement, stored_format)


def chosen_strategy(config: ServeConfig) -> Strategy | None:
    """The strategy that was asked for, with its settings; None: the placement's own, or standard EP."""
    chosen = config.strategy
    return None if chosen is None else make_strategy(chosen.name, **chosen.settings)


def choose_max_model_len(config: ServeConfig, model_config: PretrainedConfig, cache_tokens: int) -> int:
    """The longest prompt and answer: by the model's own limit, the setting, and the KV cache.

    Args:
        cache_tokens: tokens that one request can have in the smallest KV cache of the group.
    """
    model_limit = int(model_config.get_text_config().max_position_embeddings)
    wanted = config.max_model_len
    if wanted is None:
        return min(model_limit, cache_tokens)
    if wanted > model_limit:
        raise UserError(f"--max-model-len {wanted}: the model was made for {model_limit} tokens")
    if wanted > cache_tokens:
        raise UserError(
            f"--max-model-len {wanted}: the KV cache holds {cache_tokens} tokens of one request; "
            f"lower it, or raise --kv-cache-tokens to {wanted}"
        )
    return wanted
