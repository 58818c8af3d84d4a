"""Errors that a user must put right, raised on all ranks of a group together, so that none waits for another."""

import socket
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from rq_ep.core.errors import UserError
from rq_ep.parallel.ep_group import EPGroup

T = TypeVar("T")
EXIT_USER_ERROR = 2
MEET_EVERY_S = 1.0


def run_on_all_ranks(group: EPGroup | None, work: Callable[[], T]) -> T:
    """Do the work on every rank, each its own.

    Args:
        group: the ranks, all of which call this; None: this process alone.
        work: what to do here; it may raise a `UserError` on some ranks only if it has no collectives.

    Raises:
        UserError: on every rank, if the work raised one on any.
    """
    if group is None:
        return work()
    result, problem = None, None
    try:
        result = work()
    except UserError as error:
        problem = str(error)
    problems = group.all_gather_object(problem)
    for rank, text in enumerate(problems):
        if text is not None:
            of_all = len({problems[member] for member in group.members}) == 1
            raise UserError(text if of_all else f"rank {rank}: {text}")
    return result  # type: ignore[return-value]  # without a problem, it is there


def run_long_on_all_ranks(group: EPGroup | None, work: Callable[[], T]) -> T:
    """`run_on_all_ranks` for work that may take longer than a collective, and that not every rank needs as long for.

    It is done on a thread; meanwhile the ranks meet every second until all are done.
    """
    if group is None or group.size == 1:
        return work()
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    while any(group.all_gather_object(thread.is_alive())):
        thread.join(MEET_EVERY_S)

    def outcome() -> T:
        if errors:
            raise errors[0]
        return results[0]

    return run_on_all_ranks(group, outcome)


def is_first_of_node(group: EPGroup) -> bool:
    """Whether no rank below this one is on the same machine; every rank calls this."""
    names = group.all_gather_object(socket.gethostname())
    return names.index(names[group.rank]) == group.rank


def report_user_error(group: EPGroup, program: str, error: UserError) -> int:
    """Print an error that was raised on every rank once, and wait for the other members. Returns the exit status.

    Launchers end the other ranks once one has left: all leave together, the first having printed.
    """
    if group.rank == group.members[0]:
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
    group.barrier()
    return EXIT_USER_ERROR
