"""The ranks of a server in one process: their experts and movers, rank 0's controller, and what HTTP shows of them.

Only who plans is a script, time is given, and faults come through wrappers of the channel, the banks and the layers.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.core.stats import ExpertStats
from rq_ep.core.strategy import Planner
from rq_ep.core.topology import Topology
from rq_ep.engine.step_agreement import StepFlags, merge
from rq_ep.formats import ExpertBuffers
from rq_ep.moe import EPExperts
from rq_ep.moe.migration.expert_mover import Migration
from rq_ep.parallel.ep_group import MessagesLost, PeerTensor
from rq_ep.parallel.local_group import LocalGroup, LocalWorld
from rq_ep.rebalancing.pace import Pace
from rq_ep.rebalancing.rebalancer import Decision, RebalanceRequest
from rq_ep.serve.http.views.rebalance_view import RebalanceView
from rq_ep.serve.messages import (
    BeginMigration,
    FromRank,
    MigrationGivenUp,
    MigrationPlanned,
    PlacementServed,
    RebalanceAnswer,
    RebalanceCommand,
    RebalanceStatus,
    decode_from_rank,
    decode_to_rank,
    encode,
)
from rq_ep.serve.rank.loads.load_totals import LoadTotals
from rq_ep.serve.rank.loads.step_loads import StepLoads
from rq_ep.serve.rank.rebalance.live_rebalancing import LiveRebalancing
from rq_ep.serve.rank.rebalance.planner_process import Answer, Request
from rq_ep.strategies import make_strategy
from tests.moe import cases
from tests.moe.test_expert_mover import FAMILY, LAYOUT, NUM_EXPERTS, NUM_RANKS, SIZES, WEIGHTS, drawn, migration, packed

BATCHES = cases.batches("distinct")  # of eight experts
NEVER = 10**9  # steps
Hook = Callable[[int, str], None]  # rank, what it is about to do


def batch_of(rank: int) -> cases.Batch:
    batch = BATCHES[rank]
    return cases.Batch(batch.hidden_TD, batch.ids_TK % NUM_EXPERTS, batch.weights_TK)


@cache
def dense(rank: int, formats: tuple[str, ...]) -> Tensor:
    """What a rank's tokens get from experts in these formats."""
    return cases.expected(FAMILY, WEIGHTS, batch_of(rank), dict(enumerate(formats)))


class Wires:
    """Connections between the movers of all ranks. One that fails is lost to both of its ends, as with gloo."""

    def __init__(self) -> None:
        pairs = [(src, dst) for src in range(NUM_RANKS) for dst in range(NUM_RANKS)]
        self._queues: dict[tuple[int, int], queue.Queue[Tensor | None]] = {pair: queue.Queue() for pair in pairs}
        self._lost: set[tuple[int, int]] = set()
        self._joined: dict[int, threading.Barrier] = {}
        self.on_message: Callable[[int, int, Tensor], Tensor] = lambda src, dst, message: message

    def send(self, src: int, dst: int, message: Tensor) -> bool:
        message = self.on_message(src, dst, message.clone())
        self._queues[src, dst].put(message)
        return (src, dst) not in self._lost

    def receive(self, src: int, dst: int, landing: Tensor) -> bool:
        message = None if (src, dst) in self._lost else self._queues[src, dst].get(timeout=20)
        if message is None or message.shape != landing.shape:
            self.lose(src, dst)
            return False
        landing.copy_(message)
        return True

    def lose(self, one: int, other: int) -> None:
        for pair in ((one, other), (other, one)):
            self._lost.add(pair)
            self._queues[pair].put(None)

    def reconnect(self, number: int) -> None:
        """Of a rank: when all have come, nothing is lost any more."""
        self._joined.setdefault(number, threading.Barrier(NUM_RANKS, self._renew)).wait(20)

    def _renew(self) -> None:
        self._lost.clear()
        for messages in self._queues.values():
            while not messages.empty():
                messages.get_nowait()


