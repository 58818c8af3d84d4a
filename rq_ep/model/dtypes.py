"""Dtypes of a model: by name, or of its configuration."""

import torch
from transformers import PretrainedConfig

from rq_ep.core.errors import UserError


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype, or the one of that name, such as "bfloat16"; a `UserError` if torch has none."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if isinstance(named := getattr(torch, dtype, None), torch.dtype):
        return named
    raise UserError(f"dtype {dtype!r}: choose from auto, bfloat16, float16, float32")


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype in which a checkpoint was saved; bfloat16 where its configuration does not say."""
    return torch_dtype(config.dtype) if config.dtype else torch.bfloat16
