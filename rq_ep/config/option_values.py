"""The value of an option from the text of its flag, or from what a YAML file says."""

from pathlib import Path
from typing import Any

from rq_ep.core.errors import UserError
from rq_ep.core.options import Option


def from_yaml(item: Option, value: Any) -> Any:
    """The value of an option from a file; the option's check reports what is wrong with it."""
    if value is None:
        return None
    if item.parse is not None:
        return item.parse(value)
    if item.is_sequence and isinstance(value, str):
        return from_text(item, [value] if item.several else value)
    if item.is_sequence and isinstance(value, list):
        return tuple(_as_path(item, one) for one in value)
    return _as_path(item, value)


def from_text(item: Option, value: Any) -> Any:
    """The value of an option from the text of its flag, or from the words of one that takes several."""
    if item.parse is not None:
        return item.parse(value)
    if not item.is_sequence:
        return _as_path(item, _number(item.kind, value))
    words = value if item.several else [word.strip() for word in value.split(",") if word.strip()]
    if not words:
        raise UserError(f"{item.flag}: name at least one")
    return tuple(_as_path(item, _number(item.kind, word)) for word in words)


def _as_path(item: Option, value: Any) -> Any:
    return Path(value) if item.kind is Path and isinstance(value, str) else value


def _number(kind: Any, text: Any) -> Any:
    """The number in a text or, if it is none, the text."""
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError:
        return text
