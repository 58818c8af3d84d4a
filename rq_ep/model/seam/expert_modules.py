"""The seam into transformers: the modules that hold a model's routed experts, and the layout of one expert.

More than 60 model families decorate their experts class with `use_experts_implementation`, and call it with
(hidden_TD, topk_ids_TK, topk_weights_TK). The decorator sets attributes that describe the layout of the weights, so one
seam serves all of them. Other families have an adapter, which first rebuilds their MoE layers in that form.
"""

import copy
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rq_ep.core.errors import UserError
from rq_ep.formats import ExpertLayout
from rq_ep.model.seam.adapters import ADAPTERS
from rq_ep.moe.expert_family import ExpertFamily

# Set by `use_experts_implementation`.
DECORATOR_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
# Modules that no token of text reaches; their experts stay as they are, on every rank.
OTHER_MODALITIES = re.compile(r"(^|\.)(vision|visual|audio|talker)")
# What configurations call the number of experts of a token, the first that is there
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


class ExpertsModule(NamedTuple):
    """The routed experts of one layer."""

    layer_index: int  # of the layer in the model
    name: str  # of the module, for `get_submodule`
    module: nn.Module

    @property
    def num_experts(self) -> int:
        return len(self.module.get_parameter("down_proj"))

    @property
    def family(self) -> ExpertFamily:
        """Layout and activation of each of them."""
        return family_of(self.module)

    @property
    def local_experts(self) -> Sequence[int]:
        """The experts whose weights are in this process."""
        return range(self.num_experts)

    def weights(self, expert: int) -> dict[str, Tensor]:
        """The tensors of one of the `local_experts`."""
        return {name: parameter[expert] for name, parameter in self.module.named_parameters(recurse=False)}


def find_expert_modules(model: PreTrainedModel) -> tuple[ExpertsModule, ...]:
    """The routed experts modules of a model, in the order of its layers.

    Raises:
        UserError: the model has none, or its experts are not supported; the message names the module and why.
    """
    modules = [
        ExpertsModule(getattr(module, "layer_index", _layer_index(name)), name, module)
        for name, module in model.named_modules()
        if all(hasattr(module, attribute) for attribute in DECORATOR_ATTRIBUTES) and not OTHER_MODALITIES.search(name)
    ]
    model_type = model.config.model_type
    refused = f"{model.name_or_path or 'the model'}: model_type {model_type!r} cannot be served"
    if not modules:
        if model_type in ADAPTERS:
            raise UserError(
                f"model_type {model_type!r}: this model was built without rq_ep; give its checkpoint directory"
            )
        if unknown := [f"{name} ({type(module).__name__})" for name, module in _look_like_experts(model)]:
            raise UserError(
                f"{refused}: its experts, such as {unknown[0]}, do not use "
                "transformers' `use_experts_implementation` (their router may weight inputs instead of outputs)"
            )
        raise UserError(f"{refused}: this model is dense, it has no MoE layers")
    for experts in modules:
        if why := _unsupported(experts.module):
            raise UserError(f"{refused}: {experts.name} {why}")
    first = modules[0]
    for experts in modules[1:]:
        if _shapes(experts.module) != _shapes(first.module):
            raise UserError(
                f"{refused}: its MoE layers differ, {first.name} has "
                f"{_shapes(first.module)} and {experts.name} has {_shapes(experts.module)}"
            )
    if len({experts.layer_index for experts in modules}) < len(modules):
        raise UserError(f"{refused}: a layer has more than one set of routed experts")
    if (top_k := experts_per_token(model.config)) > first.num_experts:
        raise UserError(f"num_experts_per_tok {top_k}: this model has {first.num_experts} experts in a layer")
    return tuple(sorted(modules))


def experts_per_token(config: PretrainedConfig) -> int:
    """The experts that a token chooses, by the configuration of a model; the most, where layers differ."""
    text = config.get_text_config()
    values = (getattr(text, key, None) for key in TOP_K_KEYS)
    top_k = next((value for value in values if value), 1)
    return max(top_k) if isinstance(top_k, list) else int(top_k)


def family_of(experts: nn.Module) -> ExpertFamily:
    """Layout and activation of one expert; the result holds no reference to weights but those of a `post_norm`."""
    shell: Any = copy.copy(experts)  # the gate is a method, which needs the module's settings, but no weights
    shell._parameters = {}
    return ExpertFamily(
        layout=ExpertLayout(
            {name: tuple(parameter.shape[1:]) for name, parameter in experts.named_parameters(recurse=False)},
            is_transposed=shell.is_transposed,
        ),
        apply_gate=shell._apply_gate if shell.has_gate else shell.act_fn,
        post_norm=experts.get_submodule("post_expert_norm") if shell.has_post_expert_norm else None,
    )


def _unsupported(experts: nn.Module) -> str | None:
    """Why an experts module is not supported, or None if it is."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    expected = {up, "down_proj"} | ({f"{up}_bias", "down_proj_bias"} if experts.has_bias else set())
    norm = {"post_expert_norm"} if experts.has_post_expert_norm else set()
    names = {name for name, _ in experts.named_parameters() if name.partition(".")[0] not in norm}
    if names != expected:
        return f"has parameters {sorted(names)} where {sorted(expected)} are expected"
    return None


def _shapes(experts: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in experts.named_parameters(recurse=False)}


def _layer_index(name: str) -> int:
    """The layer's number in a module name such as `model.layers.3.mlp.experts`."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    return int(numbers[-1]) if numbers else 0


def _look_like_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts")
    ]
