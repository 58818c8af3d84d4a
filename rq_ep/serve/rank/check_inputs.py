"""Checks of a checkpoint and its settings, before anything large is read."""

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig

from rq_ep.config import ServeConfig
from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.engine.kv_cache import cache_size, has_full_attention
from rq_ep.engine.servable import PADDED, choose_cache, why_text_only
from rq_ep.model.checkpoint.checkpoint_files import read_config
from rq_ep.model.checkpoint.generation_defaults import end_token_ids, read_sampling_defaults
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.checkpoint.packed_experts import PackedExperts
from rq_ep.model.checkpoint.quantized_checkpoint import open_checkpoint
from rq_ep.model.checkpoint.tokenizer_files import read_processor, read_tokenizer
from rq_ep.model.dtypes import stored_expert_format
from rq_ep.model.max_positions import max_positions
from rq_ep.model.model_folder import find_model
from rq_ep.parallel import EPGroup

log = logging.getLogger("rq_ep.serve")


class CheckedInputs(NamedTuple):
    """What the files of a model say, before it is loaded."""

    model_config: PretrainedConfig
    cache: str  # that requests are batched over: paged or padded
    end_token_ids: list[int]  # with which an answer ends
    why_text_only: str | None  # why requests may not have images; None: they may


def with_model_folder(config: ServeConfig, group: EPGroup | None = None) -> ServeConfig:
    """The settings with the folder of the model, downloaded if it is not here; every rank of the group calls this."""
    folder = find_model(config.model, config.revision, group)
    if folder != Path(config.model):
        log.info("%s is read from %s", config.model, folder)
    return in_folder(config, folder)


def in_folder(config: ServeConfig, folder: Path) -> ServeConfig:
    """The settings with the folder in which their model is."""
    return replace(config, model=str(folder), served_model_name=config.model_name, revision=None)


def check_inputs(config: ServeConfig, device_type: str) -> CheckedInputs:
    """What the model's files say, if they and what is named beside them can be served.

    Args:
        config: what to serve, checked by `check_settings`.
        device_type: of the ranks: cpu or cuda.

    Raises:
        UserError: no checkpoint, one that cannot be served, no tokenizer, a cache that the model cannot have, quantized
            experts that are not the placement's, requests longer than the model or the KV cache, images to be fetched
            for a model that takes none.
    """
    model_config = read_config(config.model)
    cache = choose_cache(model_config, config.cache)
    _check_max_model_len(config, model_config, cache, device_type)
    read_in_advance(config)
    tokenizer = read_tokenizer(config.model)
    read_sampling_defaults(config.model, config.generation_config)
    end_tokens = end_token_ids(config.model, model_config, tokenizer, config.generation_config)
    text_only = why_text_only(model_config, cache) or _why_no_processor(config.model)
    if config.allow_remote_images and text_only is not None:
        raise UserError(f"--allow-remote-images: {text_only}")
    if text_only is not None and model_config.get_text_config() is not model_config:
        log.info("served text-only: %s", text_only)
    return CheckedInputs(model_config, cache, end_tokens, text_only)


def _why_no_processor(path: str) -> str | None:
    try:
        read_processor(path)
    except UserError as error:
        return str(error)
    return None


def read_in_advance(config: ServeConfig) -> Counter[str]:
    """Format -> how many experts `--experts` gives to the placement.

    Raises:
        UserError: what the placement asks for is not there, or of another model.
    """
    if config.experts is None or config.placement is None:
        return Counter()
    identity = model_identity(config.model)
    placement = Placement.load(config.placement)
    placement.check_serves(identity, placement.topology.num_ranks, config.placement)
    stored_format = stored_expert_format(open_checkpoint(config.model))
    return PackedExperts.open(config.experts, identity).check_holds(placement, stored_format)


def _check_max_model_len(config: ServeConfig, model_config: PretrainedConfig, cache: str, device_type: str) -> None:
    """Refuse a length of requests that is too large whatever memory there is."""
    wanted, model_limit = config.max_model_len, max_positions(model_config)
    if wanted is None:
        return
    if model_limit is not None and wanted > model_limit:
        raise UserError(
            f"--max-model-len {wanted}: the model was made for {model_limit} tokens, by max_position_embeddings and "
            "the rope scaling in config.json"
        )
    cache_tokens = cache_size(config.kv_cache_tokens, device_type)
    if cache_tokens is not None and (cache == PADDED or has_full_attention(model_config)):
        _check_fits_cache(wanted, cache_tokens)


def _check_fits_cache(wanted: int, cache_tokens: int) -> None:
    if wanted > cache_tokens:
        raise UserError(
            f"--max-model-len {wanted}: the KV cache holds {cache_tokens} tokens of one request; "
            f"lower it, or raise --kv-cache-tokens to {wanted}"
        )


def choose_max_model_len(config: ServeConfig, model_config: PretrainedConfig, cache_tokens: int) -> int:
    """The longest prompt and answer: by the model's own limit, the setting, and the KV cache.

    Args:
        config: what to serve, checked by `check_inputs`.
        model_config: of the model.
        cache_tokens: tokens that one request can have in the smallest KV cache of the group.
    """
    if config.max_model_len is None:
        return min(max_positions(model_config) or cache_tokens, cache_tokens)
    _check_fits_cache(config.max_model_len, cache_tokens)
    return config.max_model_len
