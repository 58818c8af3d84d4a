"""A model of many large experts of which few are active: moving its experts takes long, a step does not.

That is the ratio of models that are served by tens of GPUs, at a size that two servers on one machine can hold. The
weights are random, and so are its routers, which are skewed as they come; other text loads other experts. Each token
is a character, as a server holds back the bytes of one that is not complete: a client would take that for a slow step.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers.decoders import Fuse
from transformers import Qwen3MoeConfig

from bench.serving.random_checkpoint import random_checkpoint
from rq_ep.model.text.byte_tokenizer import byte_tokenizer

HEAD_SIZE = 64
HIDDEN_SIZE = 512
NUM_LAYERS = 2
MAX_TOKENS = 512


def large_experts(directory: Path, num_experts: int, intermediate_size: int) -> None:
    """Write a checkpoint in bf16, with a token for each byte, of two layers and one active expert a token.

    Args:
        directory: where it goes.
        num_experts: of a layer.
        intermediate_size: an expert has 3 KiB for each.
    """
    heads = HIDDEN_SIZE // HEAD_SIZE
    shape: dict[str, Any] = {
        "hidden_size": HIDDEN_SIZE, "moe_intermediate_size": intermediate_size, "num_experts": num_experts,
        "num_hidden_layers": NUM_LAYERS, "num_experts_per_tok": 1, "head_dim": HEAD_SIZE,
        "num_attention_heads": heads, "num_key_value_heads": heads,
    }  # fmt: skip
    config = Qwen3MoeConfig(vocab_size=256, **shape, max_position_embeddings=MAX_TOKENS, eos_token_id=None)
    tokenizer = byte_tokenizer(MAX_TOKENS)
    tokenizer.backend_tokenizer.decoder = Fuse()  # shows the characters by which bytes are represented
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token = None  # which show nothing
    random_checkpoint(directory, config, torch.bfloat16, embedding_std=1.0, tokenizer=tokenizer)
