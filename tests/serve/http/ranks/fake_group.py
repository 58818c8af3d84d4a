"""A group of ranks without processes: a model whose tokens are known, on ranks that die and come back at random."""

import asyncio
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from rq_ep.engine.requests import Output, Request, RoutedExperts, Score
from rq_ep.serve.frames import Role
from rq_ep.serve.http.ranks.member_states import MemberState
from rq_ep.serve.http.ranks.membership import ChangeRefused
from rq_ep.serve.http.ranks.rank_connections import RankState
from rq_ep.serve.http.ranks.rank_router import RankRouter
from rq_ep.serve.messages import (
    AddRequest,
    Cancel,
    CheckMembers,
    FromRank,
    FromSupervisor,
    ImageData,
    Loaded,
    MembersChecked,
    Outputs,
    PromptPart,
    RankEnded,
    RankStarted,
    RankStats,
    Ready,
    Recorded,
    RecordingFailed,
    Regroup,
    Regrouped,
    StartRank,
    StopRank,
    ToRank,
    ToSupervisor,
    images_of,
)

TOKEN = "secret"
END_TOKEN = 0
SCORES_IN_A_PART = 3


def next_token(ids: list[int], seed: int) -> int:
    """The token that follows others; one in twenty ends an answer."""
    chance = random.Random(f"{seed} {len(ids)} {sum(ids)}")
    return END_TOKEN if chance.random() < 0.05 else chance.randrange(97, 123)


def score_of(ids: list[int]) -> Score:
    """The score of the last token after the others."""
    return Score(-(sum(ids) % 64) / 8, [ids[-1], 33], [-0.5, -0.25])


def answer(request: Request, num_scored: int = 0) -> Iterator[Output]:
    """What a rank makes of a request, one output a step."""
    ids = list(request.prompt_ids)
    if request.scores_prompt:
        scores = [score_of(ids[:end]) for end in range(2, len(ids) + 1)]
        for start in range(0, max(len(scores), 1), SCORES_IN_A_PART):
            is_all = request.max_tokens == 0 and start + SCORES_IN_A_PART >= len(scores)
            part = scores[start : start + SCORES_IN_A_PART]
            yield Output(request.id, [], "length" if is_all else None, prompt_scores=part)
    for at in range(request.max_tokens):
        ids.append(next_token(ids, request.sampling.seed))
        ends_itself = ids[-1] == END_TOKEN and not request.ignore_eos
        reason = "stop" if ends_itself else "length" if at == request.max_tokens - 1 else None
        scores = [] if request.num_logprobs is None else [score_of(ids)]
        routed = None
        if request.routed_from is not None:  # the experts of a token are the token
            rows = ids[request.routed_from if at == 0 else -2 : -1]
            routed = RoutedExperts([len(rows), 1, 1], "|u1", bytes(rows).hex())
        yield Output(request.id, ids[-1:], reason, scores=scores, queued_s=None if at else 0.0, routed=routed)
        if reason is not None:
            return


@dataclass
class FakeProcess:
    """The process of a rank: what it was asked, and what it has sent that has not arrived."""

    is_serving: bool
    parts: dict[str, list[PromptPart | ImageData]] = field(default_factory=dict)
    running: dict[str, Iterator[Output]] = field(default_factory=dict)
    taken: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    sent: deque[FromRank] = field(default_factory=deque)

    def take(self, message: ToRank) -> None:
        match message:
            case PromptPart() | ImageData():
                self.parts.setdefault(message.id, []).append(message)
            case AddRequest():
                parts = self.parts.pop(message.request.id, [])
                begun = [token for part in parts if isinstance(part, PromptPart) for token in part.token_ids]
                images = images_of([part for part in parts if isinstance(part, ImageData)])
                request = replace(message.request, prompt_ids=begun + message.request.prompt_ids, images=images)
                self.taken.append(request)
                self.running[request.id] = answer(request)
            case Cancel():
                self.cancelled.append(message.id)
                self.running.pop(message.id, None)
            case Regroup():
                self.is_serving = False
                self.sent.append(Regrouped(message.generation, {"re-form": 0.01, "re-home": 0.02}))
                self.is_serving = True

    def step(self) -> None:
        """Give one output of each request."""
        outputs = [output for running in self.running.values() if (output := next(running, None)) is not None]
        for output in outputs:
            if output.finish_reason is not None:
                self.running.pop(output.request_id)
        if outputs:
            self.sent.append(Outputs(outputs))


