"""The longest sequence that a model was made for."""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

_SCALING = ("linear", "dynamic", "yarn", "llama3", "longrope")


def max_positions(config: PretrainedConfig) -> int | None:
    """Tokens of the longest sequence that a model was made for; None: it has no such limit.

    Where rope scaling is switched on and `max_position_embeddings` left as it was, which is what model cards advise for
    YaRN, that is the original length times the factor, as in vLLM.
    """
    text = config.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", None)
    if limit is None:
        return None
    parameters = getattr(text, "rope_parameters", None) or {}
    by_layer_type = [each for each in parameters.values() if isinstance(each, Mapping)]
    return max(limit, min(_scaled(each, limit) for each in by_layer_type or [parameters]))


def _scaled(parameters: Mapping[str, Any], limit: int) -> int:
    if parameters.get("rope_type") not in _SCALING:
        return limit
    return int((parameters.get("original_max_position_embeddings") or limit) * (parameters.get("factor") or 1))
