"""Ranks that go on without another one, as threads: who waits for whom, what they hold, and what they say."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.core.stats import ExpertStats
from rq_ep.engine.step_loop import GroupNumbers
from rq_ep.model.load.memory import available_bytes, free_bytes, spare_bytes
from rq_ep.parallel.ep_group import PeerLost
from rq_ep.rebalancing.pace import Pace
from rq_ep.serve.messages import (
    BeginMigration,
    CannotContinue,
    CheckMembers,
    FromRank,
    MembersChecked,
    PeerUnreachable,
    Regroup,
    Regrouped,
)
from rq_ep.serve.rank.loads.load_recorders import LoadRecorders
from rq_ep.serve.rank.rebalance.group_mover import GroupMover
from rq_ep.serve.rank.rebalance.live_rebalancing import GroupChange
from rq_ep.serve.rank.recovery import group_recovery
from rq_ep.serve.rank.recovery.group_recovery import GroupRecovery
from rq_ep.serve.rank.recovery.recovery_plan import within_memory
from tests.moe.test_expert_mover import NUM_EXPERTS, NUM_RANKS, SIZES, Channel, Layer, Wires, packed, placed

STORE = ("127.0.0.1", 1)
STATS = ExpertStats.uniform((0, 3), NUM_EXPERTS, SIZES, "fp32")
# Expert e is on rank e mod 3, and the even ones on the next rank too.
BEFORE = placed(
    [[Replica((e + copy) % NUM_RANKS, e, "fp32") for e in range(NUM_EXPERTS) for copy in range(2 - e % 2)]] * 2
)
WITHOUT_SPARES = placed([[Replica(e % NUM_RANKS, e, "fp32") for e in range(NUM_EXPERTS)]] * 2)


class World:
    """What the ranks share: the values of each collective of each generation."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.values: dict[Any, dict[int, Any]] = {}
        self.dead: set[int] = set()

    def gather(self, key: Any, members: Sequence[int], rank: int, value: Any, is_over: Callable[[], bool]) -> list[Any]:
        with self.changed:
            values = self.values.setdefault(key, {})
            values[rank] = value
            self.changed.notify_all()
            is_there = lambda: set(members) <= values.keys()  # noqa: E731
            assert self.changed.wait_for(lambda: is_there() or is_over() or self.dead & set(members), 20)
            if not is_there():
                raise PeerLost(f"rank {rank}: another rank has ended")
            return [values.get(other) for other in range(NUM_RANKS)]


class Group:
    """A rank's side of them, with what `TorchGroup` has for changes of its members."""

    size = NUM_RANKS
    device = torch.device("cpu")

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank
        self.members: tuple[int, ...] = tuple(range(NUM_RANKS))
        self.generation, self.aborted_below, self.num_calls = 0, 0, 0
        self.on_call: Callable[[int], None] = lambda number: None

    def abort(self, below: int) -> None:
        with self.world.changed:
            self.aborted_below = max(self.aborted_below, below)
            self.world.changed.notify_all()

    def reform(self, generation: int, members: Sequence[int], store: object, is_superseded: Callable[[], bool]) -> None:
        self.members, self.generation, self.num_calls = tuple(members), generation, 0
        self._gather("form", None, is_superseded)

    def all_gather_object(self, value: Any) -> list[Any]:
        return self._gather("object", value)

    def gather_ints(self, values: Sequence[int], operation: str) -> list[list[int]]:
        return [list(row) for row in self._gather(operation, values) if row is not None]

    def _gather(self, what: str, value: Any, is_superseded: Callable[[], bool] = lambda: False) -> list[Any]:
        self.num_calls += 1
        self.on_call(self.num_calls)
        key = self.generation, self.num_calls, what
        return self.world.gather(
            key, self.members, self.rank, value, lambda: is_superseded() or self.generation < self.aborted_below
        )


