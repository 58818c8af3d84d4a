"""Limits of the numbers in `config.json`, checked before transformers makes lists and buffers of such lengths."""

import math
import re
from typing import Any

from rq_ep.core.errors import UserError, check_integer, check_number

MAX_DEPTH = 16  # of objects in objects
# What the name of a key says it counts, and the least and the largest number that makes sense; the first match counts
LIMITS = (
    (r"^num_hidden_layers$", 1, 1024),
    (r"^(num|n)_(\w+_)?layers?$", 0, 1024),
    (r"^(hidden_size|num_attention_heads)$", 1, 2**20),
    (r"^(vocab_size|max_position_embeddings)$", 1, 2**31),
    (r"^num_experts_per_tok(en)?$|^topk_group$", 1, 2**16),
    (r"(num|n)_\w*(experts?|heads|groups?)$|top_?k$", 0, 2**16),
    (r"^(?!mscale).*_dim$|_rank$|^(head_dim|d_kv|kv_channels)$", 0, 2**16),
    (r"(hidden|intermediate|ffn)_size$|^(d_model|d_ff)$", 0, 2**20),
)


def check_sizes(config: dict[str, Any], where: str, depth: int = 0) -> None:
    """Raise a `UserError`, which begins with `where` and names the key, for a number that no model can have.

    Args:
        config: `config.json`, or an object in it.
        where: path of the file, and keys of the object.
        depth: of the object in the file.
    """
    if depth > MAX_DEPTH:
        raise UserError(f"{where}: nested too deeply")
    for key, value in config.items():
        name = f"{where}: {key!r:.60}"
        if isinstance(value, dict):
            check_sizes(value, name, depth + 1)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} is {value}: must be a finite number")
        elif key == "num_experts_per_tok" and value is None:
            raise UserError(f"{name} is null: must be a number")
        elif value is None or isinstance(value, list | bool):
            continue  # transformers checks the types of what it declares
        elif key.endswith(("_eps", "epsilon")):
            check_number(name, value, 0, 1)
        else:
            limits = ((least, largest) for pattern, least, largest in LIMITS if re.search(pattern, key))
            for least, largest in list(limits)[:1]:
                check_integer(name, value, least, largest)
    _check_groups(config, where)


def _check_groups(config: dict[str, Any], where: str) -> None:
    """Experts in groups, as of DeepSeek: the groups are equal, and no more are chosen than there are."""
    sizes = [config.get(key) for key in ("n_routed_experts", "n_group", "topk_group")]
    num_experts, num_groups, chosen = (size if isinstance(size, int) else 0 for size in sizes)
    if num_experts and num_groups and num_experts % num_groups:
        raise UserError(f"{where}: n_group {num_groups}: does not divide the {num_experts} experts")
    if num_groups and chosen and chosen > num_groups:
        raise UserError(f"{where}: topk_group {chosen}: there are {num_groups} groups")
