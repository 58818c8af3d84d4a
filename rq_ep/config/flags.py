"""A settings class as flags of a command line: those win over the file of `--config`, which wins over defaults."""

import argparse
from typing import Any, NoReturn, TypeVar

from rq_ep.config.option_values import from_text
from rq_ep.config.yaml_settings import read_mapping, read_settings_file
from rq_ep.core.errors import UserError, nearest
from rq_ep.core.options import Option, options_of

Settings = TypeVar("Settings")


class FlagParser(argparse.ArgumentParser):
    """Raises mistakes as user errors. Takes whole names of flags alone, and names the nearest to an unknown one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
            flags = [flag for action in shown for flag in action.option_strings]
            near = nearest(unknown[0].partition("=")[0], flags) if unknown[0].startswith("-") else None
            hint = "" if near is None else f": did you mean {near}?"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def add_flags(parser: argparse.ArgumentParser, settings: type[Any]) -> None:
    """Add `--config` and a flag for each option of a settings class; dashes and underscores are both accepted."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of these settings; flags given here win")
    groups: dict[str, Any] = {"": parser}
    # What is needed comes first, then what the class declares itself, then what its bases declare.
    for item in sorted(options_of(settings).values(), key=lambda item: (not item.required, item.depth)):
        if item.group not in groups:
            groups[item.group] = parser.add_argument_group(item.group)
        details: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "metavar": item.metavar}
        if item.kind is bool:
            details |= {"action": argparse.BooleanOptionalAction}
            del details["metavar"]
        elif item.several:
            details |= {"nargs": "+", "action": "extend"}
        groups[item.group].add_argument(item.flag, help=_help(item), **details)
        if item.flag != f"--{item.key}":
            parser.add_argument(f"--{item.key}", help=argparse.SUPPRESS, **details)


def _help(item: Option) -> str:
    text = item.help.replace("%", "%%")
    choices = item.choices or ()
    if not all(choice in text for choice in choices):
        text += f" ({', '.join(choices)})"
    if item.required:
        return f"{text} (required, here or in --config)"
    says_enough = item.default is False or item.default in (None, "", ()) or "default" in text
    default = ",".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
    default = "yes" if item.default is True else default
    return text if says_enough else f"{text} (default: {default})"


def read_settings(settings: type[Settings], args: argparse.Namespace) -> Settings:
    """Build a settings object from parsed flags, over the file they name, over the defaults.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range, a missing or malformed file.
    """
    options = options_of(settings)
    values = {} if args.config is None else read_mapping(settings, read_settings_file(args.config), args.config)
    given = {name: value for name, value in vars(args).items() if name in options}
    values |= {name: options[name].check(from_text(options[name], value)) for name, value in given.items()}
    for name, item in options.items():
        if item.required and not values.get(name):
            raise UserError(f"{item.flag} is needed: {item.help}")
    return settings(**values)
