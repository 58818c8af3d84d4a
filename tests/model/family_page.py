"""The page of model families, written from the table: python -m tests.model.family_page"""

from collections.abc import Iterable
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

import rq_ep
from rq_ep.engine.servable import IMAGE_MODEL_TYPES, choose_cache
from rq_ep.model.seam.adapters import ADAPTERS, adapter_for
from tests.model.family_table import REFUSED, TABLE, WRAPPERS, tiny_config

PAGE = Path(rq_ep.__file__).parent / "model" / "FAMILIES.md"

NOTES = {
    "ernie4_5_vl_moe": "experts that only images reach are held by every rank",
    "hunyuan_v1_moe": "layers may choose unequal numbers of experts; then no recordings of the routing",
    "muse_spark": "the norm behind each expert too",
    "qwen3_omni_moe": "its talker and its vocoder are left unread",
}


def page() -> str:
    """The page's text."""
    families = sorted({*TABLE} - {*REFUSED})
    lines = [
        "# Model families",
        "",
        f"transformers {transformers.__version__} has {len(TABLE)} families whose experts are decorated with "
        f"`use_experts_implementation`.",
        f"{len(families)} of them are loaded and served, {len(REFUSED)} are refused by name. Tests hold a tiny random "
        "model of each to the logits",
        "of the dense model on two ranks, and its answers over the server's engine to those of `generate`; they are no",
        "evidence for weights of real size. Of a multimodal model the **whole** is built, which answers text, or the",
        "**text part** where transformers has a class for it: then encoders stay unread. The cache",
        "([server](../serve/README.md)) is that of the layers in the tiny model; other models of a family may mix",
        "other layers. Those with **images** take them in chats with `--cache padded`; tests hold these answers to",
        "`generate` too. Written by `python -m tests.model.family_page`.",
        "",
        "| `model_type` | built | cache | images | |",
        "|---|---|---|---|---|",
        *(_row(family) for family in families),
        "",
        f"Multimodal models around one of these, such as {_names(WRAPPERS)}, are built as a whole and take images.",
        "`switch_transformers`, which is not decorated, has an adapter: it is loaded, calibrated, placed and",
        "evaluated, but not served.",
        "",
        f"Refused: {'; '.join(f'`{name}` {why}' for name, why in REFUSED.items())}.",
        "Families whose experts are not decorated, such as `llama4` and `jetmoe`, are refused by the name of their",
        "experts.",
    ]
    return "\n".join(lines) + "\n"


def _names(families: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in families)


def _row(family: str) -> str:
    config = tiny_config(family)
    built = "model"
    if config.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES and config.get_text_config() is not config:
        name = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config.model_type]
        is_whole = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, name) == name
        built = "text part" if config.model_type in ADAPTERS or not is_whole else "whole"
    model_config = adapter_for(config.model_type).config(config)
    cache = choose_cache(model_config)
    images = "yes" if model_config.model_type in IMAGE_MODEL_TYPES else ""
    return f"| `{config.model_type}` | {built} | {cache} | {images} | {NOTES.get(family, '')} |"


if __name__ == "__main__":
    PAGE.write_text(page())
