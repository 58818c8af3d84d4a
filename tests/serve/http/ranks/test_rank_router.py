"""The router and the connections of ranks, over real sockets: where requests go, and who learns of an end."""

import asyncio
import queue
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import pytest

from rq_ep.engine.progress import Progress
from rq_ep.engine.requests import Output, Request, Score
from rq_ep.serve import control
from rq_ep.serve.control import ControlClient
from rq_ep.serve.frames import GREETING, HEADER, Frames, Role, make_greeting
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.ranks import rank_connections, routed_requests
from rq_ep.serve.http.ranks.group_life import GroupState
from rq_ep.serve.http.ranks.rank_router import RankRouter
from rq_ep.serve.http.ranks.routed_requests import MAX_UNREAD_OUTPUTS
from rq_ep.serve.messages import (
    Abort,
    Aborted,
    AddRequest,
    BeginMigration,
    Cancel,
    Checked,
    DrainRequest,
    Failed,
    FromRank,
    FromSupervisor,
    ImportanceReport,
    KillRank,
    Loaded,
    Mark,
    MigrationPlanned,
    Outputs,
    PromptPart,
    RankStats,
    Ready,
    RebalanceAnswer,
    RebalanceCommand,
    Recorded,
    RecordingFailed,
    Regroup,
    Regrouped,
    Stop,
    StopRank,
    Wake,
    codec,
    encode,
    request_parts,
)

TOKEN = "secret"
NUM_RANKS = 3
TIMEOUT_S = 60
READY = Ready(100, 256, [{}] * NUM_RANKS, {}, {})

T = TypeVar("T")


class FakeRank:
    """A rank that keeps the messages it gets."""

    def __init__(self, address: tuple[str, int], rank: int, token: str = TOKEN, role: Role = Role.RANK) -> None:
        self.received: queue.Queue[Any] = queue.Queue()  # None: the connection was closed
        self.client = ControlClient(address, rank, token, role)
        self.client.listen(self.received.put, lambda: self.received.put(None), self.received.put)

    async def receive(self, message_type: type[T]) -> T:
        """The next message, which is of this type."""
        message = await asyncio.to_thread(self.received.get, timeout=TIMEOUT_S)
        assert isinstance(message, message_type), message
        return message

    def send(self, message: FromRank | FromSupervisor) -> None:
        self.client.send(message)

    def send_outputs(self, *outputs: Output) -> None:
        self.send(Outputs(list(outputs)))

    def send_body(self, body: bytes) -> None:
        self.client._send(body)

    def send_bytes(self, raw: bytes) -> None:
        self.client._socket.sendall(raw)

    def die(self) -> None:
        """End without a good-bye, as a killed process does."""
        self.client._socket.shutdown(socket.SHUT_RDWR)


class Stage:
    """A router that serves, and its ranks; the router's observer."""

    def __init__(self, stall_s: float = 60.0, *, survives: bool = False) -> None:
        self.ended = asyncio.Event()
        self.ready: list[Ready] = []
        self.rebalances: list[object] = []
        self.num_ends = 0
        self.lost: list[tuple[int, bool]] = []
        self.recoveries: list[dict[str, float]] = []
        self.num_resumptions = 0
        self.router = RankRouter(NUM_RANKS, TOKEN, self, max_queue_size=4, stall_s=stall_s, survives=survives)
        self.address = ("", 0)
        self.ranks: list[FakeRank] = []

    def on_checked(self, checked: Checked) -> None: ...

    def on_ready(self, ready: Ready) -> None:
        self.ready.append(ready)

    def on_stats(self, rank: int, stats: RankStats) -> None: ...

    def on_recorded(self, result: Recorded | RecordingFailed) -> None: ...

    def on_placement(self, message: object) -> None: ...

    def on_rebalance(self, message: object) -> None:
        self.rebalances.append(message)

    def on_rank_lost(self, rank: int, was_member: bool) -> None:
        self.lost.append((rank, was_member))

    def on_recovery(self, seconds: Mapping[str, float]) -> None:
        self.recoveries.append(dict(seconds))

    def on_resumption(self) -> None:
        self.num_resumptions += 1

    def on_end(self) -> None:
        self.num_ends += 1
        self.ended.set()

    def ask(self, name: str, num_tokens: int = 10, prompt_ids: Sequence[int] = (1,)) -> asyncio.Task[list[Output]]:
        return self.ask_for(Request(name, list(prompt_ids), num_tokens - len(prompt_ids)))

    def ask_for(self, request: Request) -> asyncio.Task[list[Output]]:
        async def ask() -> list[Output]:
            return [output async for output in self.router.generate(request)]

        return asyncio.ensure_future(ask())


