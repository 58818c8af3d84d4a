"""Migrations beside the steps of a group: all ranks serve the same replicas in every step, whatever fails."""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.core.topology import Topology
from rq_ep.formats import ExpertLayout, WeightFormat, get_format, is_intact
from rq_ep.moe.integrity import DamagedExpert
from rq_ep.moe.migration.expert_mover import ExpertMover, Migration, MigrationEnd, MoverFlags
from rq_ep.parallel.ep_group import MessagesLost, PeerTensor
from rq_ep.rebalancing.pace import Pace
from rq_ep.solver.migration.move_rounds import move_rounds
from tests.moe import cases

FAMILY = cases.FAMILIES["gated"]
LAYOUT: ExpertLayout = FAMILY.layout
SIZES = {name: get_format(name).nbytes(LAYOUT) for name in ("fp32", "int8")}
NUM_EXPERTS, NUM_RANKS = 6, 3
ROOM = 3 * SIZES["fp32"]
UNBOUNDED = Pace()
WEIGHTS = cases.expert_weights(FAMILY, NUM_EXPERTS)


def packed(expert: int, name: str) -> Tensor:
    return get_format(name).pack(WEIGHTS[expert], LAYOUT)


class Wires:
    """Messages between the threads of all ranks, in the order in which they were sent."""

    def __init__(self) -> None:
        self._queues: dict[tuple[int, int], queue.Queue[Tensor]] = {
            (src, dst): queue.Queue() for src in range(NUM_RANKS) for dst in range(NUM_RANKS)
        }
        self.num_bytes = 0
        self.broken: set[frozenset[int]] = set()  # pairs of ranks
        self.joined: dict[int, threading.Barrier] = {}  # by the number of new connections
        self.on_message: Callable[[Tensor], Tensor] = lambda message: message
        self.on_send: Callable[[int, Tensor], None] = lambda src, message: None

    def send(self, src: int, dst: int, message: Tensor) -> None:
        self.num_bytes += message.nbytes
        self.on_send(src, message)
        self._queues[src, dst].put(self.on_message(message.clone()))

    def receive(self, src: int, dst: int) -> Tensor:
        return self._queues[src, dst].get(timeout=20)

    @property
    def are_empty(self) -> bool:
        return all(one.empty() for one in self._queues.values())


class Channel:
    """A rank's end of the wires."""

    def __init__(self, wires: Wires, rank: int) -> None:
        self.rank = rank
        self._wires = wires

    def exchange(self, sends: Sequence[PeerTensor], receives: Sequence[PeerTensor]) -> None:
        lost = {peer for _, peer in (*sends, *receives) if {self.rank, peer} in self._wires.broken}
        for message, dst in sends:
            if dst not in lost:
                self._wires.send(self.rank, dst, message)
        for landing, src in receives:
            if src in lost:
                continue
            message = self._wires.receive(src, self.rank)
            assert message.shape == landing.shape, "both ends disagree on the messages"
            landing.copy_(message)
        if lost:
            raise MessagesLost(f"rank {self.rank}: no connection to rank {sorted(lost)}", lost)

    def reconnect(self, number: int) -> None:
        made = threading.Barrier(NUM_RANKS, self._wires.broken.clear)
        try:
            self._wires.joined.setdefault(number, made).wait(1.0)
        except threading.BrokenBarrierError:
            raise MessagesLost(f"rank {self.rank}: not all have come", range(NUM_RANKS)) from None


class Bank:
    """As `ExpertBank`, without arithmetic."""

    layout = LAYOUT

    def __init__(self, rank: int, replicas: Replicas) -> None:
        self.rank = rank
        self.held = {one.expert: (one.format, packed(one.expert, one.format)) for one in replicas if one.rank == rank}
        self.staged: dict[int, tuple[str, Tensor]] = {}
        self.fails = False
        self.converts = True

    @property
    def held_bytes(self) -> int:
        return sum(buffer.nbytes for _, buffer in self.held.values())

    @property
    def staged_bytes(self) -> int:
        return sum(buffer.nbytes for _, buffer in list(self.staged.values()))  # while a thread stages more

    def stage(self, expert: int, name: str) -> Tensor:
        buffer = torch.zeros(SIZES[name], dtype=torch.uint8)
        self.staged[expert] = (name, buffer)
        return buffer

    def converted(self, expert: int, name: str) -> Tensor:
        if self.fails:
            raise RuntimeError("the weights cannot be read")
        own, buffer = self.held[expert]
        assert own == name or self.converts
        return buffer if own == name else packed(expert, name)

    def format_of(self, expert: int) -> WeightFormat:
        return get_format(self.held[expert][0])

    def verify_staged(self, expert: int) -> None:
        if not is_intact(self.staged[expert][1]):
            raise DamagedExpert(f"expert {expert} arrived damaged")

    def discard_staged(self) -> None:
        self.staged.clear()

    def commit(self, replicas: Replicas) -> None:
        wanted = {one.expert: one.format for one in replicas if one.rank == self.rank}
        new = {}
        for expert, name in wanted.items():
            held = self.held.get(expert)
            new[expert] = held if held is not None and held[0] == name else self.staged.pop(expert)
            assert new[expert][0] == name
            assert torch.equal(new[expert][1], packed(expert, name)), "what serves is whole"
        self.held = new


