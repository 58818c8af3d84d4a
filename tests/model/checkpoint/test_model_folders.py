"""Model folders in which anything may lie: what is read is what the index names, and damage is one line."""

import json
import os
import resource
import shutil
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import is_torchvision_available

from rq_ep.config import ServeConfig
from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.checkpoint_files import INDEX, SINGLE, Checkpoint
from rq_ep.model.checkpoint.tokenizer_files import read_processor
from rq_ep.model.load.load_model import load
from rq_ep.model.load.opened_model import OpenedModel
from rq_ep.model.load.whole_model import load_whole_model
from rq_ep.model.text.byte_tokenizer import EOS, byte_tokenizer
from rq_ep.serve.__main__ import main
from rq_ep.serve.rank.dry_run import preview
from tests.model.families import FAMILIES, logits, prompt, random_model, save

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = deepcopy(FAMILIES["qwen3_moe"])
    config.vocab_size = 260
    path = save(random_model(config), tmp_path_factory.mktemp("models") / "tiny")
    byte_tokenizer(128).save_pretrained(path)
    write(path / "generation_config.json", {"eos_token_id": EOS})
    return path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def write(path: Path, document: object) -> None:
    path.write_text(json.dumps(document))


def change(path: Path, **keys: object) -> None:
    write(path, json.loads(path.read_text()) | keys)


def shard(folder: Path, **named: object) -> dict[str, torch.Tensor]:
    """Spread the tensors over a.safetensors and b.safetensors; `named` is what the index says of some tensors."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    keys = sorted(tensors)
    parts = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, part in parts.items():
        save_file({key: tensors[key] for key in part}, folder / name)
    weight_map = {key: name for name, part in parts.items() for key in part}
    write(folder / INDEX, {"metadata": {}, "weight_map": weight_map | {NORM: weight_map[NORM]} | named})
    return tensors


def dry_run(folder: Path, **settings: Any) -> str:
    return preview(ServeConfig(model=str(folder), device="cpu", **settings), 2, 2)


def test_serve_and_eval_read_what_the_index_names_beside_a_stray_file(folder: Path) -> None:
    tokens_BT = prompt(2, 6)
    expected = logits(load_whole_model(folder, torch.float32, torch.device("cpu")), tokens_BT)
    tensors = shard(folder)
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, folder / SINGLE)
    torch.testing.assert_close(logits(load(folder, num_local_ranks=2, device="cpu"), tokens_BT), expected)
    torch.testing.assert_close(logits(load_whole_model(folder, "auto", torch.device("cpu")), tokens_BT), expected)
    assert f"{SINGLE} is not read: {INDEX} names other files" in dry_run(folder)


def test_of_a_tensor_in_two_shards_the_one_that_the_index_names_is_read(folder: Path) -> None:
    tensors = shard(folder)
    for name in ("a.safetensors", "b.safetensors"):
        held = load_file(folder / name)
        if NORM in held:
            named = name
        else:
            save_file(held | {NORM: tensors[NORM] + 1}, folder / name)
    assert torch.equal(Checkpoint(folder).tensor(NORM), tensors[NORM])
    change(folder / INDEX, weight_map=json.loads((folder / INDEX).read_text())["weight_map"] | {NORM: other(named)})
    assert torch.equal(Checkpoint(folder).tensor(NORM), tensors[NORM] + 1)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    del weight_map[NORM]
    change(folder / INDEX, weight_map=weight_map)
    with pytest.raises(UserError, match=rf"'{NORM}' is in a.safetensors and in b.safetensors: name one in {INDEX}"):
        Checkpoint(folder)


def other(name: str) -> str:
    return {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[name]


def test_a_tensor_that_is_not_in_the_shard_named_for_it_is_refused(folder: Path) -> None:
    shard(folder)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    change(folder / INDEX, weight_map=weight_map | {NORM: other(weight_map[NORM])})
    with pytest.raises(UserError, match=rf"{INDEX} names '[ab]\.safetensors' for '{NORM}', which is not in it"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/etc/passwd", "", ".", "x" * 5000, "a\0b", "\ud800", "lost\n.safetensors", 5, None, []],
)
def test_names_in_an_index_that_are_no_files_of_the_folder_are_refused_in_one_line(folder: Path, name: object) -> None:
    shard(folder, **{NORM: name})
    with pytest.raises(UserError, match=r"leads out of|is no file name|which is not there") as error:
        Checkpoint(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("store", "is_read"), [("elsewhere", False), ("models--org--name/blobs", True), ("model/blobs", True)]
)
def test_links_may_lead_to_the_blobs_of_the_hubs_cache_alone(folder: Path, store: str, is_read: bool) -> None:
    shard(folder)
    blobs = folder.parent / store
    blobs.mkdir(parents=True)
    shutil.move(folder / "a.safetensors", blobs / "0123abc")
    (folder / "a.safetensors").symlink_to(blobs / "0123abc")
    if is_read:
        assert NORM in Checkpoint(folder).keys
    else:
        with pytest.raises(UserError, match=r"'a\.safetensors' leads out of the model's directory, to '.*0123abc'"):
            Checkpoint(folder)


def header(folder: Path, length: int | None = None, **tensor: object) -> None:
    """Rewrite the header's length, or what it says of one tensor."""
    whole = (folder / SINGLE).read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    document = json.loads(whole[8:end])
    document[NORM] |= tensor
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 8)
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + whole[end:])