@asynccontextmanager
async def stage(stall_s: float, *, survives: bool = False) -> AsyncIterator[Stage]:
    it = Stage(stall_s, survives=survives)
    sock = socket.create_server(("127.0.0.1", 0))
    it.address = sock.getsockname()
    server = await it.router.listen(sock)
    it.ranks = [FakeRank(it.address, rank) for rank in range(NUM_RANKS)]
    while it.router.num_connected < NUM_RANKS:
        await asyncio.sleep(0.01)
    for number, rank in enumerate(it.ranks):
        rank.send(Loaded(("host", number)))
    await asyncio.sleep(0.05)
    it.ranks[0].send(READY)
    while it.router.why_unavailable() is not None:
        await asyncio.sleep(0.01)
    try:
        yield it
    finally:
        for rank in it.ranks:
            rank.client.close()
        server.close()
        while it.router.num_connected:
            await asyncio.sleep(0.01)


def play(scene: Callable[[Stage], Awaitable[None]], stall_s: float = 60.0, *, survives: bool = False) -> None:
    async def run() -> None:
        async with stage(stall_s, survives=survives) as it:
            await scene(it)

    asyncio.run(asyncio.wait_for(run(), 2 * TIMEOUT_S))


def test_requests_are_spread_and_everyone_is_woken() -> None:
    async def scene(it: Stage) -> None:
        tasks = []
        for number, rank in enumerate([0, 1, 2, 2]):  # the third is short, so its rank gets the fourth
            tasks.append(it.ask(f"{number}", 4 if number == 2 else 10))
            added = await it.ranks[rank].receive(AddRequest)
            assert (added.request.id, added.num_announced) == (f"{number}", number + 1)
            for other in {0, 1, 2} - {rank}:
                assert await it.ranks[other].receive(Wake) == Wake(number + 1)
        it.ranks[0].send_outputs(Output("0", [5]), Output("0", [6, 7], "length"))
        assert await tasks[0] == [Output("0", [5]), Output("0", [6, 7], "length")]
        for task in tasks[1:]:
            task.cancel()

    play(scene)


def test_scores_arrive_as_they_were_sent() -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        await it.ranks[0].receive(AddRequest)
        scored = Output("0", [5], "length", None, [Score(-0.5, [5, 2], [-0.5, -1.5])], [Score(-1.0, [], [])])
        it.ranks[0].send_outputs(scored)
        assert await task == [scored]

    play(scene)


def test_a_full_server_says_so_and_recovers() -> None:
    async def scene(it: Stage) -> None:
        tasks = [it.ask(f"{number}") for number in range(4)]
        await it.ranks[0].receive(AddRequest)
        with pytest.raises(ApiError, match="4 requests are waiting or running") as caught:
            await it.ask("one too many")
        assert caught.value.status == 429
        it.ranks[0].send_outputs(Output("0", [5], "stop"))
        await tasks[0]
        late = it.ask("late")
        await asyncio.sleep(0.05)
        for task in [*tasks[1:], late]:
            assert not task.done()
            task.cancel()

    play(scene)


def test_a_client_that_leaves_cancels() -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        await it.ranks[0].receive(AddRequest)
        task.cancel()
        assert await it.ranks[0].receive(Cancel) == Cancel("0")
        assert it.router.num_unfinished == 0

    play(scene)


def test_a_client_that_reads_too_slowly_cancels() -> None:
    async def scene(it: Stage) -> None:
        answer = it.router.generate(Request("a", [1], 10_000))
        reading = asyncio.ensure_future(anext(answer))
        await it.ranks[0].receive(AddRequest)
        it.ranks[0].send_outputs(*(Output("a", [5], None) for _ in range(MAX_UNREAD_OUTPUTS + 2)))
        await reading
        assert await it.ranks[0].receive(Cancel) == Cancel("a")
        assert it.router.num_unfinished == 0
        with pytest.raises(ApiError, match="unread"):
            _ = [output async for output in answer]

    play(scene)


