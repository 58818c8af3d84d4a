"""Adapters of model families whose MoE layers do not have the form that `expert_modules` knows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.core_model_loading import WeightConverter

from rq_ep.model.seam import switch_transformers as switch


@dataclass(frozen=True)
class Adapter:
    """How the models of a family are built, and brought into that form."""

    auto_class: Any  # of transformers, to build and load its models
    adapt: Callable[[PreTrainedModel], None]  # rebuilds the MoE layers of a model in place
    converters: Callable[[], list[WeightConverter]]  # from tensors of a checkpoint to those of a rebuilt layer


DEFAULT_ADAPTER = Adapter(AutoModelForCausalLM, adapt=lambda model: None, converters=list)

ADAPTERS: dict[str, Adapter] = {
    "switch_transformers": Adapter(AutoModelForSeq2SeqLM, switch.adapt, switch.converters),
}


def adapter_for(model_type: str) -> Adapter:
    """The adapter of a family; most need none."""
    return ADAPTERS.get(model_type, DEFAULT_ADAPTER)
