"""Tensors of a checkpoint that have no place in the model: which of them may be left unread.

Checkpoints of the hub carry heads for multi-token prediction, encoders of images and buffers beside the model itself.
"""

import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.low_bit_matrices import IGNORED_TENSORS

# Buffers that older checkpoints hold and today's models compute; transformers ignores them for every model.
COMPUTED_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
EXPERTS_OR_SCALES = ("expert", "scale", "zero")


def notes_on_leftovers(model: PreTrainedModel, names: set[str], path: object, is_strict: bool) -> list[str]:
    """What to log of the tensors that are left over, after those that the model class itself declares are dropped.

    Args:
        model: as transformers builds it.
        names: of the tensors, as the model would spell them.
        path: of the checkpoint, for messages.
        is_strict: no other tensor may be left unread than those that transformers and the configuration know.

    Raises:
        UserError: one may not be left unread: it looks like a part of what is loaded.
    """
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *COMPUTED_BUFFERS]
    predicting = {name for name in names if _predicts_more_tokens(model, name)}
    unknown = {name for name in names - predicting if not _matches(name, ignored)}
    if refused := unknown if is_strict else _parts_of_loaded(model, unknown):
        raise UserError(
            f"{path}: no place for {some(refused)} in a {model.config.model_type} model with this config.json: the "
            "weights belong to another configuration" + ", or leave out --strict-weights" * is_strict
        )
    notes = []
    if predicting:
        notes.append(f"{some(predicting)}: tensors for multi-token prediction are not read")
    if unknown:
        notes.append(f"{some(unknown)}: tensors that the model does not know are not read (--strict-weights: refuse)")
    return notes


def _parts_of_loaded(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Those of the names without which the loaded weights may mean something else.

    That are tensors in a module that holds weights, such as its scale, zero point or bias; experts, scales and zero
    points in any module of a loaded layer; and tensors named as loaded ones but for a number, of more layers.
    """
    loaded = {re.sub(r"\d+", "#", name) for name in model.state_dict()}
    modules = dict(model.named_modules())

    def is_part(name: str) -> bool:
        parents = [name[: match.start()] for match in re.finditer(r"\.", name)]
        inside = max((parent for parent in parents if parent in modules), key=len, default="")
        if re.sub(r"\d+", "#", name) in loaded or _is_leaf(modules[inside]):
            return True
        is_in_layer = _matches(inside, [r"\.\d+(\.|$)"])
        return (
            is_in_layer
            and _matches(name.removeprefix(inside), EXPERTS_OR_SCALES)
            and not _matches(name, IGNORED_TENSORS)
        )

    return {name for name in names if is_part(name)}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module holds weights, all of them its own."""
    own = len(list(module.parameters(recurse=False)))
    return own > 0 and own == len(list(module.parameters()))


def _predicts_more_tokens(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor is of a layer for multi-token prediction: those come after the model's own."""
    config = model.config.get_text_config()
    number = getattr(config, "num_nextn_predict_layers", None) or 0
    match = re.match(r"(\w+\.)*layers\.(?P<layer>\d+)\.", name)
    if match is None or not isinstance(number, int):
        return False
    return 0 <= int(match["layer"]) - int(config.num_hidden_layers) < number


def some(names: Iterable[str]) -> str:
    """The first few of a list of names, and how many there are."""
    first, *others = sorted(names, key=dot_natural_key)
    return first if not others else f"{first} and {len(others)} more"
