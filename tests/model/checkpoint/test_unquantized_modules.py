"""Quantized checkpoints that leave modules as they are, and every way to store low-bit weights that is read.

Each checkpoint is packed here in plain torch, and its dequantized copy is the reference.
"""

import json
import logging
import re
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rq_ep.config import ServeConfig
from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.model.load.attach import keep_stored_formats
from rq_ep.model.load.load_model import load
from rq_ep.model.load.opened_model import OpenedModel
from rq_ep.model.load.whole_model import load_whole_model
from rq_ep.model.seam.expert_modules import family_of, find_expert_modules
from rq_ep.model.text.byte_tokenizer import byte_tokenizer
from rq_ep.serve.rank.dry_run import preview
from tests.model.checkpoint.low_bit_ways import F32, FLOATS, PACKED, WAYS, Json, Stored
from tests.model.families import FAMILIES, logits, prompt, random_model, save

CPU = torch.device("cpu")


CALIBRATION: Json = {
    "tokenizer": byte_tokenizer(64), "sequence_length": 16, "max_tokens": 32,
}  # fmt: skip
IGNORED = {
    "nothing": [],
    "a layer": [r"re:.*layers\.1\.mlp\.experts.*"],
    "a matrix of every expert": ["re:.*experts.*down_proj"],
    "an expert": [r"re:.*layers\.3\.mlp\.experts\.2\..*"],
    "one matrix": ["model.layers.1.mlp.experts.5.gate_proj"],
    "all experts": [r"re:.*experts.*"],
}  # fmt: skip


def config_of_qwen() -> Any:
    config = type(FAMILIES["qwen3_moe"])(**FAMILIES["qwen3_moe"].to_dict())
    config.num_hidden_layers, config.num_experts, config.moe_intermediate_size = 4, 6, 64
    return config


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    path = save(random_model(config_of_qwen()), tmp_path_factory.mktemp("plain"))
    return load_file(path / "model.safetensors")


def is_ignored(module: str, ignore: list[str]) -> bool:
    return any(re.match(name[3:], module) if name.startswith("re:") else name == module for name in ignore)


def write(
    path: Path, tensors: dict[str, Tensor], way_of: Callable[[str], Stored | None], quantization: Json,
    key: str = "quantization_config",
) -> tuple[Path, Path]:  # fmt: skip
    """A checkpoint whose linear modules are stored in some way, or as they are, and its dequantized copy."""
    stored, dequantized = {}, {}
    for name, tensor in tensors.items():
        way = way_of(name.removesuffix(".weight")) if name.endswith("_proj.weight") else None
        parts, dequantized[name] = ({"": tensor}, tensor) if way is None else way.store(tensor)
        stored |= {f"{name}{part}": value.contiguous() for part, value in parts.items()}
    config = config_of_qwen().to_dict() | {"architectures": ["Qwen3MoeForCausalLM"], "dtype": "float32"}
    for folder, content, more in (("low", stored, {key: quantization}), ("reference", dequantized, {})):
        (path / folder).mkdir(parents=True)
        save_file(content, path / folder / "model.safetensors", {"format": "pt"})
        (path / folder / "config.json").write_text(json.dumps(config | more))
    return path / "low", path / "reference"


def expert_weights(model: Any) -> dict[tuple[int, int, str], Tensor]:
    """(layer, expert, tensor) -> its weights in fp32, of a model loaded over the ranks of this process."""
    found = {}
    for number, layer in enumerate(model.rq_ep.layers):
        for bank in layer.banks:
            for expert in bank.experts:
                format_ = bank.format_of(expert)
                views = format_.views(bank.packed(expert), bank.layout)
                for name in bank.layout.shapes:
                    found[number, expert, name] = format_.dequantize(views, name, bank.layout, F32)
    return found


def formats_of(placement: Placement) -> dict[tuple[int, int], str]:
    return {(layer.index, replica.expert): replica.format for layer in placement.layers for replica in layer.replicas}


def assert_equal(low: Path, reference: Path) -> Any:
    """The weights of every expert are the reference's to the bit, and the logits as far as sums allow."""
    model, dense = load(low, num_local_ranks=2, dtype="float32"), load_whole_model(reference, F32, CPU)
    held = expert_weights(model)
    for number, module in enumerate(find_expert_modules(dense)):
        for name, parameter in module.module.named_parameters():
            for expert, weight in enumerate(parameter):
                assert torch.equal(held[number, expert, name], weight), (number, expert, name)
    torch.testing.assert_close(logits(model, prompt(2, 7)), logits(dense, prompt(2, 7)), atol=2e-5, rtol=1e-4)
    return model


# Every way with one of the lists, and two of them with every list.
SWEPT = {*zip(WAYS, cycle(IGNORED), strict=False), *product(("W4A16 groups of 32", "fp8 128 x 128"), IGNORED)}


