"""Errors that a user can cause: one line that names the value and what to change."""

from collections.abc import Iterable
from difflib import get_close_matches
from math import inf
from numbers import Integral

MAX_INTEGER = 2**53  # what doubles count exactly; sums of sizes and counts stay far from 64 bits
MAX_DIGITS = 100  # of a number in a text; Python takes seconds for millions
MAX_TEXT = 4096  # characters of a name, a path or a key: PATH_MAX of Linux
MAX_MISSPELT = 100  # characters of a name that is compared with the known ones, which takes time for a long one


class UserError(ValueError):
    """A mistake that the user can correct. Commands print it as one line, without a traceback, and exit with 2.

    Names out of files may hold anything: characters that do not print are written as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(char if char.isprintable() else repr(char)[1:-1] for char in message))


def check_choice(what: str, value: object, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`; otherwise raise a `UserError` that suggests the nearest one."""
    known = list(choices)
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise UserError(f"{what} {value!r:.60}: must be one of {', '.join(sorted(known))}")
    if value in known:
        return value
    near = nearest(value, known)
    hint = "" if near is None else f"did you mean {near!r}? "
    raise UserError(f"unknown {what} {value!r:.60}: {hint}choose from {', '.join(sorted(known))}")


def nearest(text: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The one of `known` that a misspelt text is likely to stand for; None: it is less like each of them."""
    near = get_close_matches(text, known, n=1, cutoff=likeness) if len(text) <= MAX_MISSPELT else []
    return near[0] if near else None


def check_integer(what: str, value: object, low: int = 0, high: int = MAX_INTEGER) -> int:
    """Return `value` if it is an integer from `low` to `high`; otherwise raise a `UserError`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{what} {value!r:.60}: must be a whole number")
    _check_range(what, int(value), low, high)
    return int(value)


def check_number(what: str, value: object, low: float = -inf, high: float = inf) -> float:
    """Return `value` if it is a finite number from `low` to `high`; otherwise raise a `UserError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -inf < value < inf:
        raise UserError(f"{what} {value!r:.60}: must be a number")
    _check_range(what, value, low, high)
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{what} {value!r:.60}: is too large") from None


def check_text(what: str, value: object) -> str:
    """Return `value` if it is text of one line that is not empty; otherwise raise a `UserError`."""
    if not isinstance(value, str) or not value:
        raise UserError(f"{what} {value!r:.60}: must be text")
    if len(value) > MAX_TEXT:
        raise UserError(f"{what} {value!r:.60}: has {len(value)} characters, at most {MAX_TEXT} are taken")
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise UserError(f"{what} {value!r:.60}: must be without control characters")
    return value


def _check_range(what: str, value: float, low: float, high: float) -> None:
    if value < low:
        raise UserError(f"{what} {value!s:.60}: must be at least {low}")
    if value > high:
        raise UserError(f"{what} {value!s:.60}: must be at most {high}")
