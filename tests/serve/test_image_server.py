"""Chats with images at a server, and what of them it refuses."""

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from transformers import AutoProcessor, PreTrainedModel

from rq_ep.config import ServeConfig
from rq_ep.serve.rank.dry_run import preview
from tests.model.families import random_model, save
from tests.model.family_table import tiny_config
from tests.serve.http.openai.test_images import aria_processor, png, png_that_claims, url
from tests.serve.http.openai.test_remote_images import ImageServer
from tests.serve.running import Server, by_hand, running

pytestmark = [pytest.mark.dist, pytest.mark.slow]
RED, BLUE = png(), png(80, 20, (0, 0, 255))
MAX_TOKENS = 6


class Chats:
    """A server of a tiny aria, and the dense model beside it."""

    def __init__(self, server: Server, model: PreTrainedModel, folder: Path) -> None:
        self.config = ServeConfig(model=str(folder), cache="padded", device="cpu")
        self.server = server
        self.model = model
        self.processor = AutoProcessor.from_pretrained(folder)

    def post(self, *content: str | bytes, **fields: Any) -> httpx.Response:
        """Ask with texts and images; text that is a URL is one of an image."""
        parts = [
            {"type": "text", "text": part}
            if isinstance(part, str) and not part.startswith(("http", "data"))
            else {"type": "image_url", "image_url": {"url": url(part) if isinstance(part, bytes) else part}}
            for part in content
        ]
        body = {
            "model": "aria",
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
        }
        return self.server.client.post("/v1/chat/completions", json=body | fields)

    def answer(self, *content: str | bytes) -> str:
        text: str = self.post(*content).raise_for_status().json()["choices"][0]["message"]["content"]
        return text

    def refusal(self, *content: str | bytes) -> str:
        answer = self.post(*content)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "messages"
        message: str = answer.json()["error"]["message"]
        return message

    def dense(self, *content: str | bytes) -> str:
        """The answer of transformers' `generate`."""
        text = "user:" + "".join("<|img|>" if isinstance(part, bytes) else part for part in content)
        images = [Image.open(io.BytesIO(part)).convert("RGB") for part in content if isinstance(part, bytes)]
        inputs = self.processor(text=[text], images=images or None, return_tensors="pt")
        out = self.model.generate(
            **inputs, max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=258
        )
        text = self.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chats]:
    folder = tmp_path_factory.mktemp("aria")
    aria_processor().save_pretrained(folder)
    config = tiny_config("aria")
    config.image_token_id = 259
    config.get_text_config().vocab_size, config.projector_patch_to_query_dict = 260, {25: 4}
    config.vision_config.image_size, config.vision_config.patch_size = 980, 196
    model = random_model(config)
    save(model, folder)
    arguments = ["--model", str(folder), "--served-model-name", "aria", "--cache", "padded", "--max-num-batched-tokens",
                 "48", "--allow-remote-images", "--allowed-image-networks", "127.0.0.0/8"]  # fmt: skip
    with running(folder / "log", 1, *arguments, launcher=by_hand) as server:
        yield Chats(server, model, folder)


def test_chats_with_images_get_the_answers_of_generate(chats: Chats) -> None:
    questions = [("a", RED), ("a", BLUE), (RED, "b", BLUE), (BLUE, "b", RED, "c"), ("text",)]
    dense = [chats.dense(*question) for question in questions]
    assert len(set(dense)) == len(dense)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda question: chats.answer(*question), questions)) == dense


def test_several_answers_to_a_chat_with_images_are_those_of_as_many_chats(chats: Chats) -> None:
    def texts(**fields: Any) -> list[str]:
        body = chats.post("a", RED, "b", BLUE, temperature=1, **fields).raise_for_status().json()
        assert body["usage"]["prompt_tokens"] == num_prompt
        return [choice["message"]["content"] for choice in body["choices"]]

    num_prompt = chats.post("a", RED, "b", BLUE).json()["usage"]["prompt_tokens"]
    several = texts(n=3, seed=5)
    assert several == [text for seed in (5, 6, 7) for text in texts(seed=seed)]
    assert len(set(several)) > 1
    assert chats.post("a", RED, n=2).json()["choices"][1]["message"]["content"] == chats.dense("a", RED)


def test_streams_and_images_of_other_servers_give_the_same(chats: Chats) -> None:
    expected = chats.answer("a", RED)
    lines = chats.post("a", RED, stream=True).raise_for_status().text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == expected
    with ImageServer() as images:
        assert chats.answer("a", f"{images.url}/moved") == chats.answer("a", f"{images.url}/a.png") == expected
        assert "messages.0.content.1.image_url: " in (refusal := chats.refusal("a", f"{images.url}/missing"))
        assert "status 404" in refusal
    assert "has no public address (--allowed-image-networks)" in chats.refusal("http://10.0.0.1/a.png")


def test_what_cannot_be_answered_is_refused_and_the_server_goes_on(chats: Chats) -> None:
    assert "messages.0.content.1.image_url: 8000 x 8000 pixels" in chats.refusal(RED, png_that_claims(8000, 8000))
    assert "not a readable image/png" in chats.refusal(RED[:60])
    assert "54 tokens with its images, but one with images has at most 48 here (--max-num" in chats.refusal(
        "a", *[RED] * 12
    )
    assert "65 images, more than 64" in chats.refusal(*[RED] * 65)
    assert "the model's processor refuses the images" in chats.refusal("<|img|>", RED)
    assert "this server takes at most 128" in chats.post(RED, max_tokens=120).json()["error"]["message"]
    assert chats.server.client.get("/health").status_code == 200
    assert chats.answer("b", BLUE) == chats.dense("b", BLUE)
    assert "images in chat" in preview(chats.config, 1, 1)