def test_a_request_that_fails_on_its_rank_is_an_error() -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        await it.ranks[0].receive(AddRequest)
        it.ranks[0].send_outputs(Output("0", [], "error", "no room"))
        with pytest.raises(ApiError, match="rank 0: no room"):
            await task

    play(scene)


STATS = RankStats(0, 0, 0.0, Progress(7, 1, "gather of counts", 0.0), 0, 0.0)


@pytest.mark.slow
def test_a_rank_that_was_never_heard_ends_the_group_and_is_named() -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        watching = asyncio.ensure_future(it.router.watch())
        while not task.done():
            for rank in it.ranks[:2]:
                rank.send(STATS)
            await asyncio.sleep(0.1)
        with pytest.raises(ApiError, match=r"rank 2 has not been heard .* rank 0 waits in step 7, MoE layer 1, gather"):
            await task
        await it.ended.wait()
        await watching

    play(scene, stall_s=3.0)


@pytest.mark.slow
def test_a_rank_that_hangs_while_the_group_stops_ends_it_and_is_named() -> None:
    async def scene(it: Stage) -> None:
        watching = asyncio.ensure_future(it.router.watch())
        for rank in it.ranks:
            rank.send(STATS)
        it.ranks[0].send(DrainRequest(TIMEOUT_S))
        for rank in it.ranks:
            await rank.receive(Stop)
        it.ranks[1].client.close()
        it.ranks[2].send(STATS)
        assert "rank 0 has not been heard" in (await it.ranks[2].receive(Abort)).reason
        await watching
        assert it.router.state is GroupState.FAILED

    play(scene, stall_s=1.5)


def test_an_abort_is_no_death() -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        await it.ranks[0].receive(AddRequest)
        it.ranks[1].send(Aborted("SIGINT", was_loading=False))
        it.ranks[1].die()
        with pytest.raises(ApiError, match="shut down by a second SIGINT") as caught:
            await task
        assert caught.value.status == 503

    play(scene)


@pytest.mark.parametrize("in_time", [True, False])
def test_draining_waits_for_what_runs_and_then_stops_all(in_time: bool) -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        await it.ranks[0].receive(AddRequest)
        it.ranks[1].send(DrainRequest(TIMEOUT_S if in_time else 0.5))
        it.ranks[2].send(DrainRequest(TIMEOUT_S))  # every rank got the signal
        while it.router.state is GroupState.SERVING:
            await asyncio.sleep(0.01)
        assert it.router.why_unavailable() == "draining"
        with pytest.raises(ApiError, match="draining") as refused:
            await it.ask("late")
        assert refused.value.status == 503
        if in_time:
            it.ranks[0].send_outputs(Output("0", [5], "length"))
            await task
        else:
            with pytest.raises(ApiError, match="shut down before this request had finished"):
                await task
            await it.ranks[0].receive(Cancel)
        await it.ranks[0].receive(Stop)
        for rank in it.ranks:
            assert not it.ended.is_set()
            rank.client.close()
        await it.ended.wait()

    play(scene)


@pytest.mark.parametrize("how", ["killed", "raised"])
def test_clients_and_ranks_learn_of_a_failure(how: str) -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        await it.ranks[2].receive(Wake)
        it.ranks[0].send(Failed("connection lost", is_consequence=True))
        if how == "raised":
            it.ranks[1].send(Failed("KeyError: 3", is_consequence=False))
        it.ranks[1].die()
        culprit = "rank 1 died" if how == "killed" else "rank 1: KeyError: 3"
        with pytest.raises(ApiError, match=culprit) as caught:
            await task
        assert caught.value.status == 500
        assert culprit in (await it.ranks[2].receive(Abort)).reason
        await it.ended.wait()
        assert culprit in str(it.router.why_unavailable())

    play(scene)


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\nHost: " + b"x" * 99 + b"\r\n\r\n", b"\x00" * GREETING.size, b"\xff", b""]
)
def test_a_connection_that_is_no_rank_is_turned_away(sent: bytes) -> None:
    async def scene(it: Stage) -> None:
        reader, writer = await asyncio.open_connection(*it.address)
        writer.write(sent)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        assert it.router.why_unavailable() is None

    play(scene)


