"""How the group of a rank starts: with all ranks, with those that are there, or alone, to join the others later."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rq_ep.config import Environment, ServeConfig
from rq_ep.parallel import TorchGroup
from rq_ep.parallel.processes.first_members import FirstMeeting
from rq_ep.parallel.processes.world import where
from rq_ep.serve.rank.early_end import EarlyEnd
from rq_ep.serve.supervisor.rank_start import HubAddress, Rejoin

log = logging.getLogger("rq_ep.serve")


class StartedGroup(NamedTuple):
    """The group, and what rank 0 has told its ranks."""

    group: TorchGroup
    hub: HubAddress | None
    problem: str | None  # why there is no hub
    joins_later: bool  # the others serve, or have begun, and can be joined
    meeting: FirstMeeting | None = None  # where ranks come that the group does not wait for; None: it waits for all


def start_group(
    config: ServeConfig, hub: HubAddress | None, problem: str | None, early_end: EarlyEnd, rejoin: Rejoin | None
) -> StartedGroup:
    """Start the group; every rank calls this.

    Args:
        config: the same on every rank.
        hub: the HTTP process, on rank 0.
        problem: why it could not be started.
        early_end: ends this process where the ranks do not meet.
        rejoin: a group that serves, which this rank joins.

    Raises:
        RendezvousError: the ranks cannot meet.
        RankFailure: another rank has failed meanwhile.
    """
    if rejoin is not None:
        return StartedGroup(_alone(config), rejoin.hub, None, True)
    if config.min_ranks is not None:
        return _with_those_there(config, config.min_ranks, hub, problem, early_end)
    with fails_after(early_end, config.rank_timeout):
        group = TorchGroup.from_environment(config.device, timeout_s=config.rank_timeout)
        hub, problem = group.all_gather_object((hub, problem))[0]
        return StartedGroup(group, hub, problem, False)


def _with_those_there(
    config: ServeConfig, min_ranks: int, hub: HubAddress | None, problem: str | None, early_end: EarlyEnd
) -> StartedGroup:
    """Begin with the ranks that are there or, where they have begun without this rank, wait until they serve."""
    with fails_after(early_end, config.rank_timeout):
        meeting = FirstMeeting(Environment.from_os(), config.rank_timeout)
    group = _alone(config)
    word, wait_s = None, config.wait_for_ranks
    assert wait_s is not None
    if group.rank == 0:
        word = {"store": group.open_store(), "hub": hub and (hub.address, hub.token), "problem": problem}
    members, word = meeting.members(min_ranks, wait_s, word)
    if group.rank == 0 and len(members) < group.size:
        log.info("the group begins with the ranks %s of %d", list(members), group.size)
    if word["hub"] is not None:
        (host, port), token = word["hub"]
        hub = HubAddress((host, port), token)
    is_late = group.rank not in members
    if not is_late:
        group.reform(1, members, tuple(word["store"]))
    elif hub is not None:
        meeting.await_invitation()
        early_end.late(hub)
    return StartedGroup(group, hub, word["problem"], is_late, meeting)


def _alone(config: ServeConfig) -> TorchGroup:
    """The group of a rank that joins others later."""
    environment = Environment.from_os()
    return TorchGroup.alone(
        environment.rank, environment.world_size, config.device, local_rank=environment.local_rank,
        timeout_s=config.rank_timeout,
    )  # fmt: skip


@contextmanager
def fails_after(early_end: EarlyEnd, timeout_s: float) -> Iterator[None]:
    """End this process unless the ranks meet in time; torch waits for ever on a stranger who holds the port."""
    text = f"the ranks have not met at {where(Environment.from_os())} within {timeout_s:g} s (--rank-timeout)"
    timer = threading.Timer(timeout_s, early_end.fail, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
