"""A server of two ranks for a family without a paged cache."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rq_ep.config import ServeConfig
from rq_ep.engine.requests import Request
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.serve.rank.dry_run import preview
from tests.engine.worker import generated
from tests.model.families import random_model, save
from tests.model.family_table import tiny_config
from tests.serve.running import running


def model_folder(tiny_checkpoint: Path, path: Path) -> list[str]:
    """Write a tiny hybrid of linear and full attention that speaks bytes; its answers by `generate`."""
    vocab_size = json.loads((tiny_checkpoint / "config.json").read_text())["vocab_size"]
    config = tiny_config("qwen3_next")
    config.vocab_size = vocab_size
    model = random_model(config)
    save(model, path)
    for file in tiny_checkpoint.glob("token*"):
        shutil.copy(file, path)
    requests = [Request("", [number + 40] * (1 + 4 * number), 6, ignore_eos=True) for number in range(8)]
    return read_tokenizer(path).batch_decode([generated(model, request) for request in requests])


@pytest.mark.slow
@pytest.mark.dist
def test_requests_at_once_get_the_answers_of_generate(tiny_checkpoint: Path, tmp_path: Path) -> None:
    dense = model_folder(tiny_checkpoint, tmp_path / "model")
    text = preview(ServeConfig(model=str(tmp_path / "model"), device="cpu"), 2, 2)
    assert "padded cache: the model's own; 16,384 positions a rank, rows times the longest one" in text

    def ask(number: int) -> str:
        body = {"model": "tiny", "prompt": [number + 40] * (1 + 4 * number), "max_tokens": 6, "temperature": 0}
        answer = server.client.post("/v1/completions", json=body | {"ignore_eos": True})
        text: str = answer.raise_for_status().json()["choices"][0]["text"]
        return text

    arguments = ["--model", str(tmp_path / "model"), "--served-model-name", "tiny", "--max-num-batched-tokens", "16"]
    with running(tmp_path / "log", 2, *arguments) as server:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(8))) == dense
        assert "padded cache, at most 128 tokens a request" in server.log.read_text()
