"""The ranks that serve, and changes of them, as the HTTP routes show and take them."""

from collections.abc import Collection
from typing import Any

from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.bodies.ep_bodies import RanksBody
from rq_ep.serve.http.ranks.member_states import MemberState
from rq_ep.serve.http.ranks.membership import ChangeRefused, Membership
from rq_ep.serve.http.ranks.rank_router import RankRouter


class MembershipView:
    """What `/v1/ep/ranks` and `/health` say of the ranks.

    Args:
        membership: of the group.
        router: carries changes out; None: there are none.
    """

    def __init__(self, membership: Membership, router: RankRouter | None = None) -> None:
        self._membership = membership
        self._router = router

    def degradation(self) -> str | None:
        """Why fewer ranks serve than there are; None if all do."""
        return self._membership.ranks.degradation()

    def count(self, state: str) -> int:
        """How many ranks are in a state."""
        return len(self._membership.ranks.in_state(MemberState(state)))

    def view(self) -> dict[str, Any]:
        """State, reason, times and numbers of each rank, and what has happened."""
        membership, router = self._membership, self._router
        ranks = [
            {
                "rank": rank,
                "state": record.state.value,
                "reason": record.reason,
                "since": record.since,
                "generation": record.generation,
                "num_requests": 0 if router is None else router.num_unfinished_on(rank),
                "num_failures": record.num_failures,
                "num_restarts": record.num_restarts,
            }
            for rank, record in enumerate(membership.ranks)
        ]
        return {
            "on_rank_failure": "continue" if router is not None and router.survives else "stop",
            "generation": membership.generation,
            "members": list(membership.members),
            "is_changing": membership.is_changing,
            "ranks": ranks,
            "events": list(membership.ranks.events),
        }

    async def change(self, body: RanksBody) -> dict[str, Any]:
        """Have ranks leave or come back. Returns the view.

        Raises:
            ApiError: it cannot be done; nothing is changed.
        """
        router = self._router
        if router is None or not router.survives:
            raise ApiError(409, "the ranks of this server stay: start it with --on-rank-failure continue")
        param = "add" if body.remove is None else "remove"
        ranks = body.remove or body.add or []
        self._check(ranks, param)
        try:
            if body.remove is None:
                router.add_ranks(ranks)
            else:
                await router.remove_ranks(ranks, moves=body.requests == "move")
        except ChangeRefused as refusal:
            raise ApiError(409, f"{param}: {refusal}", param) from None
        return self.view()

    def _check(self, ranks: Collection[int], param: str) -> None:
        num_ranks = len(self._membership.ranks)
        if unknown := [rank for rank in ranks if rank >= num_ranks]:
            text = f"{param}: there is no rank {unknown[0]}: the ranks are 0 to {num_ranks - 1}"
            raise ApiError(404, text, param)