class Layer:
    def __init__(self, rank: int, placement: LayerPlacement) -> None:
        self.placement = placement
        self.bank = Bank(rank, placement.replicas)

    def replace_placement(self, placement: LayerPlacement, planner: Any) -> None:
        self.bank.commit(placement.replicas)
        self.placement = placement


class Group:
    """All ranks in one process, and their steps."""

    def __init__(self, before: Placement, pace: Pace = UNBOUNDED, reads_formats: bool = False) -> None:
        self.wires = Wires()
        self.ends: list[tuple[int, int, MigrationEnd]] = []
        self.reasons: list[str] = []
        self.woken = [threading.Event() for _ in range(NUM_RANKS)]
        self.layers = [[Layer(rank, layer) for layer in before.layers] for rank in range(NUM_RANKS)]
        self.movers = [
            ExpertMover(
                self.layers[rank],  # type: ignore[arg-type]
                Channel(self.wires, rank),
                lambda placement: None,  # type: ignore[arg-type,return-value]
                lambda layer, expert, name: packed(expert, name),
                reads_formats=reads_formats,
                pace=pace,
                wake=self.woken[rank].set,
                on_end=lambda generation, end, reason, rank=rank: self.end(rank, generation, end, reason),  # type: ignore[misc]
            )
            for rank in range(NUM_RANKS)
        ]
        self.served: list[list[list[Replica]]] = []  # replicas of each layer, each time they change
        self.max_staged_R = [0] * NUM_RANKS
        self.max_held_R = [0] * NUM_RANKS  # with what has arrived

    def end(self, rank: int, generation: int, end: MigrationEnd, reason: str) -> None:
        self.ends.append((rank, generation, end))
        self.reasons += [reason] if reason else []

    def begin(self, migration: Migration, ranks: Sequence[int] = range(NUM_RANKS)) -> None:
        for rank in ranks:
            self.movers[rank].begin(migration)

    def step(self, is_idle: bool = False) -> None:
        for rank, layers in enumerate(self.layers):  # what is about to be committed has arrived in full
            held_bytes = sum(layer.bank.held_bytes + layer.bank.staged_bytes for layer in layers)
            self.max_held_R[rank] = max(self.max_held_R[rank], held_bytes)
        flags = [mover.flags for mover in self.movers]
        staged, failed = min(one.staged for one in flags), max(one.failed for one in flags)
        for mover in self.movers:
            mover.between_steps(staged, failed, is_idle)
        per_rank = [[list(layer.placement.replicas) for layer in layers] for layers in self.layers]
        assert per_rank == [per_rank[0]] * NUM_RANKS, "all ranks serve the same in every step"
        if not self.served or per_rank[0] != self.served[-1]:
            self.served.append(per_rank[0])
        for rank, layers in enumerate(self.layers):
            staged_bytes = sum(layer.bank.staged_bytes for layer in layers)
            self.max_staged_R[rank] = max(self.max_staged_R[rank], staged_bytes)

    def run(self, generation: int, timeout_s: float = 20.0) -> MigrationEnd:
        """Make steps until the migration has ended on all ranks; how it did."""
        end_s = time.monotonic() + timeout_s
        while len(ends := [end for _, number, end in self.ends if number == generation]) < NUM_RANKS:
            assert time.monotonic() < end_s, "the migration does not end"
            self.step()
            time.sleep(0.0005)
        assert ends == [ends[0]] * NUM_RANKS
        return ends[0]

    def close(self) -> None:
        for mover in self.movers:
            mover.close()
        assert self.wires.are_empty, "no message is left for the next migration"
        assert not any(layer.bank.staged for layers in self.layers for layer in layers)


