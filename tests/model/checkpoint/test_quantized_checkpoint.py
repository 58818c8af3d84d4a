"""Checkpoints that are quantized already: tiny ones written as other tools write them, read bit by bit."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from rq_ep.config import ServeConfig, StrategyConfig
from rq_ep.core.errors import UserError
from rq_ep.formats import get_format
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.model.checkpoint.checkpoint_files import read_config
from rq_ep.model.checkpoint.quantized_checkpoint import QuantizedCheckpoint, open_checkpoint
from rq_ep.model.load.load_model import load
from rq_ep.model.load.whole_model import load_whole_model
from rq_ep.model.seam.expert_modules import family_of, find_expert_modules
from rq_ep.model.text.byte_tokenizer import byte_tokenizer
from rq_ep.parallel import run_local
from rq_ep.placing.place import place
from rq_ep.serve.rank.rebalance.rebalance_inputs import RebalanceInputs
from tests.model.checkpoint.low_bit_ways import INTS, WAYS, compressed, weights
from tests.model.families import FAMILIES, logits, prompt, random_model, save

Tensors = dict[str, Tensor]


# name -> family, and how its linear layers are stored
WRITTEN = {
    "int8": ("qwen3_moe", WAYS["W8A8 channels"]),
    "int4": ("mixtral", WAYS["W4A16 groups of 32"]),
    "fp8": ("olmoe", WAYS["fp8 channels"]),
    "fp8 blocks": ("deepseek_v3", WAYS["fp8 128 x 128"]),
}


def scheme(num_bits: int, kind: str, strategy: str, **more: object) -> dict[str, object]:
    return compressed(INTS, weights(num_bits, kind, strategy, **more))


def wide(family: str) -> PretrainedConfig:
    """A family's configuration whose experts' sizes are multiples of 32, as groups ask for."""
    config = deepcopy(FAMILIES[family])
    config.intermediate_size = 64
    return config


def rewrite(path: Path, quantization: dict[str, object], change: Callable[[str, Tensor], Tensors]) -> None:
    """Replace the tensors of a checkpoint, and say in its configuration how they are quantized."""
    tensors: Tensors = {}
    for key, tensor in load_file(path / "model.safetensors").items():
        tensors |= change(key, tensor)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes each checkpoint once."""
    home = tmp_path_factory.mktemp("quantized")

    def write(name: str) -> Path:
        path = home / name
        if path.exists():
            return path
        if name == "mxfp4":
            save(random_model(wide("gpt_oss")), path)
            generator = torch.Generator().manual_seed(0)

            def change(key: str, tensor: Tensor) -> Tensors:
                if not key.endswith(("gate_up_proj", "down_proj")):
                    return {key: tensor}
                experts, num_in, num_out = tensor.shape
                shape = (experts, num_out, -(-num_in // 32))
                blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
                scales = torch.randint(121, 124, shape, generator=generator, dtype=torch.uint8)
                return {f"{key}_blocks": blocks, f"{key}_scales": scales}

            rewrite(path, {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn"]}, change)
            return path
        family, way = WRITTEN[name]
        save(random_model(wide(family)), path)

        def change(key: str, tensor: Tensor) -> Tensors:
            is_linear = key.endswith("_proj.weight") or ".experts." in key
            if not is_linear:
                return {key: tensor}
            scale_of_inputs = {f"{key.removesuffix('weight')}input_scale": torch.ones(1)}  # is not read
            return {f"{key}{part}": value for part, value in way.store(tensor)[0].items()} | scale_of_inputs

        rewrite(path, way.config, change)
        return path

    return write


CASES = [*WRITTEN, "mxfp4"]
FORMAT_OF = {name: str(way.format) for name, (_, way) in WRITTEN.items()} | {"mxfp4": "mxfp4"}


@pytest.mark.parametrize("name", CASES)
def test_sharded_over_ranks_it_equals_the_whole_model(name: str, written: Callable[[str], Path]) -> None:
    path = written(name)
    tokens = prompt(2, 9)
    whole = load_whole_model(path, torch.float32, torch.device("cpu"))
    spread = load(path, num_local_ranks=2, dtype="float32", strategy="standard")
    assert spread.rq_ep.placement.formats == (FORMAT_OF[name],)
    torch.testing.assert_close(logits(spread, tokens), logits(whole, tokens), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_experts_are_kept_as_they_are_stored(name: str, written: Callable[[str], Path]) -> None:
    path = written(name)
    whole = load_whole_model(path, torch.float32, torch.device("cpu"))
    bank = load(path, num_local_ranks=1, dtype="float32").rq_ep.layers[-1].banks[0]
    module = find_expert_modules(whole)[-1].module
    layout, format_ = family_of(module).layout, get_format(FORMAT_OF[name])
    for expert in bank.experts:
        views = format_.views(bank.packed(expert), layout)
        for tensor, parameter in module.named_parameters():
            assert torch.equal(format_.dequantize(views, tensor, layout, torch.float32), parameter[expert])
    stored = sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values())
    assert bank.nbytes < stored  # no second copy in more bits


@pytest.mark.parametrize("name", CASES)
def test_experts_that_move_while_serving_come_as_they_are_stored(name: str, written: Callable[[str], Path]) -> None:
    path = written(name)
    inputs = RebalanceInputs.check(ServeConfig(str(path), rebalance="auto", strategy=StrategyConfig("rq")))
    assert inputs is not None
    assert inputs.formats == (FORMAT_OF[name],)
    layer = load(path, num_local_ranks=1).rq_ep.layers[-1]
    for expert in (0, 1):
        read = inputs.read_expert()(layer.placement.index, expert, FORMAT_OF[name])
        assert torch.equal(read, layer.banks[0].packed(expert))


def test_where_only_some_experts_are_stored_in_few_bits_rebalancing_asks_for_their_format(tmp_path: Path) -> None:
    family, way = WRITTEN["int8"]
    save(random_model(wide(family)), tmp_path)

    def change(key: str, tensor: Tensor) -> Tensors:
        if ".experts." not in key or ".experts.0." in key:
            return {key: tensor}
        return {f"{key}{part}": value for part, value in way.store(tensor)[0].items()}

    rewrite(tmp_path, way.config, change)
    config = ServeConfig(str(tmp_path), rebalance="auto", strategy=StrategyConfig("rq"))
    with pytest.raises(UserError, match=r"expert 1 of layer \d is stored in int8 and .* give --formats fp32,int8"):
        RebalanceInputs.check(config)
    inputs = RebalanceInputs.check(replace(config, formats=("fp32", "int8")))
    assert inputs is not None


def test_gpt_oss_numbers_are_what_transformers_makes_of_them(written: Callable[[str], Path]) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    path = written("mxfp4")
    tensors = load_file(path / "model.safetensors")
    key = "model.layers.1.mlp.experts.gate_up_proj"
    theirs = convert_moe_packed_tensors(tensors[f"{key}_blocks"], tensors[f"{key}_scales"], dtype=torch.float32)
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, QuantizedCheckpoint)
    assert torch.equal(checkpoint.tensor(key), theirs)
    assert checkpoint.shape(key) == tuple(theirs.shape)
    assert torch.equal(checkpoint.rows(key, 3, 5), theirs[3:5])


def test_it_is_calibrated_and_placed_in_its_own_format(written: Callable[[str], Path]) -> None:
    text = {"d": ["AB" * 999]}  # bytes that the vocabulary of 97 has
    stats = calibrate(written("int8"), text, tokenizer=byte_tokenizer(64), sequence_length=16, max_tokens=160)
    assert (stats.native_format, stats.formats) == ("int8", ("int8",))
    placement = place(stats, 2)
    assert placement.formats == ("int8",)
    load(written("int8"), placement, num_local_ranks=2)
    settings = {"tokenizer": byte_tokenizer(64), "sequence_length": 16, "max_tokens": 160}
    for spread in run_local(2, lambda group: calibrate(written("int8"), text, group=group, **settings)):
        assert (spread.native_format, spread.counts.tolist()) == ("int8", stats.counts.tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq', which is not supported"),
        ("nonsense", "quantized by 'nonsense'"),
        ({"quant_method": "fp8", "weight_block_size": [64]}, r"quantization_config.weight_block_size is \[64\]"),
        ({"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}, "fmt is 'e5m2'"),
        (scheme(8, "int", "tensor_group", group_size=32), "weights.strategy is 'tensor_group'"),
        (scheme(8, "int", "group", group_size="32"), "weights.strategy is 'group' and its group_size '32'"),
        (scheme(3, "int", "channel"), "int of 3 bits"),
        (scheme(8, "int", "channel", symmetric=False), r"config_groups.group_0.weights.symmetric is False"),
        ({"quant_method": "compressed-tensors"}, "config_groups is None"),
        ({"quant_method": ["fp8"]}, "quantized by"),
        (scheme(8, "int", "channel") | {"format": "marlin-24"}, "format is 'marlin-24'"),
        (scheme(8, "int", "channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (scheme(8, "int", "channel") | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config is"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(settings, message, written: Callable[[str], Path], tmp_path) -> None:
    shutil.copytree(written("int8"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(UserError, match=message):
        read_config(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "lost", "message"),
    [
        ("int8", "experts.3.gate_proj.weight_scale", "no scales"),
        ("int8", "experts.3.gate_proj.weight", "which is not there"),
        ("fp8 blocks", "experts.0.down_proj.weight_scale_inv", "no scales"),
        ("int4", "experts.0.w1.weight_scale", "has no scales"),
        ("mxfp4", "experts.down_proj_scales", "has no scales"),
        ("mxfp4", "experts.down_proj_blocks", "which is not there"),
    ],
)
def test_numbers_never_come_without_their_scales(name, lost, message, written: Callable[[str], Path], tmp_path) -> None:
    shutil.copytree(written(name), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    key = next(key for key in tensors if key.endswith(lost))
    del tensors[key]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "model", num_local_ranks=1)


def test_zero_points_are_refused(written: Callable[[str], Path], tmp_path) -> None:
    shutil.copytree(written("int8"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    key = next(key for key in tensors if key.endswith("weight_scale"))
    tensors[key.replace("_scale", "_zero_point")] = torch.zeros(1, dtype=torch.int8)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match="zero points are not supported"):
        open_checkpoint(tmp_path / "model")
