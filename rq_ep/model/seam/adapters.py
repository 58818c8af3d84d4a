"""How the models of each family are built, and brought into the form that `expert_modules` knows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import WeightConverter
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from rq_ep.core.errors import UserError
from rq_ep.model.seam import switch_transformers as switch


def _leave(model: PreTrainedModel) -> None:
    """Most families need no change."""


@dataclass(frozen=True)
class Adapter:
    """How the models of a family are built, and brought into that form."""

    auto_class: Any  # of transformers, to build and load its models
    adapt: Callable[[PreTrainedModel], None] = _leave  # rebuilds the MoE layers of a model in place
    converters: Callable[[], list[WeightConverter]] = list  # from tensors of a checkpoint to those of a rebuilt layer
    part: str | None = None  # of the configuration, where only a part of the checkpoint's model writes text

    def config(self, whole: PretrainedConfig) -> PretrainedConfig:
        """The configuration of the model that is built."""
        return whole if self.part is None else getattr(whole, self.part)

    def build(self, config: PretrainedConfig, dtype: torch.dtype | None = None, **options: Any) -> PreTrainedModel:
        """A new model in its form, on the device of the context."""
        model: PreTrainedModel = self.auto_class.from_config(config, dtype=dtype, **options)
        self.adapt(model)
        return model


CAUSAL = Adapter(AutoModelForCausalLM)
MULTIMODAL = Adapter(AutoModelForMultimodalLM)

ADAPTERS: dict[str, Adapter] = {
    "switch_transformers": Adapter(AutoModelForSeq2SeqLM, switch.adapt, switch.converters),
    "qwen3_omni_moe": Adapter(AutoModelForMultimodalLM, part="thinker_config"),  # its talker speaks what it wrote
}


def adapter_for(model_type: object) -> Adapter:
    """The adapter of a family.

    Where transformers has a class for the text part of a multimodal model, that is built, and the encoders of images
    and sounds are left unread; elsewhere the multimodal model as a whole.

    Raises:
        UserError: no family that transformers knows, or none that writes text token by token.
    """
    family = model_type if isinstance(model_type, str) else ""
    if family in ADAPTERS:
        return ADAPTERS[family]
    if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return CAUSAL
    multimodal_class = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(family, "")
    if "Diffusion" in multimodal_class:
        raise UserError(f"model_type {family!r} writes by diffusion, not token by token, and cannot be served")
    if multimodal_class:
        return MULTIMODAL
    raise UserError(
        f"model_type {model_type!r:.60} is not a language model that transformers knows: give a checkpoint such as "
        "qwen3_moe, mixtral, olmoe, deepseek_v3 or gpt_oss"
    )
