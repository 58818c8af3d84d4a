import json
import shutil
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.checkpoint_files import Checkpoint, read_config
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.model.checkpoint.weight_reader import WeightReader
from rq_ep.model.load.opened_model import OpenedModel
from rq_ep.model.load.whole_model import load_whole_model
from tests.model.families import FAMILIES, random_model, save

EXPERTS = {"mixtral": (0, 1), "qwen3_moe": (1,), "olmoe": (0, 1), "deepseek_v2": (1, 2), "deepseek_v3": (1, 2),
           "gpt_oss": (0, 1)}  # fmt: skip


def reader(path: Path) -> tuple[WeightReader, Checkpoint]:
    config = read_config(path)
    with accelerate.init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    checkpoint = Checkpoint(path)
    names = [f"model.layers.{layer}.mlp.experts" for layer in EXPERTS[config.model_type]]
    return WeightReader(checkpoint, model, names), checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("checkpoints")
    return {family: save(random_model(config), directory / family) for family, config in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_come_out_as_transformers_keeps_them(family: str, checkpoints: dict[str, Path]) -> None:
    dense = random_model(FAMILIES[family])
    weights, _ = reader(checkpoints[family])
    expected = dense.state_dict()
    experts = {name: expected.pop(name) for name in list(expected) if ".mlp.experts." in name}
    others = dict(weights.tensors())
    assert others.keys() == expected.keys()
    assert all(torch.equal(others[name], expected[name]) for name in others)
    for name, tensor_E in experts.items():
        module, _, tensor = name.rpartition(".")
        for expert in range(len(tensor_E)):
            assert torch.equal(weights.expert(module, expert)[tensor], tensor_E[expert])
    assert len(experts) == len(EXPERTS[family]) * (4 if family == "gpt_oss" else 2)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_one_expert_costs_its_own_bytes(family: str, checkpoints: dict[str, Path]) -> None:
    weights, checkpoint = reader(checkpoints[family])
    one = weights.expert("model.layers.1.mlp.experts", 3)
    assert checkpoint.bytes_read == sum(tensor.nbytes for tensor in one.values())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_shards_equal_the_single_file(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    sharded = save(random_model(FAMILIES[family]), tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    one, many = reader(checkpoints[family])[0], reader(sharded)[0]
    others = dict(many.tensors())
    assert all(torch.equal(tensor, others.pop(name)) for name, tensor in one.tensors())
    assert not others
    for tensor, weight in one.expert("model.layers.1.mlp.experts", 4).items():
        assert torch.equal(weight, many.expert("model.layers.1.mlp.experts", 4)[tensor])


def edit(path: Path, change: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks model\.norm\.weight"),
        (lambda t: [t.pop(key) for key in list(t) if "self_attn" in key], r"lacks model\.layers\.0\..* and \d+ more"),
        (lambda t: t.pop(EXPERT), r"disagrees about expert 3 of model\.layers\.1\.mlp\.experts\.gate_up"),
        (lambda t: rename(t, EXPERT, EXPERT.replace(".3.", ".8.")), "disagrees about expert 3 of .* and 1 more"),
        (lambda t: t.update({"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(3)}), "no place for"),
    ],
)
def test_missing_and_leftover_tensors_are_named(
    checkpoints: dict[str, Path], tmp_path: Path, change: Any, message: str
) -> None:
    copy = shutil.copytree(checkpoints["qwen3_moe"], tmp_path / "copy")
    edit(copy, change)
    with pytest.raises(UserError, match=message):
        reader(copy)


@pytest.mark.parametrize("name", ["model.norm.weight", EXPERT])
def test_shapes_of_another_configuration_are_refused(checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(checkpoints["qwen3_moe"], tmp_path / "copy")
    edit(copy, lambda tensors: tensors.update({name: tensors[name][..., :-2].clone()}))
    with pytest.raises(UserError, match="another configuration"):
        reader(copy)[0].expert("model.layers.1.mlp.experts", 3)


def test_fused_experts_of_another_number_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoints["gpt_oss"], tmp_path / "copy")
    name = "model.layers.1.mlp.experts.down_proj"
    edit(copy, lambda tensors: tensors.update({name: tensors[name][:4].clone()}))
    with pytest.raises(UserError, match=r"experts 0\.\.4, but .* disagrees about model.*down_proj of 4 experts"):
        reader(copy)


def test_tensors_that_transformers_ignores_are_ignored(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoints["deepseek_v3"], tmp_path / "copy")
    edit(copy, lambda t: t.update({"model.layers.61.eh_proj.weight": torch.ones(3)}))  # multi-token prediction
    edit(copy, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    weights, _ = reader(copy)
    assert "model.norm.weight" in dict(weights.tensors())


MTP = {"mtp.fc.weight": (3, 3), "mtp.layers.0.mlp.experts.0.up_proj.weight": (3, 3), "model.visual.patch.bias": (3,)}


def test_tensors_that_the_model_does_not_know_are_left_unread_and_named(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoints["qwen3_moe"], tmp_path / "copy")
    edit(copy, lambda tensors: tensors.update({name: torch.ones(shape) for name, shape in MTP.items()}))
    opened = OpenedModel.open(copy)
    assert len(opened.reader.notes) == 1
    assert opened.reader.notes[0].startswith("model.visual.patch.bias and 2 more: tensors that the model does not know")
    expected = reader(checkpoints["qwen3_moe"])[0].tensors()
    assert dict(opened.reader.tensors()).keys() == dict(expected).keys()
    with pytest.raises(UserError, match=r"no place for model\.visual.* and 2 more in a qwen3_moe model"):
        OpenedModel.open(copy, strict_weights=True)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.9.self_attn.q_proj.weight",
        "model.layers.1.mlp.experts.8.up_proj.weight_scale",
        "model.layers.1.mlp.experts.zero_points",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "model.layers.1.mlp.expert_scales",
        "model.layers.1.self_attn.q_proj.weight_zero_point",
        "model.layers.1.self_attn.q_proj.weight.absmax",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "lm_head.weight_scale",
    ],
)
def test_parts_of_what_is_loaded_are_not_left_unread(checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(checkpoints["qwen3_moe"], tmp_path / "copy")
    edit(copy, lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(UserError, match="no place for"):
        OpenedModel.open(copy)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8\nsize 12345\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_said_to_be_one(checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(checkpoints["qwen3_moe"], tmp_path / "copy")
    (copy / name).write_text(POINTER)
    for read in (read_tokenizer,) if name == "tokenizer.json" else (model_identity, OpenedModel.open):
        with pytest.raises(UserError, match=rf"{copy}/{name}: is a Git LFS pointer.* run `git lfs pull` in {copy}"):
            read(copy)


def test_a_truncated_file_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoints["mixtral"], tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is cut short or damaged"):
        Checkpoint(copy)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded = save(random_model(FAMILIES["mixtral"]), tmp_path / "sharded", max_shard_size="60KB")
    lost = sorted(sharded.glob("*.safetensors"))[2]
    lost.unlink()
    with pytest.raises(UserError, match=f"its index names {lost.name}, which is not there"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no_such_thing"}, "model_type 'no_such_thing' is not a language model"),
        ({"model_type": None}, "model_type None is not a language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized by 'gptq'.*save a bf16 copy"),
        ({"num_attention_heads": "four"}, r"config\.json: 'num_attention_heads' 'four': must be a whole number"),
    ],
)
def test_configurations_that_cannot_be_served_are_refused(
    checkpoints: dict[str, Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    copy = shutil.copytree(checkpoints["gpt_oss"], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        read_config(copy)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_is_read_whole(family: str, checkpoints: dict[str, Path]) -> None:
    actual = load_whole_model(checkpoints[family], torch.float32, torch.device("cpu")).state_dict()
    expected = random_model(FAMILIES[family]).state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"lacks model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"no place for model\.layers\.1"),
        ({"hidden_size": 8}, r"comes out as \[97, 64\], but config.json asks for \[97, 8\]"),
        ({"dtype": "float8"}, "transformers refuses it"),
        ({"model_type": ["mixtral"]}, "is not a language model"),
        ({"quantization_config": "x"}, r"quantized by 'x'"),
    ],
)
def test_weights_that_transformers_would_make_up_are_refused(
    checkpoints: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = Path(shutil.copytree(checkpoints["mixtral"], tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        load_whole_model(path, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("content", [None, "{", '{"model": 5}'])
def test_a_missing_or_damaged_tokenizer_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, content: str | None
) -> None:
    path = Path(shutil.copytree(checkpoints["mixtral"], tmp_path / "model"))
    if content is not None:
        (path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer"):
        read_tokenizer(path)


def test_the_tokenizer_of_a_folder_that_is_not_there_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no tokenizer"):
        read_tokenizer(tmp_path / "nowhere")
