"""A model in one process: empty, with its parameters still to come, filled from a checkpoint, or whole."""

import re
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import PretrainedConfig, PreTrainedModel

from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.checkpoint_files import Checkpoint, read_config
from rq_ep.model.checkpoint.quantized_checkpoint import QuantizedCheckpoint, open_checkpoint
from rq_ep.model.checkpoint.tokenizer_files import transformers_may_refuse
from rq_ep.model.checkpoint.weight_conversion import WeightReader
from rq_ep.model.seam.adapters import adapter_for


def read_dense(path: str | Path, dtype: torch.dtype | str, device: torch.device) -> PreTrainedModel:
    """The whole model in one piece, as transformers loads it, but with every weight from the checkpoint.

    Weights stored in few bits are dequantized. Its MoE layers are in the form that the seam knows.

    Raises:
        UserError: the checkpoint cannot be served, or lacks weights that transformers would make up.
    """
    config = read_config(path)
    checkpoint = open_checkpoint(path)  # says which file is missing or cut short
    if isinstance(checkpoint, QuantizedCheckpoint):
        return _read_quantized(path, config, checkpoint, dtype, device)
    adapter = adapter_for(config.model_type)
    with transformers_may_refuse(path):
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
    found: PreTrainedModel = model
    return found


def _read_quantized(
    path: str | Path,
    config: PretrainedConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype | str,
    device: torch.device,
) -> PreTrainedModel:
    computed_in = dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.bfloat16
    model = empty_model(path, config, computed_in, None)
    fill(model, WeightReader(checkpoint, model, []), computed_in, device)
    return model.to(device).eval()


def empty_model(
    path: str | Path, config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    """The model with its parameters on the meta device, its computed buffers in place."""
    adapter = adapter_for(config.model_type)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with transformers_may_refuse(path), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = adapter.auto_class.from_config(config, dtype=dtype, **options)
        adapter.adapt(model)
    return model


def fill(model: PreTrainedModel, reader: WeightReader, dtype: torch.dtype, device: torch.device) -> None:
    """Read everything that is not read expert by expert, each tensor in the dtype that transformers would give it."""
    kept_precise = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]  # all of them fp32
    expected = model.state_dict()
    state = {}
    for name, tensor in reader.tensors():
        is_precise = any(re.search(pattern, name) for pattern in kept_precise)
        state[name] = tensor.to(device, torch.float32 if is_precise else expected[name].dtype)
    for name in expected.keys() - state.keys():  # tied, or computed by the model
        state[name] = state[model.all_tied_weights_keys[name]] if expected[name].is_meta else expected[name]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
