"""Settings as YAML: what a file says of them, and what they say as one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rq_ep.config.option_values import from_yaml
from rq_ep.config.strategy_config import StrategyConfig
from rq_ep.core.errors import UserError, check_choice
from rq_ep.core.files.yaml_files import read_yaml
from rq_ep.core.options import options_of

Settings = TypeVar("Settings")


def read_settings_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file of settings; everything wrong with it is one line."""
    document = read_yaml(path, "settings", "--config names a YAML file")
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected `key: value` lines, not {type(document).__name__}")
    return document


def read_mapping(settings: type[Any], document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values by the names of options, of what a file says by their keys.

    Args:
        settings: a class of settings.
        where: the document is from, for messages.

    Raises:
        UserError: an unknown key, or a value of the wrong type or out of range.
    """
    items = {item.key: item for item in options_of(settings).values()}
    values = {}
    for key, value in document.items():
        item = items[check_choice(f"setting in {where}", str(key).replace("-", "_"), items)]
        try:
            values[item.name] = item.check(from_yaml(item, value))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return values


def as_mapping(settings: Any) -> dict[str, Any]:
    """The settings as a YAML file would give them."""
    items = sorted(options_of(type(settings)).items(), key=lambda pair: pair[1].depth)  # the class's own come first
    values = {item.key: getattr(settings, name) for name, item in items}
    document = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    if isinstance(strategy := document.get("strategy"), StrategyConfig):
        document["strategy"] = {"name": strategy.name, **strategy.settings}
    return document


def from_mapping(settings: type[Settings], document: Mapping[str, Any]) -> Settings:
    """The settings that `as_mapping` wrote down."""
    return settings(**read_mapping(settings, document, settings.__name__))


def shown(settings: Any) -> dict[str, Any]:
    """The settings without their secrets."""
    secrets = {item.key for item in options_of(type(settings)).values() if item.secret}
    return {name: "***" if name in secrets and value else value for name, value in as_mapping(settings).items()}


def resolved(settings: Any) -> str:
    """The settings as YAML that gives them again, except for secrets."""
    return yaml.safe_dump(shown(settings), sort_keys=False).rstrip()