def test_a_greeting_in_another_runs_name_or_sent_again_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    greetings: list[bytes] = []

    def overheard(secret: str, rank: int, role: Role) -> tuple[bytes, bytes]:
        greeting, nonce = make_greeting(secret, rank, role)
        greetings.append(greeting)
        return greeting, nonce

    monkeypatch.setattr(control, "make_greeting", overheard)

    async def scene(it: Stage) -> None:
        other = make_greeting("another run's secret", 1)[0]
        unknown = make_greeting(TOKEN, NUM_RANKS)[0]
        as_supervisor = bytes([Role.SUPERVISOR]) + greetings[0][1:]
        for greeting in (*greetings, other, unknown, as_supervisor, greetings[0][:-1] + b"?"):
            reader, writer = await asyncio.open_connection(*it.address)
            writer.write(greeting)
            assert await reader.read() == b""
            writer.close()
        task = it.ask("0")
        await it.ranks[0].receive(AddRequest)
        it.ranks[0].send_outputs(Output("0", [5], "length"))
        assert await task == [Output("0", [5], "length")], "the ranks' own connections go on"

    play(scene)


def test_silent_strangers_are_few_and_stay_for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_connections, "MAX_UNGREETED", 3)
    monkeypatch.setattr(rank_connections, "GREETING_S", 0.5)

    async def scene(it: Stage) -> None:
        strangers = [await asyncio.open_connection(*it.address) for _ in range(5)]
        for reader, _ in strangers[:2]:  # the oldest make room for the newest
            assert await asyncio.wait_for(reader.read(), 0.3) == b""
        for reader, _ in strangers[2:]:
            assert await asyncio.wait_for(reader.read(), 5) == b""
        for _, writer in strangers:
            writer.close()
        assert it.router.why_unavailable() is None

    play(scene)


def test_a_stranger_who_sends_without_end_is_cut_off_after_the_greeting() -> None:
    async def scene(it: Stage) -> None:
        reader, writer = await asyncio.open_connection(*it.address)
        num_taken = 0
        with suppress(OSError):
            for _ in range(1000):  # 64 MB
                writer.write(b"[" * (1 << 16))
                await asyncio.wait_for(writer.drain(), TIMEOUT_S)
                num_taken += 1 << 16
            await reader.read()
        assert num_taken < 16 << 20, "what the sockets' buffers hold"
        writer.close()
        assert it.router.why_unavailable() is None

    play(scene)


@pytest.mark.parametrize("change", ["changed", "sent twice", "of a stranger", "too long"])
def test_a_frame_that_the_rank_did_not_send_ends_the_group_by_name(change: str) -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        await it.ranks[0].receive(AddRequest)
        sender, what = it.ranks[1], "sent a message whose MAC is wrong"
        if change == "changed":
            sender.send_bytes(sender.client._sent.pack(encode(STATS))[:-1] + b"]")
        elif change == "sent twice":
            frame = sender.client._sent.pack(encode(STATS))
            sender.send_bytes(frame)
            sender.send_bytes(frame)
        elif change == "of a stranger":
            sender.send_bytes(Frames("guess", bytes(16), is_to_rank=False).pack(encode(STATS)))
        else:
            what = "sent a message of 4294967295 bytes, more than"
            sender.send_bytes(b"\xff" * HEADER.size)
        with pytest.raises(ApiError, match=f"the server failed: rank 1: {what}"):
            await task

    play(scene)


def test_outputs_that_no_message_can_hold_are_the_error_of_their_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", 4000)

    async def scene(it: Stage) -> None:
        long, _ = it.ask("long"), await it.ranks[0].receive(AddRequest)
        short, _ = it.ask("short"), await it.ranks[1].receive(Wake)
        too_much = Output("long", [5], prompt_scores=[Score(-0.5, [1], [-0.5])] * 400)
        it.ranks[0].send_outputs(too_much, Output("short", [6], "length"))
        with pytest.raises(ApiError, match=r"rank 0: a message 'outputs' of .* bytes, more than 4000"):
            await long
        assert await short == [Output("short", [6], "length")]
        assert await it.ranks[0].receive(Wake) == Wake(2)
        assert await it.ranks[0].receive(Cancel) == Cancel("long"), "the rank need not go on with it"
        assert it.router.why_unavailable() is None

    play(scene)


