"""A model that is named as on the Hugging Face hub, served offline from its cache."""

from copy import deepcopy
from pathlib import Path

import pytest

from rq_ep.model.text.byte_tokenizer import byte_tokenizer
from tests.model.families import FAMILIES, random_model, save
from tests.model.hub_cache import make_hub_cache
from tests.serve.running import running

pytestmark = [pytest.mark.dist, pytest.mark.slow]
NAME = "some-org/tiny"


def test_a_name_of_the_hub_is_served_by_two_ranks_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = deepcopy(FAMILIES["mixtral"])
    config.vocab_size = 260
    folder = save(random_model(config), tmp_path / "tiny")
    byte_tokenizer(128).save_pretrained(folder)
    make_hub_cache(folder, tmp_path / "hub", NAME)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with running(tmp_path / "log", 2, "--model", NAME, "--device", "cpu") as server:
        assert [model["id"] for model in server.client.get("/v1/models").json()["data"]] == [NAME]
        body = {"model": NAME, "prompt": "once", "max_tokens": 4, "ignore_eos": True}
        answer = server.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == NAME
        assert answer.json()["usage"]["completion_tokens"] == 4
