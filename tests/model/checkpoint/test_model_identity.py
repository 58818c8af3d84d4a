import json
import shutil
from pathlib import Path

import pytest

from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.checkpoint_files import INDEX
from rq_ep.model.checkpoint.model_identity import model_identity
from tests.model.families import FAMILIES, random_model, save


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(FAMILIES["qwen3_moe"]), tmp_path_factory.mktemp("models") / "tiny")


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def test_a_copy_is_the_same_model_under_its_own_name(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "renamed")
    edit_config(copy, transformers_version="1.0", _name_or_path="/elsewhere")
    (copy / "stats.safetensors").write_bytes(b"not a part of the model")
    assert model_identity(checkpoint).id == "tiny"
    assert model_identity(copy).id == "renamed"
    assert model_identity(copy).hash == model_identity(checkpoint).hash


def test_other_settings_are_another_model(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    edit_config(copy, num_experts_per_tok=1)
    assert model_identity(copy).hash != model_identity(checkpoint).hash


def test_other_weights_are_another_model(checkpoint: Path, tmp_path: Path) -> None:
    copy = save(random_model(FAMILIES["qwen3_moe"], seed=1), tmp_path / "copy")
    assert (copy / "config.json").read_text() == (checkpoint / "config.json").read_text()
    assert model_identity(copy).hash != model_identity(checkpoint).hash


def test_every_byte_of_a_small_file_counts(tmp_path: Path, checkpoint: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    weights = copy / "model.safetensors"
    whole = bytearray(weights.read_bytes()[: 200 * 1024])
    hashes = set()
    for position in range(len(whole) // 2, len(whole), 9973):
        whole[position] ^= 1
        weights.write_bytes(whole)
        hashes.add(model_identity(copy).hash)
        whole[position] ^= 1
    assert len(hashes) == len(range(len(whole) // 2, len(whole), 9973))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: shutil.rmtree(path), "no such directory"),
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (lambda path: (path / "config.json").write_text("{"), r"config\.json: not a readable JSON file"),
        (lambda path: (path / "config.json").write_text("[]"), "expected an object"),
        (lambda path: (path / "model.safetensors").unlink(), r"expected model\.safetensors\.index\.json or model"),
        (lambda path: (path / INDEX).write_text("{}"), "not a readable shard index"),
        (
            lambda path: (path / INDEX).write_text('{"weight_map": {"a": "lost.safetensors"}}'),
            "its index names lost.safetensors",
        ),
    ],
)
def test_a_directory_that_is_no_checkpoint_is_refused(
    checkpoint: Path, tmp_path: Path, break_it: object, message: str
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    break_it(copy)
    with pytest.raises(UserError, match=message):
        model_identity(copy)
