"""What all bodies of requests have in common, and the rules between fields that JSON Schema can say."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError
from typing_extensions import TypeAliasType

from rq_ep.core.errors import nearest

NULL = {"type": "null"}


def whole(value: Any) -> Any:
    """A number without a fraction as an int: 2.0 is an integer of JSON Schema."""
    return int(value) if type(value) is float and value.is_integer() else value


MAX_INT = 2**31 - 1  # of tokens and their ids: enough, and short to quote
NumberOf = Annotated[int, Field(ge=0, le=MAX_INT), BeforeValidator(whole)]
TokenId = TypeAliasType("TokenId", NumberOf)  # by this name in the OpenAPI document


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls_and_refuse_unknown(cls, data: Any) -> Any:
        """Drop what is null, and name the first unknown key, and it alone: pydantic would make an error of each."""
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if value is not None}
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for key in data:
            if key not in known:
                about = {"key": key, "near": nearest(key, known)}
                raise PydanticCustomError("extra_forbidden", "unknown parameter", about)
        return {key: whole(value) for key, value in data.items()}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The JSON schema, in which every field that may be left out may be null, and unknown ones have to be."""
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        schema["additionalProperties"] = NULL
        for name, field in schema["properties"].items():
            if name not in schema.get("required", ()) and NULL not in field.get("anyOf", ()):
                about = {key: field.pop(key) for key in ("title", "default", "description") if key in field}
                schema["properties"][name] = {"anyOf": [field, NULL], **about}
        return reference


def given(*names: str) -> dict[str, Any]:
    """The rule of a JSON schema that these fields are there and not null."""
    return {"required": list(names), "properties": {name: {"not": NULL} for name in names}}


def some(name: str) -> dict[str, Any]:
    """The rule of a JSON schema that a field is a list that is not empty."""
    return {"required": [name], "properties": {name: {"type": "array", "minItems": 1}}}


def absent(*names: str) -> dict[str, Any]:
    """The rule of a JSON schema that these fields are not there, or null."""
    return {"properties": dict.fromkeys(names, NULL)}


def exactly_one(*names: str) -> dict[str, Any]:
    """The rule of a JSON schema that one of these fields is given."""
    return {"oneOf": [given(name) for name in names]}


def any_of(*rules: dict[str, Any]) -> dict[str, Any]:
    """The rule of a JSON schema that one of these holds, or several."""
    return {"anyOf": list(rules)}


def has(name: str, value: Any) -> dict[str, Any]:
    """The rule of a JSON schema that a field has this value."""
    return {"required": [name], "properties": {name: {"const": value}}}
