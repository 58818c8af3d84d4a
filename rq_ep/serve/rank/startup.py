"""Starting alike on every rank: what one of them finds wrong, all of them report or none."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from rq_ep.core.errors import UserError

if TYPE_CHECKING:  # ports are bound before torch is imported
    from rq_ep.parallel import EPGroup

T = TypeVar("T")
EXIT_USER_ERROR = 2


def on_every_rank(group: "EPGroup", work: Callable[[], T]) -> T:
    """Do the work here, while every other rank does its own.

    Raises:
        UserError: on every rank, if on any of them the work found something that a user has to put right.
    """
    result, problem = attempt(work)
    agree(group, problem)
    return result  # type: ignore[return-value]


def attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of the work, or else what a user has to put right."""
    try:
        return work(), None
    except UserError as error:
        return None, str(error)


def agree(group: "EPGroup", problem: str | None) -> None:
    """Raise on every rank the first problem that any of them has."""
    problems = group.all_gather_object(problem)
    found = [(rank, text) for rank, text in enumerate(problems) if text is not None]
    if found:
        rank, text = found[0]
        raise UserError(text if len(found) == len(problems) or rank == 0 else f"rank {rank}: {text}")


def refuse(error: UserError, rank: int) -> int:
    """Say once what a user has to put right. Returns the exit status for it."""
    if rank == 0:
        print(f"rq_ep.serve: error: {error}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR
