"""Whether ranks may leave: the rank that would lead the others is asked whether they could hold the model."""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field

from rq_ep.serve.http.ranks.membership import Membership
from rq_ep.serve.http.ranks.rank_connections import RankConnections
from rq_ep.serve.messages import CheckMembers, MembersChecked


@dataclass
class Question:
    """Whether ranks may leave; asked anew under another number whenever the members change."""

    ranks: frozenset[int]
    number: int = 0
    answer: "asyncio.Future[str | None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class RemovalChecks:
    """The questions that have no answer yet.

    Args:
        membership: of the group.
        connections: to the ranks.
    """

    def __init__(self, membership: Membership, connections: RankConnections) -> None:
        self._membership = membership
        self._connections = connections
        self._free_bytes: dict[int, int | None] = {}  # of the device of each rank
        self._questions: list[Question] = []
        self._num_asked = 0

    def note_free(self, rank: int, num_bytes: int | None) -> None:
        """Take how much memory the device of a rank has left."""
        self._free_bytes[rank] = num_bytes

    async def refusal(self, ranks: Collection[int]) -> str | None:
        """Why ranks may not leave; None: they may."""
        question = Question(frozenset(ranks))
        self._questions.append(question)
        self._ask(question)
        try:
            return await question.answer
        finally:
            self._questions.remove(question)

    def ask_again(self) -> None:
        """The members have changed: other ranks would stay, and another one may lead them."""
        for question in self._questions:
            self._ask(question)

    def take(self, message: MembersChecked) -> None:
        """Take an answer; one to a question that was asked anew is ignored."""
        for question in self._questions:
            if question.number == message.number:
                self._answer(question, message.refusal)

    def end(self, reason: str) -> None:
        """Nobody answers any more."""
        for question in self._questions:
            self._answer(question, reason)

    def _ask(self, question: Question) -> None:
        self._num_asked += 1
        question.number = self._num_asked
        staying = self._membership.staying(question.ranks)
        if staying:
            free = [self._free_bytes.get(rank) for rank in staying]
            self._connections.send(staying[0], CheckMembers(question.number, staying, free))
        else:
            self._answer(question, "no other rank is left")

    def _answer(self, question: Question, refusal: str | None) -> None:
        if not question.answer.done():
            question.answer.set_result(refusal)
