"""Requests on their way to the ranks that are to answer them."""

import asyncio

from rq_ep.serve.http.ranks.membership import Membership
from rq_ep.serve.http.ranks.rank_connections import RankConnections
from rq_ep.serve.http.ranks.routed_requests import RoutedRequest, RoutedRequests
from rq_ep.serve.messages import AddRequest, Cancel, Wake, request_in_parts


class RequestSender:
    """Sends requests to their ranks, and wakes the other members: they may all be asleep.

    Args:
        connections: to the ranks.
        membership: of the group.
        requests: those that have not ended.
    """

    def __init__(self, connections: RankConnections, membership: Membership, requests: RoutedRequests) -> None:
        self._connections = connections
        self._membership = membership
        self._requests = requests
        self._num_announced = 0

    async def announce(self, routed: RoutedRequest) -> None:
        """Hand over a request, or the rest of it."""
        rest = routed.rest
        parts, last = request_in_parts(rest)
        for part in parts:
            self._connections.send(routed.rank, part)
            await asyncio.sleep(0)  # writing them down takes time, in which other requests go on
            if routed.id != rest.id:  # its rank is lost, and it is handed over to another one
                return
        if routed not in self._requests:  # the group has failed meanwhile, or drains
            return
        self._num_announced += 1
        add, wake = AddRequest(last, self._num_announced), Wake(self._num_announced)
        for rank in self._membership.members:
            self._connections.send(rank, add if rank == routed.rank else wake)

    def cancel(self, routed: RoutedRequest) -> None:
        """Tell its rank that nobody waits for a request any more."""
        self._connections.send(routed.rank, Cancel(routed.id))

    def wake(self) -> None:
        """Wake all members, and say how many requests there were: one that joins has missed all so far."""
        self._connections.send_all(Wake(self._num_announced), self._membership.members)