def test_a_long_prompt_and_its_scores_travel_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", 4000)
    monkeypatch.setattr(request_parts, "PROMPT_PART_TOKENS", 500)
    prompt_ids, scores = [7] * 1100, [Score(-0.5, [1], [-0.5])] * 1099

    async def scene(it: Stage) -> None:
        task = it.ask("0", 1200, prompt_ids)
        parts = [await it.ranks[0].receive(PromptPart) for _ in range(2)]
        last = await it.ranks[0].receive(AddRequest)
        assert [*parts[0].token_ids, *parts[1].token_ids, *last.request.prompt_ids] == prompt_ids
        for at in range(0, len(scores), 100):
            it.ranks[0].send_outputs(Output("0", [], prompt_scores=scores[at : at + 100]))
        it.ranks[0].send_outputs(Output("0", [5], "length"))
        *scored, end = await task
        assert [score for output in scored for score in output.prompt_scores or []] == scores
        assert end.finish_reason == "length"

    play(scene)


def test_more_log_probabilities_of_prompts_than_can_be_held_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed_requests, "MAX_PROMPT_LOGPROBS", 100)

    async def scene(it: Stage) -> None:
        def score(num_tokens: int) -> asyncio.Task[list[Output]]:
            return it.ask_for(Request("0", [1] * num_tokens, 0, num_logprobs=4, scores_prompt=True))

        with pytest.raises(ApiError, match="21 prompt tokens with logprobs 4 are 105 log-probabilities") as refused:
            await score(21)
        assert (refused.value.status, refused.value.param) == (400, "logprobs")
        first = score(15)
        await it.ranks[0].receive(AddRequest)
        with pytest.raises(ApiError, match="other requests score 75 of 100 at once: try later") as full:
            await score(6)
        assert full.value.status == 429
        first.cancel()

    play(scene)


def test_rank_0_leaving_before_the_others_came_ends_the_wait() -> None:
    async def run() -> None:
        it = Stage()
        sock = socket.create_server(("127.0.0.1", 0))
        server = await it.router.listen(sock)
        FakeRank(sock.getsockname(), 0).client.close()
        await it.ended.wait()
        server.close()

    asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (encode(Mark(1)), "sent a message of unknown kind 'mark'"),
        (b"[" * 100_000, "sent something that is not JSON"),
    ],
)
def test_a_rank_that_sends_nonsense_ends_the_group_by_name(body: bytes, what: str) -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        await it.ranks[0].receive(AddRequest)
        it.ranks[1].send_body(body)
        with pytest.raises(ApiError, match=f"the server failed: rank 1: {what}"):
            await task
        await it.ended.wait()
        assert it.num_ends == 1

    play(scene)


def test_the_states_of_a_group_that_ends_well() -> None:
    async def scene(it: Stage) -> None:
        assert it.router.state is GroupState.SERVING
        assert it.ready == [READY]
        it.ranks[0].send(DrainRequest(TIMEOUT_S))
        await it.ranks[2].receive(Stop)
        assert it.router.state is GroupState.STOPPING
        it.ranks[1].send(READY)  # late, and without effect
        for rank in it.ranks:
            rank.client.close()
        await it.ended.wait()
        assert (it.router.state, it.num_ends) == (GroupState.ENDED, 1)

    play(scene)


def test_a_rank_killed_in_a_drain_is_named_though_the_launcher_then_signals_the_others() -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        await it.ranks[0].receive(AddRequest)
        it.ranks[0].send(DrainRequest(TIMEOUT_S))
        while it.router.state is not GroupState.DRAINING:
            await asyncio.sleep(0.01)
        it.ranks[1].die()
        while it.router.state is not GroupState.FAILING:
            await asyncio.sleep(0.01)
        it.ranks[0].send(Aborted("SIGTERM", was_loading=False))
        with pytest.raises(ApiError, match="the server failed: rank 1 died") as caught:
            await task
        assert caught.value.status == 500

    play(scene)


