"""A server of a model whose files differ about end tokens, and that brings sampling defaults."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.serve.running import by_hand, running

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.trains]

PROMPT = "The value of"


def test_an_answer_stops_at_the_tokenizers_end_token_and_is_greedy_by_the_models_default(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    prompt_BT = torch.tensor([list(PROMPT.encode())])
    answer = model.generate(prompt_BT, max_new_tokens=40, do_sample=False)[0, prompt_BT.shape[1] :].tolist()
    end = next(token for token in answer if chr(token).isalpha() and answer.index(token) > 2)
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    for name, changes in {
        "config.json": {"eos_token_id": 255},
        "generation_config.json": {"eos_token_id": None, "temperature": 0.0, "top_k": 20, "typical_p": 0.9},
        "tokenizer_config.json": {"eos_token": chr(end)},
    }.items():
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(document | changes))
    with running(tmp_path / "log", 1, "--model", str(folder), "--dtype", "float32", launcher=by_hand) as server:
        body = {"model": str(folder), "prompt": PROMPT, "max_tokens": 40}
        choice = server.client.post("/v1/completions", json=body).json()
    assert choice["choices"][0]["text"] == bytes(answer[: answer.index(end)]).decode()
    assert choice["choices"][0]["finish_reason"] == "stop"
    assert choice["usage"]["completion_tokens"] == answer.index(end) + 1
    assert (
        "get temperature 0, top_p 1, top_k 20; not supported, and not applied: typical_p 0.9"
        in (tmp_path / "log").read_text()
    )