@pytest.mark.parametrize(("name", "ignored"), sorted(SWEPT))
def test_no_weight_is_rounded_that_a_checkpoint_stores(name, ignored, plain: dict[str, Tensor], tmp_path) -> None:
    way, ignore = WAYS[name], IGNORED[ignored]
    quantization = way.config | {"ignore": ignore}
    low, reference = write(tmp_path, plain, lambda module: None if is_ignored(module, ignore) else way, quantization)
    model = assert_equal(low, reference)
    for (layer, expert), format_ in formats_of(model.rq_ep.placement).items():
        modules = [f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj" for part in ("gate", "up", "down")]
        is_low = way.format is not None and not any(is_ignored(module, ignore) for module in modules)
        assert format_ == (way.format if is_low else "fp32")


@pytest.mark.parametrize("name", ["W4A16 fp16 scales", "W8A16 groups", "fp8 64 x 64"])
def test_one_process_reads_what_the_ranks_read(name: str, plain: dict[str, Tensor], tmp_path) -> None:
    way, ignore = WAYS[name], IGNORED["one matrix"]
    low, reference = write(tmp_path, plain, lambda m: None if is_ignored(m, ignore) else way, way.config)
    models = [load_whole_model(path, F32, CPU) for path in (low, reference)]
    assert torch.equal(*(logits(model, prompt(2, 7)) for model in models))


def two_groups(first: list[str], second: list[str]) -> Json:
    """int4 for some targets, and fp8 for others."""
    int4, e4m3 = (WAYS[name].config["config_groups"]["group_0"] for name in ("W4A16 groups of 32", "fp8 channels"))
    groups = {"a": int4 | {"targets": first, "format": PACKED}, "b": e4m3 | {"targets": second, "format": FLOATS}}
    return {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups, "ignore": []}


@pytest.mark.parametrize(
    ("first", "second", "formats"),
    [
        ([r"re:.*experts.*"], ["Linear"], {"int4_g32"}),
        (["Linear"], [r"re:.*layers\.1\..*"], {"int4_g32", "fp8"}),
        (["Linear"], ["model.layers.1.mlp.experts.0.up_proj"], {"int4_g32", "fp32"}),
        (["re:.*(gate|up)_proj", "re:.*self_attn.*"], [r"re:.*down_proj"], {"fp32"}),
    ],
)
def test_each_module_is_read_by_the_group_whose_targets_match_it(first, second, formats, plain, tmp_path) -> None:
    def way_of(module: str) -> Stored:
        is_second = is_ignored(module, second) or (second == ["Linear"] and not is_ignored(module, first))
        return WAYS["fp8 channels" if is_second else "W4A16 groups of 32"]

    low, reference = write(tmp_path, plain, way_of, two_groups(first, second))
    assert set(assert_equal(low, reference).rq_ep.placement.formats) == formats


@pytest.mark.parametrize(
    "old",
    [
        lambda config: config,
        lambda config: {k: v for k, v in config.items() if k != "quant_method"},
        lambda config: {"quantization_config": config, "sparsity_config": {"format": "dense"}},
    ],
)
def test_the_old_key_of_compressed_tensors_is_read(old, plain, tmp_path) -> None:
    way = WAYS["W4A16 groups of 32"]
    low, reference = write(tmp_path, plain, lambda _: way, old(way.config), "compression_config")
    assert assert_equal(low, reference).rq_ep.placement.formats == ("int4_g32",)


def test_weights_stored_otherwise_than_config_json_says_are_followed_as_stored(plain, tmp_path, caplog) -> None:
    way = WAYS["W4A16 groups of 32"]
    # Quantized though ignored, and native though not.
    low, reference = write(tmp_path / "a", plain, lambda _: way, way.config | {"ignore": ["re:.*"]})
    assert assert_equal(low, reference).rq_ep.placement.formats == ("int4_g32",)
    low, reference = write(tmp_path / "b", plain, lambda _: None, way.config)
    with caplog.at_level(logging.WARNING):
        assert assert_equal(low, reference).rq_ep.placement.formats == ("fp32",)
    assert "quantized by compressed-tensors, but none is stored so" in caplog.text


def test_experts_without_a_weight_format_are_dequantized_and_the_log_says_so(plain, tmp_path, caplog) -> None:
    way = WAYS["W8A16 groups"]
    low, _ = write(tmp_path, plain, lambda _: way, way.config)
    with caplog.at_level(logging.WARNING):
        load(low, num_local_ranks=1)
    assert "scaled as no weight format of ours holds them" in caplog.text


def test_a_dry_run_counts_every_expert_in_the_format_in_which_it_will_be_held(plain, tmp_path) -> None:
    way, ignore = WAYS["W4A16 groups of 32"], IGNORED["an expert"]
    low, _ = write(tmp_path, plain, lambda m: None if is_ignored(m, ignore) else way, way.config)
    tokenizer = byte_tokenizer(64)
    tokenizer.eos_token = "A"  # which is in the vocabulary
    tokenizer.save_pretrained(low)
    text = preview(ServeConfig(model=str(low), device="cpu", dtype="float32"), 1, 1)
    held = load(low, num_local_ranks=1, dtype="float32").rq_ep.expert_bytes
    assert set(held) == {"int4_g32", "fp32"}
    assert all(f"{size:,} in {name}" in text for name, size in held.items())


def test_a_placement_may_round_what_is_native_and_nothing_else_does(plain, tmp_path) -> None:
    way, ignore = WAYS["W4A16 groups of 32"], IGNORED["an expert"]
    low, reference = write(tmp_path, plain, lambda m: None if is_ignored(m, ignore) else way, way.config)
    stats = calibrate(low, {"d": ["AB" * 99]}, **CALIBRATION)
    assert (stats.native_format, stats.formats) == ("fp32", ("fp32",))
    stored = load(low, num_local_ranks=2, dtype="float32")
    all_int4 = [[way.format] * 6] * 2
    family = family_of(find_expert_modules(OpenedModel.open(low).model)[0].module)
    asked = load(
        low, keep_stored_formats(stored.rq_ep.placement, all_int4, family.layout), num_local_ranks=2, dtype="float32"
    )
    exact = expert_weights(load(reference, num_local_ranks=1))
    rounded = {key for key, weight in expert_weights(asked).items() if not torch.equal(weight, exact[key])}
    assert {(layer, expert) for layer, expert, _ in rounded} == {(1, 2)}  # the native one
    assert all(torch.equal(weight, exact[key]) for key, weight in expert_weights(stored).items())


def change(low: Path, changed: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = low / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor.contiguous() for name, tensor in changed(tensors).items()}, file, {"format": "pt"})


