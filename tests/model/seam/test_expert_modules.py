import gc
import weakref

import accelerate
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Llama4TextConfig,
    NemotronHConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from rq_ep.core.errors import UserError
from rq_ep.formats import get_format
from rq_ep.model.seam.expert_modules import family_of, find_expert_modules
from tests.model.families import FAMILIES, random_model

SMALL = {
    "vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 24, "num_hidden_layers": 2,
}  # fmt: skip


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    with accelerate.init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("mixtral", (0, 1)),
        ("qwen3_moe", (1,)),  # every second layer
        ("olmoe", (0, 1)),
        ("deepseek_v2", (1, 2)),  # the first is dense; shared experts are not routed
        ("deepseek_v3", (1, 2)),
        ("gpt_oss", (0, 1)),
    ],
)
def test_routed_experts_are_found_on_the_meta_device(family: str, layers: tuple[int, ...]) -> None:
    config = FAMILIES[family]
    modules = find_expert_modules(meta_model(config))
    assert [(layer, name) for layer, name, _ in modules] == [(i, f"model.layers.{i}.mlp.experts") for i in layers]
    assert {experts.num_experts for experts in modules} == {5 if family in ("mixtral", "gpt_oss") else 8}
    assert {tensor.device.type for experts in modules for tensor in experts.module.parameters()} == {"meta"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_its_experts_compute(family: str) -> None:
    experts = find_expert_modules(random_model(FAMILIES[family]))[-1].module
    description = family_of(experts)
    native = get_format("fp32")
    hidden_TD = torch.randn(7, description.hidden_size, generator=torch.Generator().manual_seed(0))
    for expert in (0, 3):
        weights = {name: tensor[expert].detach() for name, tensor in experts.named_parameters()}
        packed = native.pack(weights, description.layout)
        out_TD = description.forward(hidden_TD, native, native.views(packed, description.layout))
        ids_TK = torch.full((7, 1), expert)
        with torch.no_grad():
            expected_TD = experts(hidden_TD, ids_TK, torch.ones(7, 1))
        torch.testing.assert_close(out_TD, expected_TD, atol=1e-6, rtol=1e-5)


def test_a_family_holds_no_reference_to_weights() -> None:
    model = random_model(FAMILIES["gpt_oss"])
    experts = find_expert_modules(model)[0].module
    description = family_of(experts)
    weights = weakref.ref(experts.gate_up_proj)
    assert sum(1 for _ in experts.parameters()) == 4  # the model itself is left as it was
    del model, experts
    gc.collect()
    assert weights() is None
    assert description.apply_gate(torch.ones(2, 8)).shape == (2, 4)


def test_experts_without_a_gate_are_supported() -> None:
    config = NemotronHConfig(
        **SMALL, layers_block_type=["moe", "attention"], n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24, moe_shared_expert_intermediate_size=24, n_group=1, topk_group=1,
        mamba_num_heads=2, mamba_head_dim=8, ssm_state_size=4, n_groups=1,
    )  # fmt: skip
    (experts,) = find_expert_modules(meta_model(config))
    description = family_of(experts.module)
    assert dict(description.layout.shapes) == {"up_proj": (24, 16), "down_proj": (16, 24)}
    assert torch.equal(description.apply_gate(torch.tensor([-1.0, 3.0])), torch.tensor([0.0, 9.0]))  # squared ReLU


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(UserError, match="'qwen2' cannot be served: this model is dense"):
        find_expert_modules(meta_model(Qwen2Config(**SMALL)))


def test_a_router_that_weights_inputs_is_refused() -> None:
    config = Llama4TextConfig(**SMALL, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=24)
    with pytest.raises(UserError, match=r"'llama4_text' cannot be served: .*feed_forward\.experts \(Llama4TextExperts"):
        find_expert_modules(meta_model(config))


def test_a_model_of_transformers_own_form_is_refused() -> None:
    config = SwitchTransformersConfig(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    )  # fmt: skip
    with accelerate.init_empty_weights(include_buffers=False):
        model = SwitchTransformersForConditionalGeneration(config)
    with pytest.raises(UserError, match="'switch_transformers': this model was built without rq_ep"):
        find_expert_modules(model)


def shrink(model: PreTrainedModel) -> None:
    experts = model.model.layers[1].mlp.experts
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(parameter[:3]))


def add_scale(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.experts.scale = nn.Parameter(torch.ones(5, device="meta"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shrink, r"its MoE layers differ, model\.layers\.0\.mlp\.experts has .* and model\.layers\.1"),
        (add_scale, r"layers\.1\.mlp\.experts has parameters \['down_proj', 'gate_up_proj', 'scale'\] where"),
    ],
)
def test_unsupported_layers_are_named(change: object, message: str) -> None:
    model = meta_model(FAMILIES["mixtral"])
    change(model)
    with pytest.raises(UserError, match=message):
        find_expert_modules(model)
