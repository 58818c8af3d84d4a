"""Building a transformers model from a checkpoint: empty, filled from a reader, or whole in this process."""

import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PretrainedConfig, PreTrainedModel

from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.checkpoint_files import Checkpoint, read_config
from rq_ep.model.checkpoint.quantized_checkpoint import QuantizedCheckpoint, open_checkpoint
from rq_ep.model.checkpoint.tokenizer_files import transformers_errors
from rq_ep.model.checkpoint.weight_conversion import WeightReader
from rq_ep.model.dtypes import stored_dtype
from rq_ep.model.seam.adapters import adapter_for


def load_whole_model(path: str | Path, dtype: torch.dtype | str, device: torch.device) -> PreTrainedModel:
    """Load the whole model in this process, as transformers does, and check that every weight is in the checkpoint.

    Low-bit weights are dequantized. The MoE layers are in the form that `rq_ep.model.seam` knows.

    Args:
        path: checkpoint directory.
        dtype: to compute in; "auto": as the weights are stored.
        device: where the weights go.

    Raises:
        UserError: the checkpoint cannot be served, or lacks weights that transformers would make up.
    """
    config = read_config(path)
    checkpoint = open_checkpoint(path)  # raises if a file is missing or cut short
    if isinstance(checkpoint, QuantizedCheckpoint):
        return _load_quantized(path, config, checkpoint, dtype, device)
    adapter = adapter_for(config.model_type)
    with transformers_errors(path):
        model, report = adapter.auto_class.from_pretrained(
            path, dtype=dtype, device_map={"": device}, output_loading_info=True, ignore_mismatched_sizes=True
        )
    misshapen = {key for key, *_ in report["mismatched_keys"]}
    if wrong := sorted(misshapen.union(report["missing_keys"], report["unexpected_keys"])):
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"{path}: config.json and the weights disagree about {wrong[0]}{others}: the checkpoint is incomplete, or "
            "belongs to another configuration"
        )
    adapter.adapt(model)
    whole_model: PreTrainedModel = model
    return whole_model


def _load_quantized(
    path: str | Path,
    config: PretrainedConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype | str,
    device: torch.device,
) -> PreTrainedModel:
    serving_dtype = dtype if isinstance(dtype, torch.dtype) else stored_dtype(config)
    model: Any = empty_model(path, config, serving_dtype, None)
    fill(model, WeightReader(checkpoint, model, []), serving_dtype, device)
    quantized_model: PreTrainedModel = model.to(device).eval()
    return quantized_model


def empty_model(
    path: str | Path, config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    """Build the model with its parameters on the meta device, and its computed buffers in memory."""
    adapter = adapter_for(config.model_type)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with transformers_errors(path), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = adapter.auto_class.from_config(config, dtype=dtype, **options)
        adapter.adapt(model)
    return model


def fill(model: PreTrainedModel, reader: WeightReader, dtype: torch.dtype, device: torch.device) -> None:
    """Read all weights but those read expert by expert, each in the dtype that transformers would give it."""
    kept_in_fp32 = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]
    expected = model.state_dict()
    state = {}
    for name, tensor in reader.tensors():
        is_fp32 = any(re.search(pattern, name) for pattern in kept_in_fp32)
        state[name] = tensor.to(device, torch.float32 if is_fp32 else expected[name].dtype)
    for name in expected.keys() - state.keys():  # tied, or computed by the model
        state[name] = state[model.all_tied_weights_keys[name]] if expected[name].is_meta else expected[name]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