class FakeGroup:
    """The connections of a router, with the ranks behind them; the router's observer.

    Args:
        num_ranks: size of the group.
        router: of so many ranks, with another observer; None: one of its own.
    """

    def __init__(self, num_ranks: int, router: RankRouter | None = None) -> None:
        self.router = router or RankRouter(num_ranks, TOKEN, self, max_queue_size=100, stall_s=60, survives=True)
        for name in ("send", "send_all", "send_supervisor", "mute", "drop", "num_open", "in_state"):
            setattr(self.router._connections, name, getattr(self, name))
        self.processes: list[FakeProcess | None] = [FakeProcess(True) for _ in range(num_ranks)]
        self.commands: list[tuple[int, ToSupervisor]] = []
        self.sent: list[tuple[int, ToRank]] = []
        self.num_resumptions = 0
        self.num_losses = 0
        self.recoveries: list[dict[str, float]] = []
        self.has_ended = False
        self.num_needed = 1  # ranks that can hold the model
        self.answers_checks = True
        for rank in range(num_ranks):
            self.router.on_connect(rank, Role.RANK)
            self.router.on_connect(rank, Role.SUPERVISOR)
            self.router.on_message(rank, Loaded(("host", 1000 + rank), 7))
        self.router.on_message(0, Ready(1000, 256, [{}] * num_ranks, {}, {}))

    # The connections

    def num_open(self, *roles: Role) -> int:
        return sum(process is not None for process in self.processes)

    def in_state(self, state: RankState, role: Role = Role.RANK) -> list[int]:
        return []

    def send(self, rank: int, message: ToRank) -> None:
        self.sent.append((rank, message))
        if isinstance(message, CheckMembers) and self.processes[rank] is not None:
            refusal = None if len(message.members) >= self.num_needed else "7 bytes are missing"
            answer = MembersChecked(message.number, refusal)
            if self.answers_checks:
                asyncio.get_running_loop().call_soon(self.router.on_message, rank, answer)
        elif (process := self.processes[rank]) is not None:
            process.take(message)

    def send_all(self, message: ToRank, ranks: Iterable[int] | None = None) -> None:
        for rank in range(len(self.processes)) if ranks is None else ranks:
            self.send(rank, message)

    def send_supervisor(self, rank: int, message: ToSupervisor) -> None:
        self.commands.append((rank, message))
        match message:
            case StopRank() if self.processes[rank] is not None:
                self.processes[rank] = None
                asyncio.get_running_loop().call_soon(self.router.on_leave, rank, Role.RANK)
            case StartRank():
                asyncio.get_running_loop().call_soon(self.start, rank, 1)

    def mute(self, rank: int) -> None: ...

    def drop(self, rank: int) -> None: ...

    # The observer

    def on_checked(self, checked: object) -> None: ...

    def on_ready(self, ready: Ready) -> None: ...

    def on_stats(self, rank: int, stats: RankStats) -> None: ...

    def on_recorded(self, result: Recorded | RecordingFailed) -> None: ...

    def on_rebalance(self, message: object) -> None: ...
    def on_placement(self, message: object) -> None: ...

    def on_rank_lost(self, rank: int, was_member: bool) -> None:
        self.num_losses += was_member

    def on_recovery(self, seconds: Mapping[str, float]) -> None:
        self.recoveries.append(dict(seconds))

    def on_resumption(self) -> None:
        self.num_resumptions += 1

    def on_end(self) -> None:
        self.has_ended = True

    # What happens

    def process(self, rank: int) -> FakeProcess:
        process = self.processes[rank]
        assert process is not None
        return process

    def supervisor(self, rank: int, message: FromSupervisor) -> None:
        self.router.on_supervisor_message(rank, message)

    def start(self, rank: int, num_restarts: int) -> None:
        """Start the process of a rank, which loads the model."""
        self.supervisor(rank, RankStarted(num_restarts))
        self.processes[rank] = FakeProcess(False)
        self.router.on_connect(rank, Role.RANK)
        self.router.on_message(rank, Loaded(("host", 1000 + rank)))

    def deliver(self, rank: int) -> None:
        """Have what a rank has sent arrive."""
        process = self.processes[rank]
        while process is not None and process is self.processes[rank] and process.sent:
            self.router.on_message(rank, process.sent.popleft())

    def step(self, rank: int) -> None:
        """Have a rank make a step, the outputs of which arrive."""
        process = self.processes[rank]
        if process is not None and process.is_serving:
            process.step()
        self.deliver(rank)

    def kill(self, rank: int, *, loses_messages: bool = False, is_supervisor_first: bool = False) -> None:
        """Kill a rank; what it has sent may be lost, or arrives before the end of its connection."""
        process = self.process(rank)
        if not loses_messages:
            self.deliver(rank)
        self.processes[rank] = None
        ends = [
            lambda: self.router.on_loss(rank, f"rank {rank} died"),
            lambda: self.supervisor(rank, RankEnded("was killed by SIGKILL")),
        ]
        for end in reversed(ends) if is_supervisor_first else ends:
            end()
        assert process is not self.processes[rank]

    @property
    def serving(self) -> list[int]:
        return [rank for rank in self.router.membership.open_ranks if self.processes[rank] is not None]


async def run_at_random(group: FakeGroup, chance: random.Random, tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """Have ranks step, die, leave and come back at random until all tasks are done."""
    tasks = list(tasks)
    for turn in range(100_000):
        await asyncio.sleep(0)
        if all(task.done() for task in tasks):
            return
        rank = chance.randrange(len(group.processes))
        process = group.processes[rank]
        event = chance.random()
        if turn > 2000:  # nobody dies for ever
            event = 1.0
        if process is None:
            if event > 0.5 and group.router.membership.ranks[rank].state is not MemberState.REMOVED:
                group.start(rank, 1)
            elif event > 0.3 and group.router.membership.ranks[rank].state is MemberState.REMOVED:
                group.router.add_ranks([rank])
        elif event < 0.08 and len(set(group.serving) - {rank}) > 0:
            process.step() if chance.random() < 0.5 else None
            group.kill(rank, loses_messages=chance.random() < 0.5, is_supervisor_first=chance.random() < 0.5)
        elif event < 0.1 and len(set(group.serving) - {rank}) > 0 and rank in group.serving:
            with suppress(ChangeRefused):  # as the ranks have changed meanwhile
                await group.router.remove_ranks([rank], moves=chance.random() < 0.5)
        elif event < 0.25:
            for leaving in group.router.membership.leaving:
                group.router._changes._note_drained(leaving)
        else:
            group.step(rank)
    raise AssertionError("the requests have not ended")