class ServingLayer(Layer):
    """A layer that notes what recorder it has, and that a step of it was cut off."""

    telemetry: Any = None
    num_discarded = 0

    def record_with(self, telemetry: Any) -> None:
        self.telemetry = telemetry

    def join(self) -> None:
        pass

    def discard_step(self) -> None:
        self.num_discarded += 1


class Rank:
    """A rank with its experts and its recovery."""

    def __init__(self, world: World, wires: Wires, rank: int, before: Placement, budget: int, can_read: bool) -> None:
        self.group = Group(world, rank)
        self.layers = [ServingLayer(rank, layer) for layer in before.layers]
        self.sent: list[FromRank] = []
        self.changes: list[GroupChange] = []
        self.marks: list[tuple[int, bool]] = []  # at each change, and whether this rank leads
        self.result: GroupNumbers | Exception | None = None
        home = replace(before, budget_bytes_R=(budget,) * NUM_RANKS)

        def read(layer: int, expert: int, name: str) -> Any:
            if not can_read:
                raise UserError("model.safetensors: was written to")
            return packed(expert, name)

        planner_of: Any = lambda layer: None  # noqa: E731
        mover = GroupMover(
            self.layers, Channel(wires, rank), planner_of, read, False, Pace(),  # type: ignore[arg-type]
            lambda: None, lambda generation, reason: None,
        )  # fmt: skip
        self.mover = mover
        inputs: Any = SimpleNamespace(
            config=SimpleNamespace(placement="placement.json"), strategy=SimpleNamespace(serves_replicas=True),
            stats=STATS, room_bytes=SIZES["fp32"],
            problem=lambda home, counts: PlacementProblem(STATS, home.topology, home.budget_bytes_R, ("fp32",)),
        )  # fmt: skip
        moves: Any = SimpleNamespace(
            mover=mover, planner_of=planner_of, regroup=lambda change, counts_LE: self.changes.append(change)
        )
        recording: Any = SimpleNamespace(regroup=lambda mark, leads: self.marks.append((mark, leads)))
        self.loads = LoadRecorders(lambda: self.group.members, survives=True, rebalances=False)
        group, layers = self.group, self.layers
        self.recovery = GroupRecovery(
            group, layers, home, moves, inputs, self.loads, recording, self.sent.append, timeout_s=0.3,  # type: ignore[arg-type]
        )  # fmt: skip

    def recover(self, numbers: GroupNumbers, error: PeerLost | None) -> None:
        try:
            self.result = self.recovery(error, numbers)
        except Exception as error:
            self.result = error


def survivors(budget: int, can_read: bool = True, before: Placement = BEFORE) -> list[Rank]:
    world, wires = World(), Wires()
    return [Rank(world, wires, rank, before, budget, can_read) for rank in (0, 1)]