class WireEnd:
    """A rank's channel."""

    def __init__(self, wires: Wires, rank: int) -> None:
        self.rank = rank
        self._wires = wires

    def exchange(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> None:
        lost = {dst for message, dst in sends if not self._wires.send(self.rank, dst, message)}
        lost |= {src for landing, src in receives if not self._wires.receive(src, self.rank, landing)}
        if lost:
            raise MessagesLost(f"rank {self.rank}: no connection to rank {sorted(lost)}", lost)

    def reconnect(self, number: int) -> None:
        self._wires.reconnect(number)


class TappedBank:
    """A bank as a mover sees it, which says what is about to happen."""

    def __init__(self, bank: Any, hook: Callable[[str], None]) -> None:
        self._bank = bank
        self._hook = hook
        self.arriving: dict[int, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        if name in ("converted", "verify_staged", "discard_staged"):
            self._hook(name)
        return getattr(self._bank, name)

    def stage(self, expert: int, name: str) -> Tensor:
        self._hook("stage")
        buffer: Tensor = self._bank.stage(expert, name)
        self.arriving[expert] = buffer
        return buffer


class TappedLayer:
    """A layer as a mover sees it."""

    def __init__(self, layer: EPExperts, hook: Callable[[str], None]) -> None:
        self._layer = layer
        self._hook = hook
        self.family = layer.family
        self.bank = TappedBank(layer.bank, hook)

    @property
    def placement(self) -> LayerPlacement:
        return self._layer.placement

    def replace_placement(self, placement: LayerPlacement, planner: Planner) -> None:
        self._hook("commit")
        self._layer.replace_placement(placement, planner)
        self._hook("committed")


class ScriptedPlanner:
    """Answers with what it is given."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.num_asked = 0
        self.is_free = True
        self.is_closed = False

    def ask(self, request: Request) -> None:
        self.num_asked += isinstance(request, RebalanceRequest)

    def take(self) -> Answer | None:
        return self.answers.pop(0) if self.answers else None

    def kill(self, reason: str) -> None: ...

    def close(self) -> None:
        self.is_closed = True


class MovingGroup:
    """All ranks, and their steps.

    Args:
        before: the placement that serves at first.
    """

    def __init__(self, before: Placement, bytes_per_step: int | None = None) -> None:
        self.now_s = 0.0
        self.hook: Hook = lambda rank, what: None
        self.wires = Wires()
        self.planner = ScriptedPlanner()
        self.view = RebalanceView(lambda command: 0, lambda: self.now_s)
        self.answers: list[RebalanceAnswer] = []
        self.late: dict[int, list[BeginMigration]] = {}  # by rank, messages that are held back
        self.world = LocalWorld(NUM_RANKS)
        self.placements: list[list[list[Replica]]] = []
        self.answers_rounds = True  # whenever the placement has changed
        self.silent: set[int] = set()  # ranks that report nothing
        self.num_commands = 0
        self.banks: list[list[TappedBank]] = []  # of each rank, as its mover sees them
        self.on_read: Callable[[Tensor], Tensor] = lambda read: read
        self.before = before
        strategy = make_strategy("rq")
        rule = replace(strategy.rebalance_rule, window=NEVER, interval=NEVER, bytes_per_step=bytes_per_step)  # type: ignore[type-var]
        loads = StepLoads(LoadTotals(lambda: range(NUM_RANKS)))

        def planner_of(placement: LayerPlacement) -> Planner:
            return strategy.planner(placement, Topology(NUM_RANKS))

        self.layers = [
            [
                EPExperts(
                    FAMILY,
                    layer,
                    planner_of(layer),
                    group,
                    expert_buffers=ExpertBuffers(),
                    telemetry=loads if group.rank == 0 else None,
                )
                for layer in before.layers
            ]
            for group in self.world.groups
        ]
        for rank_layers in self.layers:
            for rank_layer in rank_layers:
                cases.fill(rank_layer, WEIGHTS)
        stats = ExpertStats.uniform((0, 3), NUM_EXPERTS, SIZES, "fp32")
        self.lives: list[LiveRebalancing] = []
        for rank, group in enumerate(self.world.groups):
            inputs = SimpleNamespace(
                rule=rule, strategy=strategy, stats=stats, layout=LAYOUT,
                measures_importance=False, reads_formats=False, pace=Pace(bytes_per_step),
                config=SimpleNamespace(placement_out=None),
                planner_of=lambda family, placement, members: planner_of,
                read_expert=lambda rank=rank: partial(self._read, rank),
                problem=lambda placement: PlacementProblem(
                    stats, placement.topology, (max(placement.bytes_R),) * NUM_RANKS, ("fp32", "int8")
                ),
            )  # fmt: skip
            tapped = [TappedLayer(layer, partial(self._tap, rank)) for layer in self.layers[rank]]
            self.banks.append([layer.bank for layer in tapped])
            channels = SimpleNamespace(
                rank=group.rank, members=range(NUM_RANKS), open_host_channel=lambda rank=rank: WireEnd(self.wires, rank)
            )
            self.lives.append(
                LiveRebalancing(
                    inputs,
                    SimpleNamespace(placement=before),
                    tapped,
                    channels,  # type: ignore[arg-type]
                    loads,
                    group.rank == 0,
                    partial(self._from_rank, rank),
                    lambda: None,
                    self.planner,
                    lambda: self.now_s,
                )
            )

    def _tap(self, rank: int, what: str) -> None:
        self.hook(rank, what)

    def _read(self, rank: int, layer: int, expert: int, name: str) -> Tensor:
        self.hook(rank, "read")
        return self.on_read(packed(expert, name))

    def _from_rank(self, rank: int, message: FromRank) -> None:
        """As the HTTP process does, over the wire and back."""
        message = decode_from_rank(encode(message))
        match message:
            case MigrationPlanned():
                begin = BeginMigration(message.generation, message.placement, message.rounds)
                for other, live in enumerate(self.lives):
                    if other in self.late:
                        self.late[other].append(begin)
                    else:
                        live.handle(decode_to_rank(encode(begin)))  # type: ignore[arg-type]
            case MigrationGivenUp():
                self.lives[0].handle(message)
            case RebalanceStatus():
                self.view.take(message)
            case PlacementServed():
                self.view.on_commit(message.generation)
            case RebalanceAnswer():
                self.answers.append(message)

    # What happens

    def command(self, action: str) -> RebalanceAnswer | None:
        """Have rank 0 do something; its answer, if it comes at once."""
        self.num_commands += 1
        self.lives[0].handle(RebalanceCommand(self.num_commands, action))
        self.lives[0].tick()
        return next((answer for answer in self.answers if answer.number == self.num_commands), None)

    def plan(self, after: Placement) -> Decision:
        """The decision that leads from what serves to a placement."""
        before = replace(self.before, layers=tuple(layer.placement for layer in self.layers[0]))
        rounds = migration(before, after).rounds
        return Decision(after, "better", None, 1, rounds)

    def start(self, after: Placement) -> Decision:
        """Begin to move there."""
        self.command("start")
        decision = self.plan(after)
        self.planner.answers.append(decision)
        self.lives[0].tick()
        return decision

    def agree(self) -> None:
        """What happens between two steps, on all ranks."""
        flags = [StepFlags(True, True, False, True, 0, 0, 1, False, *live.flags()) for live in self.lives]
        for live in self.lives:
            live.on_agreement(merge(flags))

    def step(self, answers: bool = False) -> None:
        """One step of the group: it answers as the dense model does, and is asked to when its placement has changed."""
        self.agree()
        self.lives[0].tick()
        rows = [[list(layer.placement.replicas) for layer in layers] for layers in self.layers]
        assert rows == [rows[0]] * NUM_RANKS, "all ranks serve the same"
        has_changed = not self.placements or rows[0] != self.placements[-1]
        if has_changed:
            self.placements.append(rows[0])
        if (has_changed and self.answers_rounds) or answers:
            self.answer_all()

    def answer_all(self) -> None:
        """Tokens of all ranks pass through the layers."""

        def forward(group: LocalGroup) -> list[Tensor]:
            batch = batch_of(group.rank)
            return [layer(batch.hidden_TD, batch.ids_TK, batch.weights_TK) for layer in self.layers[group.rank]]

        for rank, outputs in enumerate(self.world.run(forward)):
            for layer, output in zip(self.layers[rank], outputs, strict=True):
                formats = dict(sorted((one.expert, one.format) for one in layer.placement.replicas))
                torch.testing.assert_close(output, dense(rank, tuple(formats.values())), rtol=1e-4, atol=1e-4)

    def second(self) -> None:
        """A second passes in which the main threads go on, and every rank reports."""
        self.now_s += 1.0
        for rank, live in enumerate(self.lives):
            if rank not in self.silent:
                live.tick()
                self.view.on_progress(rank, live.progress())

    def state(self) -> dict[str, Any]:
        return self.view.view()

    def until_idle(self, timeout_s: float = 20.0) -> None:
        """Make steps until nothing is under way and nothing is staged."""
        end_s = time.monotonic() + timeout_s
        while self.state()["state"] != "idle" or any(self.staged_bytes_R):
            assert time.monotonic() < end_s, (self.state(), self.staged_bytes_R)
            self.step()
            time.sleep(0.0005)

    @property
    def staged_bytes_R(self) -> list[int]:
        return [sum(layer.bank.staged_bytes for layer in layers) for layers in self.layers]

    @property
    def results(self) -> dict[str, int]:
        results: dict[str, int] = self.state().get("results", {})
        return results

    def close(self) -> None:
        """End as a server does, at once."""
        start_s = time.monotonic()
        for live in self.lives:
            live.stop()
        for live in self.lives:
            live.close()
        assert time.monotonic() - start_s < 5, "no mover hangs"
        assert not any(self.staged_bytes_R)


def migration_of(decision: Decision) -> Migration:
    assert decision.placement is not None
    return Migration(1, decision.placement, decision.rounds)


def placements(seed: int) -> list[Placement]:
    """One that serves, a second one with another first layer, and a third one with another second layer."""
    one, two, three = (drawn(seed + 100 * number).layers for number in range(3))
    return [with_layers(one[0], one[1]), with_layers(two[0], one[1]), with_layers(two[0], three[1])]


def with_layers(*layers: LayerPlacement) -> Placement:
    bytes_R = tuple(bytes_by_rank(layers, NUM_RANKS, SIZES).tolist())
    return Placement(layers, "rq", Topology(NUM_RANKS), bytes_R)


def flipped(message: Tensor) -> Tensor:
    """With another first byte; the last ones of an expert, behind its checksum, mean nothing."""
    message[0] ^= 1
    return message