@pytest.mark.parametrize(
    "damage",
    [
        {"length": 2**64 - 1}, {"length": 2**63}, {"length": 10**9}, {"length": 0}, {"length": 9},
        {"dtype": "X1"}, {"dtype": "F64"}, {"shape": [2**62, 2**62]}, {"shape": [-64]}, {"shape": "64"},
        {"data_offsets": [-1, 3]}, {"data_offsets": [0, 2**63]}, {"data_offsets": [0, 256]}, {"data_offsets": [9, 1]},
    ],
)  # fmt: skip
def test_absurd_headers_are_refused_in_one_line(folder: Path, damage: dict[str, Any]) -> None:
    header(folder, **damage)
    with pytest.raises(UserError, match=r"model\.safetensors.*cut short or damaged") as error:
        dry_run(folder)
    assert "\n" not in str(error.value)


def test_integers_in_the_place_of_weights_are_refused(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {NORM: tensors[NORM].int()}, folder / SINGLE)
    with pytest.raises(UserError, match=rf"{NORM} holds I32 numbers"):
        OpenedModel.open(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9), ("num_hidden_layers", -1), ("num_hidden_layers", "3"), ("num_hidden_layers", 3.5),
        ("num_local_experts", 10**9), ("num_experts_per_tok", 0), ("num_experts_per_tok", 9), ("hidden_size", 2**70),
        ("head_dim", 10**9), ("vocab_size", -5), ("moe_intermediate_size", float("nan")),
        ("rms_norm_eps", float("nan")), ("rms_norm_eps", -1.0), ("max_position_embeddings", 0),
        ("dtype", -1), ("dtype", {"a": 1}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": float("inf")}),
        ("eos_token_id", -1), ("eos_token_id", 260), ("eos_token_id", [EOS, None]),
    ],
)  # fmt: skip
def test_absurd_sizes_are_refused_by_file_and_key_without_memory(folder: Path, key: str, value: object) -> None:
    change(folder / "config.json", **{key: value})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=rf"config\.json: .*{key}|{key} 9|config\.json: model.rotary_emb") as error:
        dry_run(folder)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", INDEX)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content", ["[]", '"x"', "7", "{", "", "[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 5000]
)
def test_a_settings_file_that_is_no_object_is_refused_by_name(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: (expected an object|not a readable)") as error:
        dry_run(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_or_an_endless_file_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name}: not a readable JSON file .it is a pipe"):
        dry_run(folder)
    (folder / name).unlink()
    with (folder / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=f"{name}: not a JSON file: it has {1 << 40} bytes"):
        dry_run(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: change(path / "tokenizer_config.json", model_max_length="x"), "the tokenizer of .*TypeError"),
        (lambda path: change(path / "tokenizer_config.json", eos_token=7), "the tokenizer of .*eos_token"),
        (lambda path: (path / "chat_template.jinja").write_text("{% for %}"), "the chat template of"),
        (lambda path: change(path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}), None),
    ],
)
def test_a_tokenizer_that_would_fail_at_the_first_request_is_refused(
    folder: Path, damage: Callable[[Path], None], message: str | None
) -> None:
    damage(folder)
    if message is None:
        dry_run(folder)  # code of the folder's is not run
    else:
        with pytest.raises(UserError, match=message):
            dry_run(folder)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_layer_for_multi_token_prediction_is_left_unread_at_any_index(tmp_path: Path, num_layers: int) -> None:
    config = deepcopy(FAMILIES["deepseek_v3"])
    config.num_hidden_layers, config.first_k_dense_replace, config.num_nextn_predict_layers = num_layers, 0, 1
    folder = save(random_model(config), tmp_path / "model")
    expected = logits(AutoModelForCausalLM.from_pretrained(folder), prompt(1, 5))
    tensors = load_file(folder / SINGLE)
    last = {key: tensor for key, tensor in tensors.items() if f"layers.{num_layers - 1}." in key}
    extra = moved(last, num_layers - 1, num_layers)
    extra[f"model.layers.{num_layers}.eh_proj.weight"] = torch.ones(64, 128)
    save_file(tensors | extra, folder / SINGLE)
    opened = OpenedModel.open(folder)
    assert opened.reader.notes == [
        f"model.layers.{num_layers}.eh_proj.weight and 16 more: tensors for multi-token prediction are not read"
    ]
    torch.testing.assert_close(logits(load(folder, num_local_ranks=2, device="cpu"), prompt(1, 5)), expected)
    save_file(tensors | extra | moved(extra, num_layers, num_layers + 1), folder / SINGLE)
    with pytest.raises(UserError, match=rf"no place for model\.layers\.{num_layers + 1}\."):
        OpenedModel.open(folder)


