"""Dtypes of a model: by name, or as it is stored; and the format in which its experts are stored."""

import torch
from transformers import PretrainedConfig

from rq_ep.config import DTYPES
from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.checkpoint_files import Checkpoint, read_config
from rq_ep.model.checkpoint.quantized_checkpoint import QuantizedCheckpoint, expert_format

COMPUTED = (*DTYPES, "float64")


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype, or the one of that name, such as "bfloat16"; a `UserError` if no model computes in it."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in COMPUTED:
        raise UserError(f"dtype {dtype!r:.60}: choose from auto, {', '.join(COMPUTED)}")
    named: torch.dtype = getattr(torch, dtype)
    return named


def stored_dtype(config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype in which a checkpoint was saved: by its configuration or, where that does not say, by its tensors.

    Of a quantized checkpoint, whose tensors do not show it, it is then bfloat16.
    """
    try:
        if config.dtype:
            return torch_dtype(config.dtype)
        shown = None if isinstance(checkpoint, QuantizedCheckpoint) else checkpoint.first_dtype
        return shown or torch.bfloat16
    except UserError as error:
        raise UserError(f"{config.name_or_path}/config.json: {error}") from None


def stored_expert_format(checkpoint: Checkpoint) -> str:
    """The weight format that holds all experts of a checkpoint as they are stored."""
    return expert_format(checkpoint, stored_dtype(read_config(checkpoint.path), checkpoint))
