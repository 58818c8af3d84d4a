"""Which rank serves a new request."""

from collections.abc import Sequence


def least_loaded(loads_R: Sequence[int]) -> int:
    """The rank whose unfinished requests may come to the fewest tokens; the lowest number among equals.

    Args:
        loads_R: [R] tokens (prompt and allowed answer) of the unfinished requests of each rank.
    """
    return min(range(len(loads_R)), key=lambda rank: loads_R[rank])