def moved(tensors: dict[str, torch.Tensor], layer: int, other: int) -> dict[str, torch.Tensor]:
    """Copies of a layer's tensors under the names of another layer's."""
    return {key.replace(f"layers.{layer}.", f"layers.{other}."): tensor.clone() for key, tensor in tensors.items()}


def test_weights_that_the_configuration_ties_but_that_differ_stay_apart(folder: Path) -> None:
    change(folder / "config.json", tie_word_embeddings=True)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder), prompt(1, 5))
    torch.testing.assert_close(logits(load(folder, num_local_ranks=2, device="cpu"), prompt(1, 5)), expected)


def test_weights_are_not_rounded_where_the_configuration_names_no_dtype(folder: Path) -> None:
    change(folder / "config.json", dtype=None)
    assert load(folder, num_local_ranks=2, device="cpu").dtype == torch.float32
    assert load_whole_model(folder, "auto", torch.device("cpu")).dtype == torch.float32
    assert "fp32" in dry_run(folder)


def test_a_dry_run_of_a_damaged_folder_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "generation_config.json", {"eos_token_id": [EOS, None]})
    assert main(["--model", str(folder), "--device", "cpu", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error == f"rq_ep.serve: error: {folder}/generation_config.json: eos_token_id None: must be a whole number\n"


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is there")
def test_a_processor_of_images_that_needs_torchvision_says_so(tmp_path: Path) -> None:
    byte_tokenizer(64).save_pretrained(tmp_path)
    write(tmp_path / "config.json", {"model_type": "qwen3_vl_moe"})
    types = {"image_processor": "Qwen2VLImageProcessor", "video_processor": "Qwen3VLVideoProcessor"}
    parts = {name: {f"{name}_type": kind} for name, kind in types.items()}
    write(tmp_path / "processor_config.json", {"processor_class": "Qwen3VLProcessor", **parts})
    with pytest.raises(UserError, match="needs torchvision, which is not installed: pip install torchvision"):
        read_processor(tmp_path)
