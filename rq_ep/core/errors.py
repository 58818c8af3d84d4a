"""Errors a user can cause, told in one line that names the value and what to change."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user can put right. Commands print it as one line, without a traceback, and exit with 2."""


def check_choice(what: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`; otherwise raise a `UserError` that suggests the nearest one."""
    known = list(choices)
    if value in known:
        return value
    near = get_close_matches(value, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown {what} {value!r}: {hint}choose from {', '.join(sorted(known))}")