def placed(rows: Sequence[Sequence[Replica]]) -> Placement:
    layers = tuple(LayerPlacement.even(3 * number, NUM_EXPERTS, row) for number, row in enumerate(rows))
    bytes_R = tuple(bytes_by_rank(layers, NUM_RANKS, SIZES).tolist())
    return Placement(layers, "rq", Topology(NUM_RANKS), bytes_R)


def drawn(seed: int) -> Placement:
    """Two layers of experts on random ranks, some of them twice, some in int8."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(2):
        replicas = set()
        for expert in range(NUM_EXPERTS):
            name = ("fp32", "int8")[generator.integers(2)]
            for rank in generator.permutation(NUM_RANKS)[: generator.integers(1, 3)].tolist():
                replicas.add(Replica(rank, expert, name))
        rows.append(sorted(replicas))
    return placed(rows)


def migration(before: Placement, after: Placement, generation: int = 1) -> Migration:
    held = [list(layer.replicas) for layer in before.layers]
    return Migration(generation, after, tuple(move_rounds(held, after, SIZES, "fp32", ROOM)))


def states(before: Placement, plan: Migration) -> list[list[list[Replica]]]:
    """What is served before and after each round."""
    layers = list(before.layers)
    result = [[list(layer.replicas) for layer in layers]]
    for moves in plan.rounds:
        layers = moves.applied_to(layers)
        result.append([list(layer.replicas) for layer in layers])
    return result


@pytest.mark.parametrize("seed", range(6))
def test_all_ranks_serve_each_round_in_the_same_step(seed: int) -> None:
    before, after = drawn(seed), drawn(seed + 100)
    plan = migration(before, after)
    group = Group(before)
    group.begin(plan)
    assert group.run(1) is MigrationEnd.COMMITTED
    group.close()
    assert group.served == states(before, plan)
    changed = {position for moves in plan.rounds for position in moves.layers}
    for layers in group.layers:
        assert all(layers[position].placement is after.layers[position] for position in changed)
    words = 2 * len(plan.rounds) * NUM_RANKS * NUM_RANKS  # one for each piece, and there are few
    planned = sum(int(SIZES[move.format]) for one in plan.rounds for _, move in one.receives if _is_sent(move))
    assert planned <= group.wires.num_bytes <= planned + words
    limits = np.maximum(before.bytes_R, after.bytes_R) + ROOM
    assert all(held <= limit for held, limit in zip(group.max_held_R, limits, strict=True))
    assert max(group.max_held_R) > max(*before.bytes_R, *after.bytes_R), "some of the room is used"


def _is_sent(move: Any) -> bool:
    return move.source not in (None, move.rank)


@pytest.mark.parametrize("seed", range(2))
def test_experts_that_were_quantized_in_advance_are_read_and_not_converted(seed: int) -> None:
    before, after = drawn(seed), drawn(seed + 100)
    plan = migration(before, after)
    assert any(move.source is not None and move.format == "int8" for one in plan.rounds for _, move in one.receives)
    group = Group(before, reads_formats=True)
    for layers in group.layers:
        for layer in layers:
            layer.bank.converts = False
    group.begin(plan)
    assert group.run(1) is MigrationEnd.COMMITTED
    group.close()


def test_migrations_follow_one_another() -> None:
    placements = [drawn(seed) for seed in range(5)]
    group = Group(placements[0])
    for generation, (before, after) in enumerate(pairwise(placements), start=1):
        group.begin(migration(before, after, generation))
        assert group.run(generation) is MigrationEnd.COMMITTED
    group.close()


def test_a_migration_after_one_that_was_given_up_begins_with_new_connections() -> None:
    placements = [drawn(seed) for seed in range(4)]
    group = Group(placements[0])
    group.wires.broken = {frozenset(pair) for pair in pairwise(range(NUM_RANKS))}
    group.begin(migration(*placements[:2]))
    assert group.run(1) is MigrationEnd.ABORTED
    assert all("no connection to rank" in reason for reason in group.reasons)
    served = placed([layer.placement.replicas for layer in group.layers[0]])
    for generation, (before, after) in enumerate(pairwise((served, *placements[2:])), start=2):
        group.begin(migration(before, after, generation))
        assert group.run(generation) is MigrationEnd.COMMITTED
    assert list(group.wires.joined) == [2], "those after one that was committed keep their connections"
    group.close()


def test_ranks_that_cannot_connect_again_try_it_once_more_for_the_next_migration() -> None:
    before, after = drawn(0), drawn(100)
    group = Group(before)
    group.begin(migration(before, after))
    group.movers[0].abort(1, "asked to")
    assert group.run(1) is MigrationEnd.ABORTED
    held = placed([layer.placement.replicas for layer in group.layers[0]])
    group.wires.joined[2] = threading.Barrier(NUM_RANKS + 1)  # one that nobody passes
    for generation, end in ((2, MigrationEnd.ABORTED), (3, MigrationEnd.COMMITTED)):
        group.begin(migration(held, after, generation))
        assert group.run(generation) is end
    group.close()


@pytest.mark.parametrize("is_idle", [False, True])
def test_no_more_bytes_than_allowed_leave_a_rank_in_a_step_however_long_it_takes(is_idle: bool) -> None:
    """Where nobody has tokens there is no step that bytes could delay: all that goes at once is one piece."""
    before, after = drawn(0), drawn(100)
    limit = SIZES["int8"] // 4
    group = Group(before, Pace(limit))
    sent: Counter[tuple[int, int]] = Counter()  # by rank and step
    group.wires.on_send = lambda src, message: sent.update({(src, num_steps): max(len(message) - 1, 0)})
    num_steps = 0
    group.begin(migration(before, after))
    while len(group.ends) < NUM_RANKS:
        group.step(is_idle)
        num_steps += 1
        time.sleep(0.1 if num_steps < 4 else 0.001)
    group.close()
    most_late = 0
    for rank in range(NUM_RANKS):
        late = 0  # a thread that waits for its core sends one piece in a later step
        for step in range(num_steps + 1):
            late = max(late + sent[rank, step] - limit, 0)
            most_late = max(most_late, late)
    assert (most_late <= limit) != is_idle


def test_without_a_bound_of_bytes_ranks_rest_beside_steps_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "rest_s", lambda pace, elapsed_s, busy_s: 60.0)
    before, after = drawn(0), drawn(100)
    group = Group(before)
    group.begin(migration(before, after))
    for _ in range(50):
        group.step()
        time.sleep(0.002)
    assert any(mover.num_pieces for mover in group.movers)
    assert not group.ends
    while len(group.ends) < NUM_RANKS:
        group.step(is_idle=True)
    group.close()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fault", ["flipped byte", "unreadable weights", "aborted", "late rank aborts"])
def test_a_fault_leaves_the_placement_of_one_round_on_all_ranks(fault: str, seed: int) -> None:
    before, after = drawn(seed), drawn(seed + 100)
    plan = migration(before, after)
    generator = np.random.default_rng(seed)
    group = Group(before, Pace(SIZES["int8"] // 3))
    victim = int(generator.integers(NUM_RANKS))
    number = int(generator.integers(2, 12))
    if fault == "flipped byte":
        messages = []

        def flip(message: Tensor) -> Tensor:
            messages.append(message)
            if len(message) > 1 and len(messages) > number:
                message[0] ^= 1
            return message

        group.wires.on_message = flip
    if fault == "late rank aborts":
        others = [rank for rank in range(NUM_RANKS) if rank != victim]
        group.begin(plan, others)
        group.movers[others[0]].abort(1, "asked to")
        for _ in range(3):
            group.step()
        group.begin(plan, [victim])
    else:
        group.begin(plan)
    if fault == "unreadable weights":
        for layer in group.layers[victim]:
            layer.bank.fails = True
    if fault == "aborted":
        for _ in range(number):
            group.step()
            time.sleep(0.001)
        group.movers[victim].abort(1, "asked to")
    end = group.run(1)
    wire = group.wires
    wire.on_message = lambda message: message
    for layer in group.layers[victim]:
        layer.bank.fails = False
    expected = states(before, plan)
    assert group.served == expected[: len(group.served)], "round by round, and no mixture"
    if end is MigrationEnd.ABORTED:
        assert len(group.served) < len(expected)
        assert group.reasons
    # What was given up leaves nothing behind: the next one goes through.
    now = placed(group.served[-1])
    last = drawn(seed + 200)
    group.begin(migration(now, last, 2))
    assert group.run(2) is MigrationEnd.COMMITTED
    group.close()


def test_a_migration_that_has_ended_cannot_be_aborted() -> None:
    before, after = drawn(0), drawn(100)
    group = Group(before)
    group.begin(migration(before, after))
    assert group.run(1) is MigrationEnd.COMMITTED
    group.movers[0].abort(1, "too late")
    group.step()
    group.begin(migration(after, before, 2))
    assert group.run(2) is MigrationEnd.COMMITTED
    group.close()


def test_steps_go_on_while_a_rank_stalls() -> None:
    before, after = drawn(0), drawn(100)
    group = Group(before)
    release = threading.Event()

    def stall(message: Tensor) -> Tensor:
        release.wait(10)
        return message

    group.wires.on_message = stall
    group.begin(migration(before, after))
    for _ in range(200):
        group.step()
    assert len(group.ends) == 0
    release.set()
    assert group.run(1) is MigrationEnd.COMMITTED
    group.close()


def test_a_rank_that_learns_of_the_end_late_takes_part_in_the_messages_of_the_round_that_others_have_begun() -> None:
    before, after = drawn(0), drawn(100)
    plan = migration(before, after)
    assert len(plan.rounds) > 1
    group = Group(before)
    group.begin(plan)
    slow, other = group.movers[0], group.movers[1]
    while min(mover.flags.staged for mover in group.movers) == 0:
        time.sleep(0.0005)
    with slow._changed:  # its thread sees nothing of what happens in here
        group.step()
        assert group.served[-1] == states(before, plan)[1], "the first round serves"
        other.abort(1, "asked to")
        group.step()
    assert group.run(1) is MigrationEnd.ABORTED
    group.begin(migration(placed(group.served[-1]), before, 2))
    assert group.run(2) is MigrationEnd.COMMITTED
    group.close()


def test_a_mover_ends_in_the_middle_of_a_migration_when_the_engine_has_ended() -> None:
    """As where a migration begins in the last agreement before a shutdown, and no other follows."""
    before, after = drawn(0), drawn(100)
    plan = migration(before, after)
    assert len(plan.rounds) > 1
    group = Group(before)
    for mover in group.movers:
        mover.abort(1, "the server was shut down")
    group.begin(plan)
    start_s = time.monotonic()
    group.close()
    assert time.monotonic() - start_s < 5


def test_each_rank_asks_for_a_step_when_it_has_something_to_announce() -> None:
    before, after = drawn(0), drawn(100)
    group = Group(before)
    group.begin(migration(before, after))
    for woken, mover in zip(group.woken, group.movers, strict=True):
        assert woken.wait(10)
        assert mover.flags.staged > 1 << 20
        woken.clear()
    group.movers[1].abort(1, "asked to")
    assert [woken.is_set() for woken in group.woken] == [False, True, False]
    assert group.run(1) is MigrationEnd.ABORTED
    group.close()


@pytest.mark.parametrize("seed", range(4))
def test_ranks_that_lose_another_one_agree_on_the_round_that_some_have_committed(seed: int) -> None:
    before = drawn(seed)
    plan = migration(before, drawn(seed + 100))
    group = Group(before)
    group.begin(plan)
    movers = group.movers
    first, behind = movers[0], movers[1]
    for mover in movers:
        mover.wait_for_round()
    assert [mover.committed for mover in movers] == [(0, 0)] * NUM_RANKS
    first.between_steps(first.flags.staged, 0)  # the others have not heard of the agreement
    assert (first.committed, behind.committed) == ((1, 1), (0, 0))
    for mover in movers:
        mover.suspend()
    for mover in movers:
        mover.resume((1, 1), 1000)
    after_round = states(before, plan)[1]
    for layers in group.layers:
        assert [list(layer.placement.replicas) for layer in layers] == after_round
    assert {mover.committed for mover in movers} == {(1, 1)}
    assert {mover.flags for mover in movers} == {MoverFlags(1000 << 20, 1000)}
    now = placed(after_round)
    final = drawn(seed + 200)
    group.begin(migration(now, final, generation=1001))
    assert group.run(1001) is MigrationEnd.COMMITTED
    assert group.served[-1] == [list(layer.replicas) for layer in final.layers]
    group.close()


def test_a_mover_that_is_suspended_stages_nothing_and_drops_what_was_begun() -> None:
    before = drawn(1)
    group = Group(before)
    for mover in group.movers:
        mover.suspend()
    group.begin(migration(before, drawn(101)))
    time.sleep(0.02)
    assert not any(layer.bank.staged for layers in group.layers for layer in layers)
    for mover in group.movers:
        mover.resume((0, 0), 7)
    assert sorted(group.ends) == [(rank, 1, MigrationEnd.ABORTED) for rank in range(NUM_RANKS)]
    group.begin(migration(before, drawn(102), generation=8))
    assert group.run(8) is MigrationEnd.COMMITTED
    group.close()
