"""What all bodies of requests have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


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
                raise PydanticCustomError("extra_forbidden", "unknown parameter", {"key": key})
        return data