@pytest.mark.parametrize(
    ("num_connected", "expected"),
    [
        (3, "the server was shut down by SIGTERM to rank 0 while the model was loading"),
        (2, "while the model was loading; rank 2 had not connected yet: it may have ended first"),
    ],
)
def test_a_signal_while_loading_is_named(num_connected: int, expected: str) -> None:
    async def run() -> None:
        it = Stage()
        sock = socket.create_server(("127.0.0.1", 0))
        server = await it.router.listen(sock)
        ranks = [FakeRank(sock.getsockname(), rank) for rank in range(num_connected)]
        while it.router.num_connected < num_connected:
            await asyncio.sleep(0.01)
        ranks[0].send(Aborted("SIGTERM", was_loading=True))
        await it.ended.wait()
        assert str(it.router.why_unavailable()).endswith(expected)
        for rank in ranks:
            rank.client.close()
        server.close()

    asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))


@pytest.mark.parametrize("where", ["connection", "task"])
def test_an_error_of_the_http_process_ends_the_group_by_name(where: str) -> None:
    async def scene(it: Stage) -> None:
        def fail(*_: object) -> None:
            raise KeyError("metric")

        async def fail_later() -> None:
            fail()

        task = it.ask("0")
        await it.ranks[1].receive(Wake)
        if where == "connection":
            it.on_stats = fail  # type: ignore[method-assign]
            it.ranks[1].send(RankStats(0, 0, 0.0, Progress(1, None, None, 0.0), 0, 0.0))
        else:
            it.router.tasks.start(fail_later())
        with pytest.raises(ApiError, match="the server failed: the HTTP process: KeyError: 'metric'"):
            await task
        assert "KeyError" in (await it.ranks[1].receive(Abort)).reason
        await it.ended.wait()
        assert "KeyError" in str(it.router.why_unavailable())

    play(scene)


def test_a_migration_of_rank_0_reaches_every_rank_and_a_command_or_report_rank_0_alone() -> None:
    async def run() -> None:
        async with stage(60) as it:
            assert it.router.rebalance(RebalanceCommand(1, "start")) == 0
            assert await it.ranks[0].receive(RebalanceCommand) == RebalanceCommand(1, "start")
            it.ranks[0].send(RebalanceAnswer(1, None, None))
            it.ranks[0].send(MigrationPlanned(1, {"layers": []}, [[[], []]], {}))
            for rank in it.ranks:
                assert await rank.receive(BeginMigration) == BeginMigration(1, {"layers": []}, [[[], []]])
            assert it.rebalances == [RebalanceAnswer(1, None, None)]
            it.ranks[1].send(ImportanceReport([[0, [3], [0.5], [1]]]))
            assert await it.ranks[0].receive(ImportanceReport) == ImportanceReport([[0, [3], [0.5], [1]]])

    asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))


def regroup(generation: int, members: list[int], joining: Sequence[int] = ()) -> Regroup:
    leader = min(rank for rank in members if rank not in joining)
    return Regroup(generation, members, ("host", leader), list(joining))


@pytest.mark.parametrize("how", ["killed", "raised", "makes no sense"])
def test_a_rank_that_fails_is_left_out_and_may_connect_again(how: str) -> None:
    async def scene(it: Stage) -> None:
        task = it.ask("0")
        await it.ranks[0].receive(AddRequest)
        it.ranks[0].send_outputs(Output("0", [5]))
        if how == "killed":
            it.ranks[0].die()
        elif how == "raised":
            it.ranks[0].send(Failed("KeyError: 3", is_consequence=False))
        else:
            it.ranks[0].send_body(b"[]")
        for rank in (2, 1):
            await it.ranks[rank].receive(Wake)
            assert await it.ranks[rank].receive(Regroup) == regroup(1, [1, 2])
            assert await it.ranks[rank].receive(Wake) == Wake(1)
        rest = (await it.ranks[1].receive(AddRequest)).request
        assert (rest.id, rest.prompt_ids, rest.max_tokens) == ("0-1", [1, 5], 8)
        for rank in it.ranks[1:]:
            rank.send(Regrouped(1, {"re-form": 0.01}))
        it.ranks[1].send_outputs(Output("0-1", [6], "length"))
        assert [output.token_ids for output in await task] == [[5], [6]]
        it.ranks[0].client.close()
        it.ranks[0] = FakeRank(it.address, 0)
        it.ranks[0].send(Loaded(("host", 7)))
        for rank in (0, 1):
            messages = [message async for message in until(it.ranks[rank], Regroup)]
            assert messages[-1] == regroup(2, [0, 1, 2], [0])
        assert await it.ranks[0].receive(Wake) == Wake(2), "it has missed all so far"
        for rank in it.ranks:
            rank.send(Regrouped(2, {}))
        while it.router.membership.ranks.degradation() is not None:
            await asyncio.sleep(0.01)

    play(scene, survives=True)


