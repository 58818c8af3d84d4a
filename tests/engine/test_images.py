"""Images in prompts over the padded cache."""

from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import tensor
from transformers import PretrainedConfig

from rq_ep.engine.engine import EngineConfig
from rq_ep.engine.requests import Request
from rq_ep.engine.servable import IMAGE_MODEL_TYPES, PADDED
from rq_ep.model.seam.adapters import adapter_for
from rq_ep.parallel import TorchGroup
from tests.engine.worker import TIMEOUT_S, Answers, start
from tests.model.families import random_model, save
from tests.model.family_table import tiny_config

IMAGE, START, END = 90, 91, 92  # tokens
FAMILY_OF = {"inkling_mm_model": "inkling", "qwen3_omni_moe_thinker": "qwen3_omni_moe"}
# Tiny models whose parts for images do not fit together by the small values that all families share
FITTING: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "kimi_k25": {"projection_hidden_size": 32},
    "muse_spark": {"out_hidden_size": 128},
}


def config_of(family: str) -> PretrainedConfig:
    whole = tiny_config(family)
    config: Any = adapter_for(whole.model_type).config(whole)
    special = {
        "image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": 93, "audio_token_id": 89,
        "vision_start_token_id": START, "vision_end_token_id": END, "image_start_token_id": START,
        "image_end_token_id": END, "video_start_token_id": 94, "video_end_token_id": 95,
    }  # fmt: skip
    for name, value in {**special, **FITTING.get(family, {})}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if family == "gemma4":
        config.text_config.use_bidirectional_attention = "vision"
    return whole


def image_of(family: str, config: Any, seed: int) -> dict[str, torch.Tensor]:
    """What a processor makes of an image; every second one is wider, or has parts."""
    generator, vision, is_wide = torch.Generator().manual_seed(seed), config.vision_config, seed % 2

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    match family:
        case "aria":
            return {"pixel_values": pixels(1, 3, 16, 16)}
        case "internvl":
            return {"pixel_values": pixels(1 + is_wide, 3, 16, 16)}
        case "mistral3" | "mistral_large4":
            return {"pixel_values": pixels(1, 3, 16 + 8 * is_wide, 16), "image_sizes": tensor([[16 + 8 * is_wide, 16]])}
        case "deepseek_ocr2" | "unlimited_ocr":
            local = {"pixel_values_local": pixels(2, 3, 64, 64), "num_local_patches": tensor([2])}
            grid = {} if family == "deepseek_ocr2" else {"patches_grid": tensor([[2, 1]])}
            return {"pixel_values": pixels(1, 3, 64, 64), **((local | grid) if is_wide else {})}
        case "inkling":
            side = vision.patch_size
            return {"pixel_values": pixels(2 + is_wide, vision.temporal_patch_size, side, side, 3)}
        case "inkling2":
            side, width = vision.patch_size * vision.spatial_merge_size, 2 + is_wide
            return {"pixel_values": pixels(2 * width, side, side, 3), "image_grid_thw": tensor([[1, 2, width]])}
        case "gemma4":
            height, width = 2 * vision.pooling_kernel_size, (1 + is_wide) * vision.pooling_kernel_size
            places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(1)[None]
            return {"pixel_values": pixels(1, height * width, 3 * vision.patch_size**2), "image_position_ids": places}
    merge = getattr(vision, "merge_size", None) or getattr(vision, "spatial_merge_size", None) or 2
    height, width = 2 * merge, (2 + is_wide) * merge
    num_frames = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", None) or 1
    side = vision.patch_size
    patches = (3, side, side) if family == "kimi_k25" else (3 * num_frames * side**2,)
    return {"pixel_values": pixels(height * width, *patches), "image_grid_thw": tensor([[1, height, width]])}


def request_of(family: str, model: Any, number: int) -> Request:
    """A prompt with an image, as the family's processor writes it."""
    images = image_of(family, model.config, number)
    features = model.get_image_features(**images, return_dict=True)
    features = getattr(features, "pooler_output", features)
    num_tokens = sum(part.numel() // part.shape[-1] for part in features)
    prompt_ids = [3 + number] * (1 + 3 * number) + [START, *[IMAGE] * num_tokens, END, 5, 6 + number]
    is_image_1N = tensor([prompt_ids]) == IMAGE
    names = signature(model.forward).parameters
    if "mm_token_type_ids" in names:
        images["mm_token_type_ids"] = is_image_1N.int()
    if "moe_mm_token_type_ids" in names:
        images["moe_mm_token_type_ids"] = torch.isin(tensor([prompt_ids]), tensor([START, IMAGE, END])).int()
    arrays = {name: array.numpy() for name, array in images.items()}
    return Request(f"{number}", prompt_ids, 6, ignore_eos=True, images=arrays)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", IMAGE_MODEL_TYPES)
@torch.no_grad()
def test_prompts_with_images_are_answered_as_the_dense_model_generates(
    model_type: str, gloo_of_one: TorchGroup, tmp_path: Path
) -> None:
    family = FAMILY_OF.get(model_type, model_type)
    config = config_of(family)
    model: Any = random_model(config, seed=3)
    path = save(model, tmp_path)
    dense = getattr(model, "thinker", model)
    requests = [request_of(family, dense, number) for number in range(2)]
    requests.append(Request("text", [7, 8, 9], 6, ignore_eos=True))
    answers = Answers(len(requests))
    engine = start(path, "standard", gloo_of_one, answers, config=EngineConfig(8, 256, 2048, PADDED))
    for request in requests:
        engine.submit(request)
    assert answers.all.wait(TIMEOUT_S), answers.tokens
    engine.stop()
    assert answers.tokens == {request.id: dense_answer(dense, request) for request in requests}
    others = [
        replace(one, images={**one.images, "pixel_values": -3 * one.images["pixel_values"]}) for one in requests[:2]
    ]
    assert any(dense_answer(dense, other) != answers.tokens[other.id] for other in others)


def dense_answer(model: Any, request: Request) -> list[int]:
    prompt = tensor([request.prompt_ids])
    images = {name: torch.as_tensor(array) for name, array in request.images.items()}
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.max_tokens, do_sample=False,
        eos_token_id=-1, pad_token_id=0, **images,
    )  # fmt: skip
    tokens: list[int] = out[0, prompt.shape[1] :].tolist()
    return tokens