def run(ranks: Sequence[Rank], error: PeerLost | None = PeerLost("cut off")) -> None:  # noqa: B008
    threads = [
        threading.Thread(target=rank.recover, args=(GroupNumbers(0, 2 * rank.group.rank, 5 + rank.group.rank), error))
        for rank in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    for rank in ranks:
        rank.mover.close()


def held(rank: Rank) -> list[list[Replica]]:
    return [list(layer.placement.replicas) for layer in rank.layers]


@pytest.mark.parametrize("error", [PeerLost("cut off"), None])
def test_what_only_the_lost_rank_held_is_read_and_all_agree(error: PeerLost | None) -> None:
    ranks = survivors(budget=12 * SIZES["fp32"])
    ranks[1].mover.begin(
        BeginMigration(7, json.loads(json.dumps(BEFORE.to_dict())), [])
    )  # the other one was not told any more
    for rank in ranks:
        rank.recovery.announce(Regroup(1, [0, 1], STORE, []))
    run(ranks, error)
    assert {layer.num_discarded for rank in ranks for layer in rank.layers} == {int(error is not None)}
    assert [rank.result for rank in ranks] == [GroupNumbers(1, 2, 5), GroupNumbers(1, 2, 6)], "the newest mark"
    assert held(ranks[0]) == held(ranks[1])
    for replicas in held(ranks[0]):
        assert {one.rank for one in replicas} == {0, 1}
        assert {one.expert for one in replicas} == set(range(NUM_EXPERTS))
    for rank in ranks:
        assert [type(message) for message in rank.sent] == [Regrouped]
        ((change,), leads) = rank.changes, rank.group.rank == 0
        assert (change.members, change.leader, rank.marks) == ((0, 1), 0, [(2, leads)])
        assert change.migration == 7 + 2
        assert all(layer.telemetry is not None for layer in rank.layers)
        assert [layer.telemetry is rank.loads.totals for layer in rank.layers] == [leads] * 2
        assert change.placement.bytes_R[2] == 0


def test_a_newer_membership_starts_the_recovery_over() -> None:
    ranks = survivors(budget=24 * SIZES["fp32"])
    first = ranks[0]

    def die(number: int) -> None:
        """Rank 1 is lost while the experts move."""
        if ranks[1].group.generation == 1 and number == 4:
            first.recovery.announce(Regroup(2, [0], STORE, []))
            raise RuntimeError("killed")

    ranks[1].group.on_call = die
    for rank in ranks:
        rank.recovery.announce(Regroup(1, [0, 1], STORE, []))
    run(ranks)
    assert isinstance(ranks[1].result, RuntimeError)
    assert first.result == GroupNumbers(2, 0, 5)
    assert [change.migration for change in first.changes] == [4], "1 and 2 were those of the first try"
    for replicas in held(first):
        assert [(one.rank, one.expert) for one in replicas] == [(0, expert) for expert in range(NUM_EXPERTS)]
    assert [type(message) for message in first.sent] == [Regrouped]


@pytest.mark.parametrize(
    ("budget", "can_read", "reason"),
    [(4, True, "bytes are missing"), (24, False, "model.safetensors: was written to")],
    ids=["too few bytes", "no checkpoint"],
)
def test_members_that_cannot_hold_the_model_say_why(
    budget: int, can_read: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_recovery, "END_TIMEOUT_S", 0.0)
    ranks = survivors(budget * SIZES["fp32"], can_read, WITHOUT_SPARES)
    for rank in ranks:
        rank.recovery.announce(Regroup(1, [0, 1], STORE, []))
    run(ranks)
    for rank in ranks:
        assert isinstance(rank.result, UserError)
        (message,) = rank.sent
        assert isinstance(message, CannotContinue)
        assert reason in message.reason


def test_a_rank_says_beforehand_whether_it_and_others_could_hold_the_model() -> None:
    for budget, reason in ((12, None), (4, "the ranks that are left (2) cannot hold every expert")):
        rank, _ = survivors(budget * SIZES["fp32"], before=WITHOUT_SPARES)
        rank.recovery.check(CheckMembers(3, [0, 1], [None, None]))
        (answer,) = rank.sent
        assert isinstance(answer, MembersChecked)
        assert (answer.number, answer.refusal is None) == (3, reason is None)
        assert reason is None or f"{reason}: {4 * SIZES['fp32']} bytes are missing" in str(answer.refusal)
        assert held(rank) == [list(layer.replicas) for layer in WITHOUT_SPARES.layers], "nothing has moved"
        rank.mover.close()


def test_a_rank_that_nobody_tells_of_new_members_asks_for_them_and_ends() -> None:
    rank, _ = survivors(budget=24 * SIZES["fp32"])
    run([rank])
    assert isinstance(rank.result, PeerLost)
    assert rank.sent == [PeerUnreachable("cut off")]


def test_where_nobody_has_set_a_budget_members_may_fill_half_of_the_memory_that_is_left() -> None:
    cpu = torch.device("cpu")
    spare, memory = spare_bytes(free_bytes(cpu), cpu, 2), available_bytes(cpu)
    assert spare is not None
    assert memory is not None
    assert 0 < spare < memory / 4
    assert within_memory(replace(BEFORE, bytes_R=(1000, 0, 1000)), {0: 500, 1: 700}) == (1500, 700, 1000)
