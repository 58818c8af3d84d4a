"""Sizes in bytes, written with or without a unit."""

import re

from rq_ep.core.errors import UserError

UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
MAX_DIGITS = 40  # of a size; Python reads thousands, slowly


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
    if match is None or match[2].lower() not in UNITS or len(match[1]) > MAX_DIGITS:
        known = "write ep, bytes, or" if flag == "--budget" else "write bytes, or"
        raise UserError(
            f"{flag} {text:.80}: {part!r:.60} is not a size; {known} a number with KiB, MiB, GiB, KB, MB or GB"
        )
    unit = UNITS[match[2].lower()]
    size = int(match[1]) * unit if match[1].isdigit() else round(float(match[1]) * unit)
    if size < least:
        raise UserError(f"{flag} {text}: {part!r} must be at least one byte")
    return size
