"""Images in prompts over the padded cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMultimodalLM, PretrainedConfig

from rq_ep.engine.engine import EngineConfig
from rq_ep.engine.requests import Request
from rq_ep.engine.servable import IMAGE_MODEL_TYPES, PADDED
from rq_ep.parallel import TorchGroup
from tests.engine.worker import TIMEOUT_S, Answers, start
from tests.model.families import random_model, save
from tests.model.family_table import tiny_config

IMAGE, START, END = 90, 91, 92  # tokens


def config_of(family: str) -> PretrainedConfig:
    config = tiny_config(family)
    config.image_token_id = config.image_token_index = IMAGE
    if family == "aria":
        config.projector_patch_to_query_dict = {16: 4}
    else:
        config.vision_start_token_id, config.vision_end_token_id, config.video_token_id = START, END, 93
        config.image_start_token_id, config.image_end_token_id = START, END
    return config


def image_of(family: str, seed: int, config: PretrainedConfig) -> tuple[dict[str, Any], int]:
    """What a processor makes of an image, and how many tokens stand for it."""
    generator = torch.Generator().manual_seed(seed)
    if family == "aria":
        return {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator).numpy()}, 4
    vision = config.vision_config
    height = 2 * vision.spatial_merge_size
    width = height + vision.spatial_merge_size * (seed % 2)
    row = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(height * width, row, generator=generator).numpy()
    arrays = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]]).numpy()}
    return arrays, height * width // vision.spatial_merge_size**2


@pytest.mark.slow
@pytest.mark.parametrize("family", IMAGE_MODEL_TYPES)
def test_prompts_with_images_are_answered_as_the_dense_model_generates(
    family: str, gloo_of_one: TorchGroup, tmp_path: Path
) -> None:
    config = config_of(family)
    path = save(random_model(config), tmp_path)
    requests = []
    for number in range(4):
        images, num_tokens = image_of(family, number, config)
        ids = [3 + number] * (1 + 3 * number) + [START, *[IMAGE] * num_tokens, END, 5, 6 + number]
        requests.append(Request(f"{number}", ids, 6, ignore_eos=True, images=images))
    requests.append(Request("text", [7, 8, 9], 6, ignore_eos=True))
    answers = Answers(len(requests))
    engine = start(path, "standard", gloo_of_one, answers, config=EngineConfig(8, 64, 1024, PADDED))
    for request in requests:
        engine.submit(request)
    assert answers.all.wait(TIMEOUT_S), answers.tokens
    engine.stop()
    assert answers.tokens == dense_answers(path, requests)
    images_matter = [Request("0", requests[0].prompt_ids, 6, images=image_of(family, 2, config)[0])]
    assert dense_answers(path, images_matter)["0"] != answers.tokens["0"]


def dense_answers(path: Path, requests: list[Request]) -> dict[str, list[int]]:
    model = AutoModelForMultimodalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    answers = {}
    for request in requests:
        prompt = torch.tensor([request.prompt_ids])
        images = {name: torch.as_tensor(array) for name, array in request.images.items()}
        if "image_grid_thw" in images:
            images["mm_token_type_ids"] = (prompt == IMAGE).int()
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.max_tokens, do_sample=False,
            eos_token_id=-1, pad_token_id=0, **images,
        )  # fmt: skip
        answers[request.id] = out[0, prompt.shape[1] :].tolist()
    return answers
