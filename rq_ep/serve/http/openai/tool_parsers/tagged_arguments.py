"""Arguments that are written between tags, as text, and get their types from the function's schema."""

import json
from collections.abc import Mapping
from typing import Any

Schemas = Mapping[str, Mapping[str, Any]]  # name of a function -> JSON schema of its parameters
WORDS = {"true": True, "false": False, "null": None, "none": None}


def argument(schemas: Schemas, function: str, key: str, text: str) -> Any:
    """The value of an argument: text where its schema says so or nothing, else the JSON that it is, if it is some."""
    properties = schemas.get(function, {}).get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    types = _types(schema) if isinstance(schema, Mapping) else set()
    if types <= {"string"}:
        return text
    if text.strip().lower() in WORDS and types & {"boolean", "null"}:
        return WORDS[text.strip().lower()]
    if "string" in types:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _types(schema: Mapping[str, Any]) -> set[str]:
    """The types that a schema allows, as far as it says so at its top."""
    named = schema.get("type", [])
    types = {named} if isinstance(named, str) else {name for name in named if isinstance(name, str)}
    for key in ("anyOf", "oneOf"):
        for option in schema.get(key) or ():
            types |= _types(option) if isinstance(option, Mapping) else set()
    return types
