"""Options, each declared once: a field of a settings dataclass becomes a keyword, a command-line flag and a YAML key.

Its help text, its default and the values it takes are written down at the field alone.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from inspect import Parameter, get_annotations, getdoc
from inspect import signature as signature_of
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rq_ep.core.errors import MAX_DIGITS, MAX_INTEGER, UserError, check_choice, check_integer, check_number, check_text

SIZE_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
MAX_SECONDS = 10**6  # of an option: eleven days; clocks and timers take no number of any size

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """The declaration of an option; the last seven are read off the dataclass field."""

    help: str
    choices: Sequence[str] | None = None
    minimum: float | None = None
    maximum: float | None = None
    required: bool = False  # only the user can know it; its default stands for "not given"
    secret: bool = False  # never shown
    several: bool = False  # takes several words of the command line, instead of one with commas
    flag: str = ""  # default: the name with dashes
    metavar: str = ""  # default: N for integers, X for other numbers, else the last word of the name
    group: str = ""  # heading of the help text that it stands under
    parse: Callable[[Any], Any] | None = None  # makes a value of a flag's text or of what a YAML file says
    name: str = ""
    default: Any = None
    kind: Any = str  # type of a value or, of a sequence, of its items
    is_sequence: bool = False
    takes_none: bool = False
    depth: int = 0  # 0: the class itself declares it, 1: its first base...
    has_other_types: bool = False  # whether Python may give it as something that neither a flag nor a file can say

    @property
    def key(self) -> str:
        """Its key in a YAML file: the flag's name."""
        return self.flag.removeprefix("--").replace("-", "_")

    def check(self, value: Any) -> Any:
        """Return `value`, converted to the option's type where nothing is lost by that.

        Raises:
            UserError: it is of another type, or out of range.
        """
        if (value is None and self.takes_none) or (self.required and value == self.default):
            return value
        if self.secret and not (isinstance(value, Sequence) and all(isinstance(item, str) and item for item in value)):
            raise UserError(f"{self.flag}: must be text")  # which no error quotes
        if not self.is_sequence:
            return self._check_one(value)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"{self.flag} {value!r:.60}: must be a list")
        return tuple(self._check_one(item) for item in value)

    def _check_one(self, value: Any) -> Any:
        if self.kind is bool:
            if not isinstance(value, bool):
                raise UserError(f"{self.flag} {value!r:.60}: must be true or false")
            return value
        if self.kind is int:
            low = -MAX_INTEGER if self.minimum is None else int(self.minimum)
            return check_integer(self.flag, value, low, MAX_INTEGER if self.maximum is None else int(self.maximum))
        if self.kind is float:
            limits = {"low": self.minimum, "high": self.maximum}
            return check_number(self.flag, value, **{end: limit for end, limit in limits.items() if limit is not None})
        if self.kind is str and (isinstance(value, str) or not self.has_other_types):
            return check_choice(self.flag, value, self.choices) if self.choices else check_text(self.flag, value)
        return value


def option(default: Any = MISSING, *, help: str, **declaration: Any) -> Any:
    """Declare a field of a settings dataclass as an option; `declaration` are the first fields of `Option`."""
    return field(default=default, metadata={"option": Option(help, **declaration)})


def same_option(settings: type[Any], name: str, **changes: Any) -> Any:
    """Declare a field as another class declares it, but for `changes`."""
    declared = options_of(settings)[name]
    default = changes.pop("default", declared.default)
    return field(default=default, metadata={"option": replace(declared, **changes)})


def options_of(settings: type[Any]) -> Mapping[str, Option]:
    """Name -> option, for all fields of a settings class that are declared as such."""
    return _options_of(settings)  # type: ignore[arg-type]  # classes are hashable


@cache
def _options_of(settings: type[Any]) -> Mapping[str, Option]:
    hints = get_type_hints(settings)
    result = {}
    for item in fields(settings):
        if declared := item.metadata.get("option"):
            typed = _typed(declared, hints[item.name])
            metavar = {int: "N", float: "X"}.get(typed.kind, item.name.rpartition("_")[2].upper())
            result[item.name] = replace(
                typed,
                metavar=declared.metavar or metavar,
                name=item.name,
                default=item.default,
                depth=min(at for at, base in enumerate(settings.__mro__) if item.name in get_annotations(base)),
                flag=declared.flag or f"--{item.name.replace('_', '-')}",
            )
    return result


def _typed(declared: Option, hint: Any) -> Option:
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    takes_none = type(None) in members
    members = tuple(member for member in members if member is not type(None))
    kind = str if str in members else members[0]
    origin = get_origin(kind)
    if origin is Literal:
        return replace(declared, kind=str, choices=get_args(kind), takes_none=takes_none)
    is_sequence = origin is tuple or origin is Sequence
    return replace(
        declared,
        kind=get_args(kind)[0] if is_sequence else kind,
        is_sequence=is_sequence,
        takes_none=takes_none,
        has_other_types=len(members) > 1,
    )


def check_options(settings: Any) -> None:
    """Raise a `UserError` for the first option of a settings object that has a wrong type or is out of range."""
    for name, declared in options_of(type(settings)).items():
        declared.check(getattr(settings, name))


def selected(settings: type[Any], source: Any) -> dict[str, Any]:
    """The options of a settings class, with the values that another object has for them."""
    return {name: getattr(source, name) for name in options_of(settings)}


def takes_options(settings: type[Any]) -> Callable[[Function], Function]:
    """Let a function that passes its `**options` on to a settings class show them in its signature and docstring."""

    def document(function: Function) -> Function:
        signature = signature_of(function)
        own = [item for item in signature.parameters.values() if item.kind is not Parameter.VAR_KEYWORD]
        hints = get_type_hints(settings)
        keywords = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=declared.default, annotation=hints[name])
            for name, declared in options_of(settings).items()
            if name not in signature.parameters
        ]
        function.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore[attr-defined]
        lines = [f"    {item.name}: {options_of(settings)[item.name].help}" for item in keywords]
        function.__doc__ = "\n".join([getdoc(function) or "", "", "Options:", *lines])
        return function

    return document


def parse_bytes(part: str, flag: str, text: str | None = None, least: int = 0) -> int:
    """Bytes from a number with or without a unit.

    Args:
        part: such as `512MiB`.
        flag: it was given with, for messages.
        text: the whole of what was given; default: `part`.
        least: smallest number of bytes that makes sense.
    """
    text = part if text is None else text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", part, re.IGNORECASE | re.ASCII)
    if match is None or match[2].lower() not in SIZE_UNITS or len(match[1]) > MAX_DIGITS:
        known = "write ep, bytes, or" if flag == "--budget" else "write bytes, or"
        raise UserError(
            f"{flag} {text:.80}: {part!r:.60} is not a size; {known} a number with KiB, MiB, GiB, KB, MB or GB"
        )
    unit = SIZE_UNITS[match[2].lower()]
    size = int(match[1]) * unit if match[1].isdigit() else round(float(match[1]) * unit)
    if size < least:
        raise UserError(f"{flag} {text}: {part!r} must be at least one byte")
    return size
