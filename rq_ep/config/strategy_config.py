"""A strategy as a command line or a file names it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rq_ep.core.errors import UserError
from rq_ep.core.files.yaml_files import parse_yaml


@dataclass(frozen=True)
class StrategyConfig:
    """A strategy by name, and its settings: `rq`, or `{name: llep, min_tokens_per_gemm: 16}`."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Any) -> "StrategyConfig":
        """Read a plain name or a mapping; text that looks like a mapping is read as YAML."""
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = parse_yaml(value, "--strategy")
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            return cls(value["name"], {str(key): setting for key, setting in value.items() if key != "name"})
        raise UserError(f"--strategy {value!r:.60}: expected a name or a mapping with a `name`")