async def until(rank: FakeRank, kind: type) -> AsyncIterator[object]:
    """What a rank receives until a message of a kind."""
    while True:
        message = await rank.receive(object)
        yield message
        if isinstance(message, kind):
            return


def test_a_supervisor_is_commanded_and_one_that_takes_its_place_is_let_in() -> None:
    async def scene(it: Stage) -> None:
        first = FakeRank(it.address, 2, role=Role.SUPERVISOR)
        while not it.router.membership.ranks[2].has_supervisor:
            await asyncio.sleep(0.01)
        second = FakeRank(it.address, 2, role=Role.SUPERVISOR)
        await first.receive(type(None))
        first.client.close()
        messages = [message async for message in until(it.ranks[0], Regroup)]
        assert messages == [regroup(1, [0, 1])], "the rank's process has ended with its supervisor"
        for rank in it.ranks[:2]:
            rank.send(Regrouped(1, {}))
        await it.router.remove_ranks([2], moves=False)
        await second.receive(StopRank)
        second.client.close()

    play(scene, survives=True)


@pytest.mark.slow
def test_a_rank_that_stalls_is_killed_and_the_others_go_on() -> None:
    async def scene(it: Stage) -> None:
        supervisor = FakeRank(it.address, 2, role=Role.SUPERVISOR)
        watching = asyncio.ensure_future(it.router.watch())
        for rank in it.ranks:
            rank.send(STATS)
        while it.router.membership.generation == 0:
            for rank in it.ranks[:2]:
                rank.send(STATS)
            await asyncio.sleep(0.1)
        kill = await supervisor.receive(KillRank)
        assert kill.reason.startswith("rank 2 has not been heard for 2 s (--stall-timeout)")
        for rank in it.ranks[:2]:
            assert await rank.receive(Regroup) == regroup(1, [0, 1])
            rank.send(Regrouped(1, {}))
        while not it.recoveries:
            await asyncio.sleep(0.01)
        assert it.recoveries[0]["detect"] > 1.5
        watching.cancel()
        supervisor.client.close()

    play(scene, stall_s=1.5, survives=True)


def test_supervisors_are_told_of_the_end_and_awaited() -> None:
    async def scene(it: Stage) -> None:
        supervisors = [FakeRank(it.address, rank, role=Role.SUPERVISOR) for rank in range(NUM_RANKS)]
        it.ranks[1].die()
        await it.ranks[0].receive(Regroup)
        supervisors[1].send(DrainRequest(TIMEOUT_S))
        for supervisor in supervisors:
            await supervisor.receive(Stop)
        for rank in (it.ranks[0], it.ranks[2]):
            rank.client.close()
        await asyncio.sleep(0.1)
        assert not it.ended.is_set()
        for supervisor in supervisors:
            supervisor.client.close()
        await it.ended.wait()
        assert it.router.state is GroupState.ENDED

    play(scene, survives=True)


def test_a_migration_that_was_planned_before_a_loss_is_not_begun() -> None:
    async def scene(it: Stage) -> None:
        it.ranks[2].die()
        await it.ranks[0].receive(Regroup)
        await it.ranks[0].receive(Wake)
        it.ranks[0].send(MigrationPlanned(1, {"layers": []}, [], {}))
        it.ranks[0].send(Regrouped(1, {}))
        it.ranks[0].send(MigrationPlanned(2, {"layers": []}, [], {}))
        await asyncio.sleep(0.1)
        assert it.ranks[0].received.empty(), "rank 1 does not serve yet"
        it.ranks[1].send(Regrouped(1, {}))
        assert (await it.ranks[0].receive(BeginMigration)).generation == 2

    play(scene, survives=True)