UP = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("way", "changed", "message"),
    [
        ("W8A8 channels", lambda t: t | {f"{UP}_scale": torch.ones(7, 1)}, rf"{UP}_scale is stored as F32 \[7, 1\]"),
        ("W4A16 groups of 32", lambda t: t | {UP: torch.ones(64, 64)}, f"{UP} and {UP}_packed are both there"),
        ("fp8 channels", lambda t: t | {UP: t[UP].float()}, rf"{UP} is stored as F32 \[64, 64\] with scales"),
        ("fp8 channels", lambda t: t | {UP: t[UP].view(torch.int8)}, rf"{UP} is stored as I8 .* float of 8 bits"),
        ("W8A8 channels", lambda t: t | {UP: t[UP].view(torch.float8_e4m3fn)}, f"{UP} is stored as F8_E4M3"),
        ("W8A8 channels", lambda t: t | {UP: t[UP].int()}, rf"{UP} is stored as I32 \[64, 64\] with scales"),
        ("fp8 64 x 64", lambda t: t | {f"{UP}_scale_inv": torch.ones(2, 1)}, "64 x 64 block"),
        ("fp8 tensors", lambda t: t | {f"{UP}_scale": torch.ones(3)}, "a scale for each channel or tensor"),
        ("W8A16 groups", lambda t: t | {f"{UP}_g_idx": torch.ones(64).int()}, "reordered groups are not supported"),
    ],
)
def test_what_contradicts_config_json_is_refused_by_name_unread(way, changed, message, plain, tmp_path) -> None:
    low, _ = write(tmp_path, plain, lambda _: WAYS[way], WAYS[way].config)
    change(low, changed)
    with pytest.raises(UserError, match=message) as error:
        OpenedModel.open(low)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_experts_of_numbers_that_are_no_weights_are_refused_by_name(dtype, plain, tmp_path) -> None:
    _, reference = write(tmp_path, plain, lambda _: None, {})
    change(reference, lambda tensors: tensors | {UP: tensors[UP].to(dtype)})
    with pytest.raises(UserError, match=rf"{UP} holds (I8|I32|U8|F8_E4M3) numbers, which are no weights"):
        OpenedModel.open(reference)


def test_targets_that_leave_a_stored_matrix_in_doubt_are_refused(plain, tmp_path) -> None:
    way = WAYS["W4A16 groups of 32"]
    for name, targets, message in (
        ("none", (["re:.*up_proj"], ["re:.*gate_proj"]), "no group's targets match model.layers.0"),
        ("both", (["re:.*proj"], ["re:.*mlp.*"]), "targets of several groups match model.layers.0"),
    ):
        low, _ = write(tmp_path / name, plain, lambda _: way, two_groups(*targets))
        with pytest.raises(UserError, match=message):
            OpenedModel.open(low)
