"""Where a model comes from: what is here wins, then the cache of the hub, then the hub; mistakes are one line."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, file_download
from transformers import AutoModelForCausalLM

import rq_ep
from rq_ep.__main__ import main
from rq_ep.config import ServeConfig
from rq_ep.core.errors import UserError
from rq_ep.core.stats import ModelIdentity
from rq_ep.model.calibration.loaded_model import LoadedModel
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.model.load.attach import place_uniformly
from rq_ep.model.load.opened_model import OpenedModel
from rq_ep.model.model_folder import find_model
from rq_ep.model.text.byte_tokenizer import byte_tokenizer
from rq_ep.parallel import LocalGroup, run_local
from rq_ep.serve.rank.dry_run import preview
from rq_ep.strategies.standard import Standard
from tests.model.families import FAMILIES, logits, prompt, random_model, save
from tests.model.hub_cache import COMMIT, HubServer, make_hub_cache

NAME = "some-org/Tiny_MoE.v1"
OTHER = COMMIT[::-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in shards, with files that nothing needs."""
    config = deepcopy(FAMILIES["qwen3_moe"])
    config.vocab_size = 260
    path = save(random_model(config), tmp_path_factory.mktemp("models") / "tiny", max_shard_size="200KB")
    byte_tokenizer(128).save_pretrained(path)
    for name in ("pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors", "README.md"):
        (path / name).write_text("not needed")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that has the model, and an empty cache."""
    server = HubServer(Path(shutil.copytree(folder, tmp_path / "on-hub")), NAME)
    with server.running() as url:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        yield server


def test_a_name_of_the_hub_is_loaded_from_its_cache_offline(folder: Path, cache: Path) -> None:
    root = make_hub_cache(folder, cache, NAME)
    tokens_BT = prompt(2, 6)
    expected = logits(rq_ep.load(folder, num_local_ranks=2, device="cpu"), tokens_BT)
    for model, revision in ((NAME, None), (NAME, COMMIT), (str(root), None), (root, "main")):
        found = rq_ep.load(model, revision=revision, num_local_ranks=2, device="cpu")
        torch.testing.assert_close(logits(found, tokens_BT), expected)
    identity = model_identity(find_model(NAME))
    assert (identity.id, identity.hash) == (NAME, model_identity(folder).hash)


def test_a_dry_run_and_a_calibration_take_a_name_of_the_hub(folder: Path, cache: Path) -> None:
    make_hub_cache(folder, cache, NAME)
    config = ServeConfig(model=NAME, device="cpu", revision=COMMIT)
    text = preview(config, 2, 2)
    assert f"model: {NAME}\n" in text
    assert config.model_name == NAME
    stats = rq_ep.calibrate(NAME, ["some words " * 40], max_tokens=32, sequence_length=16, formats=(), device="cpu")
    assert stats.model == model_identity(find_model(NAME))


def test_a_dry_run_downloads_the_headers_of_weights_alone(
    folder: Path, hub: HubServer, cache: Path, tmp_path: Path
) -> None:
    """What it says of bytes is what it says of the folder; a placement is not compared with unread weights."""
    placement = place_uniformly(Standard(), OpenedModel.open(folder), 2, ModelIdentity("another", "hash"))
    placement.save(tmp_path / "placement.json")
    config = ServeConfig(model=NAME, device="cpu")
    text = preview(replace(config, placement=str(tmp_path / "placement.json")), 2, 2)
    shards = {path.name: path.stat().st_size for path in folder.glob("model-*.safetensors")}
    assert sorted(name for name in hub.fetched if name in shards) == sorted(shards)
    assert hub.num_sent < 0.8 * sum(shards.values())  # of small ones the first 100 kB hold much
    assert not list(cache.rglob("*.safetensors"))
    (told,) = re.findall(rf"^{NAME}: ([\d,]+) bytes of weights are still to be downloaded", text, re.MULTILINE)
    assert abs(int(told.replace(",", "")) - sum(shards.values())) < 100 * len(shards)
    assert "placement.json was made for this model is not compared: that takes its weights" in text
    find_model(NAME)
    here = preview(config, 2, 2)
    assert "downloaded" not in here
    assert len(bytes_of_ranks(here)) == 2
    assert bytes_of_ranks(here) == bytes_of_ranks(text)
    with pytest.raises(UserError, match=r"placement.json was made for model 'another'"):
        preview(replace(config, placement=str(tmp_path / "placement.json")), 2, 2)


def bytes_of_ranks(text: str) -> list[str]:
    return re.findall(r"^rank \d: .*", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda shard: shard.unlink(), "refuses it .*404"),
        (lambda shard: shard.write_bytes(b"nonsense" * 9), "cannot be downloaded .*SafetensorsParsingError"),
    ],
)
def test_headers_that_the_hub_does_not_have_are_named(hub: HubServer, damage: Any, reason: str) -> None:
    damage(sorted(hub.folder.glob("model-*"))[1])
    with pytest.raises(UserError, match=rf"^{NAME}: .*({reason})"):
        preview(ServeConfig(model=NAME, device="cpu"), 2, 2)


def test_a_dry_run_offline_names_the_shard_that_the_cache_lacks(folder: Path, cache: Path) -> None:
    root = make_hub_cache(folder, cache, NAME)
    shard = sorted((root / "snapshots" / COMMIT).glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=rf"^{NAME}: .*lacks {shard.name} \(1 of \d+ missing\).*HF_HUB_OFFLINE"):
        preview(ServeConfig(model=NAME, device="cpu"), 2, 2)


def test_a_model_in_memory_that_transformers_loaded_from_the_hub_is_known_by_its_name(
    folder: Path, cache: Path
) -> None:
    make_hub_cache(folder, cache, NAME)
    model = AutoModelForCausalLM.from_pretrained(NAME, cache_dir=cache, local_files_only=True)
    assert LoadedModel.open(model, None, "cpu").identity == model_identity(find_model(NAME))


@pytest.mark.parametrize(
    "words",
    [
        "calibrate --text text.txt --out stats.safetensors",
        "quantize --text text.txt --out experts --formats int8",
        "eval --text text.txt",
        "profile --out profile.json",
    ],
)
def test_every_command_looks_for_a_name_in_the_cache(
    words: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some words " * 40)
    assert main([*words.split(), "--model", NAME, "--revision", "v1", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert f"error: {NAME}: neither a directory here nor a model in the cache {cache} (HF_HUB_CACHE)" in error
    assert "--revision v1" in error


def test_what_is_here_is_never_looked_for_on_the_hub(folder: Path, cache: Path, tmp_path: Path) -> None:
    make_hub_cache(folder, cache, NAME)
    assert find_model(f"./{NAME}") == Path(NAME)
    assert find_model(Path(NAME)) == Path(NAME)
    assert find_model(f"/{NAME}") == Path(f"/{NAME}")
    for name in ("a/b/c", "tiny", "../a/b", "a/", "a/b c"):
        assert find_model(name) == Path(name)
    assert find_model(NAME).name == COMMIT
    (tmp_path / NAME).mkdir(parents=True)
    assert find_model(NAME) == Path(NAME)
    with pytest.raises(UserError, match=rf"--revision main: {NAME} is not a model of the hub"):
        find_model(NAME, "main")


def test_the_root_of_a_cache_needs_a_choice_where_there_is_one(folder: Path, cache: Path) -> None:
    root = make_hub_cache(folder, cache, NAME)
    make_hub_cache(folder, cache, NAME, OTHER, "pr")
    assert find_model(root).name == COMMIT
    assert find_model(root, "pr").name == find_model(NAME, "pr").name == OTHER
    (root / "refs" / "main").unlink()
    with pytest.raises(UserError, match=rf"no snapshot of 'main' in this cache: choose by --revision from .*{OTHER}"):
        find_model(root)
    shutil.rmtree(root / "snapshots" / OTHER)
    assert find_model(root).name == COMMIT


def test_a_typo_names_both_places_and_the_variable_that_forbids_to_ask(cache: Path) -> None:
    with pytest.raises(UserError, match=r"^--model b: no such directory; .*, or ORG/NAME of the hub"):
        rq_ep.load("./b", device="cpu")
    with pytest.raises(UserError, match=r"^a/b: neither a directory here nor .* cache .*HF_HUB_CACHE.*HF_HUB_OFFLINE"):
        find_model("a/b")


def test_a_shard_that_the_cache_lacks_is_named_offline(folder: Path, cache: Path) -> None:
    root = make_hub_cache(folder, cache, NAME)
    shard = sorted((root / "snapshots" / COMMIT).glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=rf"^{NAME}: .*lacks {shard.name} \(1 of \d+ missing\).*HF_HUB_OFFLINE"):
        find_model(NAME)


def test_only_the_files_that_are_needed_are_downloaded_and_only_once(folder: Path, hub: HubServer) -> None:
    small = {path.name for path in folder.iterdir() if path.suffix in (".json", ".jinja")}
    assert set(os.listdir(find_model(NAME, config_only=True))) == small
    found = find_model(NAME)
    assert set(os.listdir(found)) == small | {path.name for path in folder.glob("model-*.safetensors")}
    read_tokenizer(found)
    assert model_identity(found).hash == model_identity(folder).hash
    find_model(NAME)
    assert sorted(hub.fetched) == sorted(os.listdir(found))


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", r"neither a directory here nor a model of http.* that may be read \(404\).*HF_TOKEN"),
        (401, "", r"refuses it .*401.*: check HF_TOKEN"),
        (403, "GatedRepo", rf"is gated: accept its terms at http.*/{NAME}, and set HF_TOKEN"),
        (404, "RevisionNotFound", f"--revision {OTHER}: {NAME} has no such branch, tag or commit"),
        (418, "", "418"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub: HubServer, status: int, code: str, message: str) -> None:
    hub.status, hub.error = status, code
    with pytest.raises(UserError, match=message) as error:
        find_model(NAME, OTHER if "Revision" in code else None)
    assert "\n" not in str(error.value)


def test_a_download_that_breaks_off_goes_on_where_it_stopped(
    folder: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)  # between attempts
    hub.broken = sorted(path.name for path in folder.glob("model-*"))[0]
    with pytest.raises(UserError, match=rf"^{NAME}: cannot be downloaded .*the same command goes on where it stopped"):
        find_model(NAME)
    hub.broken = ""
    before = list(hub.fetched)
    found = find_model(NAME)
    assert model_identity(found).hash == model_identity(folder).hash
    assert len(hub.fetched) - len(before) < len(list(found.glob("*")))


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 cannot be reached \(.*HF_ENDPOINT"):
        find_model(NAME)


def test_one_rank_of_a_node_downloads_and_all_learn_what_went_wrong(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(group: LocalGroup) -> Path | str:
        try:
            return find_model(NAME, group=group)
        except UserError as error:
            return str(error)

    hub.status, hub.error = 403, "GatedRepo"
    refused = run_local(3, find)
    assert len(set(refused)) == 1
    assert "is gated" in str(refused[0])
    hub.status = 200
    folders = run_local(3, find)
    assert set(folders) == {find_model(NAME)}
    assert len(hub.fetched) == len(set(hub.fetched))


def test_an_index_that_leads_out_of_the_model_is_not_followed(hub: HubServer) -> None:
    index = hub.folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    key = next(iter(document["weight_map"]))
    document["weight_map"][key] = "../../secret.safetensors"
    index.write_text(json.dumps(document))
    with pytest.raises(UserError, match="leads out of the model's directory"):
        find_model(NAME)
