"""A checkpoint that was opened and not yet read: the model it is for, on the meta device, and whether they agree."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.checkpoint_files import Checkpoint, read_config
from rq_ep.model.checkpoint.generation_defaults import GENERATION_CONFIG, end_token_ids, read_generation_config
from rq_ep.model.checkpoint.quantized_checkpoint import open_checkpoint
from rq_ep.model.checkpoint.tokenizer_files import transformers_errors
from rq_ep.model.checkpoint.weight_reader import WeightReader
from rq_ep.model.dtypes import stored_dtype, torch_dtype
from rq_ep.model.seam.adapters import adapter_for
from rq_ep.model.seam.expert_modules import ExpertsModule, find_expert_modules

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedModel:
    """A model whose parameters lie on the meta device, and the reader of its weights."""

    model: PreTrainedModel
    experts: tuple[ExpertsModule, ...]
    dtype: torch.dtype  # to compute in
    checkpoint: Checkpoint
    reader: WeightReader

    @classmethod
    def open(
        cls,
        path: str | Path,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        *,
        whole: bool = False,
        strict_weights: bool = False,
    ) -> "OpenedModel":
        """Open a checkpoint and check all of it but the weights themselves.

        Args:
            path: checkpoint directory.
            dtype: to compute in; None or "auto": as the weights are stored.
            attn_implementation: as in transformers.
            whole: the experts are read with all other weights, instead of one by one.
            strict_weights: refuse tensors that the model does not know.

        Raises:
            UserError: the checkpoint cannot be served, a file is missing or damaged, or its tensors are those of
                another model.
        """
        config = read_config(path)
        end_token_ids(path, config)
        generation = read_generation_config(path)
        checkpoint = open_checkpoint(path)
        chosen = stored_dtype(config, checkpoint) if dtype is None or dtype == "auto" else torch_dtype(dtype)
        model = empty_model(path, config, chosen, attn_implementation)
        if generation:
            with transformers_errors(Path(path, GENERATION_CONFIG)):
                model.generation_config = GenerationConfig.from_pretrained(path)
        experts = find_expert_modules(model)
        reader = WeightReader(checkpoint, model, [] if whole else [module.name for module in experts], strict_weights)
        return cls(model, experts, chosen, checkpoint, reader)

    def log_notes(self) -> None:
        """Log what the checkpoint holds and this model does not read."""
        for note in self.reader.notes:
            log.warning("%s: %s", self.checkpoint.path, note)

    def fill(self, device: torch.device) -> None:
        """Read all weights but those read expert by expert, each in the dtype that transformers would give it."""
        model = self.model
        kept_in_fp32 = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(self.dtype)]
        expected = model.state_dict()
        state = {}
        for name, tensor in self.reader.tensors():
            is_fp32 = any(re.search(pattern, name) for pattern in kept_in_fp32)
            state[name] = tensor.to(device, torch.float32 if is_fp32 else expected[name].dtype)
        missing = set(expected.keys() - state.keys())  # tied, or computed by the model
        for name in missing:
            state[name] = state[model.all_tied_weights_keys[name]] if expected[name].is_meta else expected[name]
        model.load_state_dict(state, strict=True, assign=True)
        # Weights that the configuration ties and the checkpoint holds apart stay apart, as transformers leaves them.
        model.tie_weights(missing_keys=missing, recompute_mapping=False)


def empty_model(
    path: str | Path,
    config: PretrainedConfig,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Build the model with its parameters on the meta device, and its computed buffers in memory.

    Args:
        path: of the checkpoint, by which the model's tokenizer is found later.
        config: as `read_config` gives it.
        dtype: of the parameters.
        attn_implementation: as in transformers.

    Raises:
        UserError: its settings are damaged.
    """
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with (
        transformers_errors(f"{path}/config.json"),
        init_empty_weights(include_buffers=False),
        no_init_weights(),  # else most of the time goes into drawing values that no parameter keeps
    ):
        model = adapter_for(config.model_type).build(config, dtype, **options)
    model.name_or_path = model.config.name_or_path = str(path)  # of the text part of a model it is empty
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name not in stored and buffer.is_floating_point() and not buffer.isfinite().all():
            raise UserError(f"{path}/config.json: {name} is infinite or not a number with these settings")
    return model
