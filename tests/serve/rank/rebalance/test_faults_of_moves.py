"""Faults in each phase of a re-placement: plan, stage, verify, agree, commit, free.

Whatever happens, all ranks serve one placement that is the old one, the new one or that of a round between them, their
answers are the dense model's in every step, nothing stays staged, and the next re-placement goes through.
"""

import itertools
import threading
import time
from collections.abc import Callable

import pytest
from torch import Tensor

from rq_ep.rebalancing.rebalancer import Decision
from rq_ep.serve.messages import RebalanceCommand
from rq_ep.serve.rank.rebalance import live_rebalancing
from rq_ep.serve.rank.rebalance.live_rebalancing import GroupChange
from rq_ep.serve.rank.rebalance.planner_process import PlannerFailure
from tests.moe.test_expert_mover import NUM_RANKS, SIZES, states
from tests.serve.rank.rebalance.moving_group import MovingGroup, ScriptedPlanner, flipped, migration_of, placements

SEEDS = (10, 19, 26, 38, 41)  # in which experts are sent, read and converted, over three to five rounds
NAMED_WITHIN_S = 10
PIECE = SIZES["int8"] // 2


def check(group: MovingGroup, decision: Decision, is_committed: bool) -> None:
    """What must hold after a fault."""
    group.until_idle()
    for _ in range(2):  # a rank that has heard of it late gives it up late
        group.step()
    expected = states(group.before, migration_of(decision))
    assert group.placements == expected[: len(group.placements)], "round by round, and no mixture"
    assert (len(group.placements) == len(expected)) == is_committed
    assert group.results == {"committed" if is_committed else "aborted": 1}
    assert len({live.flags().staged for live in group.lives}) == 1, "all ranks agree on how far they have come"


def goes_on(group: MovingGroup, seed: int) -> None:
    """The next re-placement commits; then the server ends."""
    group.hook = lambda rank, what: None
    group.wires.on_message = lambda src, dst, message: message
    group.on_read = lambda read: read
    num_committed = group.results.get("committed", 0)
    group.answers_rounds = False
    group.start(placements(seed)[2])
    group.until_idle()
    group.step(answers=True)
    assert group.results["committed"] == num_committed + 1
    assert [list(layer.placement.replicas) for layer in group.layers[0]] == [
        list(layer.replicas) for layer in placements(seed)[2].layers
    ]
    group.close()


class Once:
    """A hook that acts the first time that a rank is about to do something, after so many other times."""

    def __init__(self, what: str, action: Callable[[int], None], skipped: int = 0) -> None:
        self.what, self.action, self.skipped = what, action, skipped
        self.rank: int | None = None
        self._lock = threading.Lock()

    def __call__(self, rank: int, what: str) -> None:
        with self._lock:
            if what != self.what or self.rank is not None:
                return
            self.skipped -= 1
            if self.skipped >= 0:
                return
            self.rank = rank
        self.action(rank)


class Stall(Once):
    """A hook that holds the first rank up until it is released."""

    def __init__(self, what: str, skipped: int = 0) -> None:
        super().__init__(what, self.wait, skipped)
        self.has_begun, self.release = threading.Event(), threading.Event()

    def wait(self, rank: int) -> None:
        self.has_begun.set()
        assert self.release.wait(30)


def named_after(group: MovingGroup, seconds: int = 30, steps: bool = True) -> tuple[int, str]:
    """Let so many seconds pass, in which the group goes on answering; when what is stuck was named, and how."""
    at_s, stall = 0, ""
    for second in range(1, seconds + 1):
        group.second()
        if steps and second % 10 == 5:
            group.step(answers=True)
        if (now := group.view.stall()) is not None and not at_s:
            at_s, stall = second, now
    return at_s, stall


def settle(group: MovingGroup) -> None:
    """Some steps, in which the ranks that do not stand still come to where they wait."""
    for _ in range(20):
        group.step()
        time.sleep(0.002)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("what", "activity"),
    [
        ("converted", "converts expert"),
        ("stage", "makes room for expert"),
        ("read", "reads expert"),
        ("send", "exchanges experts with rank"),
        ("verify_staged", "verifies expert"),
    ],
)
def test_a_mover_that_stands_still_is_named_and_goes_on_when_it_can(what: str, activity: str, seed: int) -> None:
    before, after, _ = placements(seed)
    group = MovingGroup(before, bytes_per_step=PIECE)
    stall = Stall(what, skipped=seed % 2)
    group.hook = stall
    group.wires.on_message = lambda src, dst, message: stall(src, "send") or message  # type: ignore[func-returns-value]
    decision = group.start(after)
    while not stall.has_begun.is_set():
        group.step()
        assert group.state()["state"] == "moving"
    settle(group)
    at_s, text = named_after(group)
    assert 5 < at_s <= NAMED_WITHIN_S
    assert f"rank {stall.rank} {activity}" in text
    assert group.state()["stall"] is not None
    stall.release.set()
    check(group, decision, is_committed=True)
    assert group.state()["stall"] is None
    goes_on(group, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_planner_that_stands_still_is_named(seed: int) -> None:
    before, after, _ = placements(seed)
    group = MovingGroup(before)
    group.command("start")
    at_s, text = named_after(group)
    assert 5 < at_s <= NAMED_WITHIN_S
    assert "the planner has not answered" in text
    decision = group.plan(after)
    group.planner.answers.append(decision)
    group.second()
    check(group, decision, is_committed=True)
    goes_on(group, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rank_that_stands_still_between_staging_and_commit_is_named(seed: int) -> None:
    """None of its threads runs, as after a SIGSTOP; the others wait in the agreement."""
    before, after, _ = placements(seed)
    group = MovingGroup(before)
    decision = group.start(after)
    group.step()
    group.second()
    group.silent = {seed % (NUM_RANKS - 1) + 1}
    at_s, text = named_after(group, steps=False)
    assert 5 < at_s <= NAMED_WITHIN_S
    assert f"rank {next(iter(group.silent))} is silent" in text
    group.silent = set()
    check(group, decision, is_committed=True)
    goes_on(group, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("what", ["commit", "committed"])
def test_a_rank_that_stands_still_in_a_commit_is_named(what: str, seed: int) -> None:
    before, after, _ = placements(seed)
    group = MovingGroup(before)
    named: list[tuple[int, str]] = []
    group.hook = Once(what, lambda rank: named.append(named_after(group, steps=False)), skipped=seed % 3)
    decision = group.start(after)
    check(group, decision, is_committed=True)
    [(at_s, _)] = named
    assert 5 < at_s <= NAMED_WITHIN_S
    goes_on(group, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rank_that_stands_still_while_it_frees_holds_up_the_next_moves_and_is_named(seed: int) -> None:
    before, after, last = placements(seed)
    group = MovingGroup(before)
    group.hook = stall = Stall("discard_staged", skipped=seed // 2 % NUM_RANKS)
    group.start(after)
    while group.state()["state"] != "idle" or not stall.has_begun.is_set():
        group.step()
    group.start(last)
    settle(group)
    at_s, text = named_after(group)
    assert 5 < at_s <= NAMED_WITHIN_S
    assert f"rank {stall.rank} frees" in text
    stall.release.set()
    group.until_idle()
    assert group.results == {"committed": 2}
    group.close()


def harm_once(harm: Callable[[Tensor], Tensor], skipped: int) -> Callable[[int, int, Tensor], Tensor]:
    """Harm one piece of an expert on the wire, after so many others."""
    pieces = itertools.count()

    def on_message(src: int, dst: int, message: Tensor) -> Tensor:
        return harm(message) if len(message) > 1 and next(pieces) == skipped else message

    return on_message


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", ["on the wire", "from the checkpoint", "where it lies"])
def test_a_flipped_byte_is_found_and_the_round_given_up(fault: str, seed: int) -> None:
    before, after, _ = placements(seed)
    group = MovingGroup(before, bytes_per_step=PIECE)
    if fault == "on the wire":
        group.wires.on_message = harm_once(flipped, seed % 4)
    elif fault == "from the checkpoint":
        group.on_read = flipped
    else:
        group.hook = Once("verify_staged", lambda rank: flip_all(group, rank), seed % 3)
    decision = group.start(after)
    check(group, decision, is_committed=False)
    problem = group.state()["problem"]
    assert "arrived damaged on rank" in problem
    assert problem.startswith("rank ")
    assert (group.state()["failures_in_a_row"], group.state()["seconds_until_retry"]) == (1, 10.0)
    goes_on(group, seed)


def flip_all(group: MovingGroup, rank: int) -> None:
    for bank in group.banks[rank]:
        for buffer in bank.arriving.values():
            if buffer.any():
                flipped(buffer)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_message_that_is_cut_short_costs_the_connection_and_no_rank_hangs(seed: int) -> None:
    before, after, last = placements(seed)
    group = MovingGroup(before, bytes_per_step=PIECE)
    group.wires.on_message = harm_once(lambda piece: piece[:-1], seed % 4)
    decision = group.start(after)
    check(group, decision, is_committed=False)
    assert "no connection to rank" in group.state()["problem"]
    group.start(last)  # over the connections that are left
    group.until_idle()
    group.close()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("what", ["stage", "converted", "read", "verify_staged"])
def test_an_error_of_a_mover_is_the_reason_that_is_shown(what: str, seed: int) -> None:
    def fail(rank: int) -> None:
        raise OSError(5, "Input/output error")

    before, after, _ = placements(seed)
    group = MovingGroup(before, bytes_per_step=PIECE)
    group.hook = once = Once(what, fail, seed % 2)
    decision = group.start(after)
    check(group, decision, is_committed=False)
    assert group.state()["problem"] == f"rank {once.rank}: [Errno 5] Input/output error"
    goes_on(group, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_planner_that_dies_moves_nothing(seed: int) -> None:
    before, _, _ = placements(seed)
    group = MovingGroup(before)
    group.command("start")
    group.planner.answers.append(PlannerFailure("the planner process has ended (exit status -9)", True))
    group.until_idle()
    assert (group.results, len(group.placements)) == ({"failed": 1}, 1)
    assert "-9" in group.state()["problem"]
    goes_on(group, seed)


def test_commands_are_answered_when_the_group_changes_before_they_are_obeyed() -> None:
    before, _, _ = placements(SEEDS[0])
    group = MovingGroup(before)
    group.command("dry_run")
    group.lives[0].handle(RebalanceCommand(2, "start"))
    change = GroupChange(range(NUM_RANKS), 1, before, before, 1_000_001)
    group.lives[0].regroup(change, counts_LE=None)
    group.lives[0].handle(RebalanceCommand(3, "abort"))
    assert [(answer.number, answer.refusal) for answer in group.answers] == [
        (number, "the ranks of the group change: ask again") for number in (1, 2, 3)
    ]
    group.close()


@pytest.mark.parametrize(("leader", "is_free"), [(0, True), (0, False), (1, True)])
def test_a_planner_goes_on_where_its_rank_leads_on_unless_it_is_at_work(
    leader: int, is_free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _, _ = placements(SEEDS[0])
    group, following = MovingGroup(before), ScriptedPlanner()
    monkeypatch.setattr(live_rebalancing, "PlannerProcess", lambda: following)
    group.planner.is_free = is_free
    change = GroupChange(range(NUM_RANKS), leader, before, before, 1_000_001)
    group.lives[0].regroup(change, counts_LE=None)
    goes_on = leader == 0 and is_free
    assert group.planner.is_closed != goes_on
    group.lives[0].handle(RebalanceCommand(1, "start"))
    group.lives[0].tick()
    assert (group.planner.num_asked, following.num_asked) == (int(goes_on), int(leader == 0 and not is_free))
    group.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_slow_rank_delays_the_moves_and_nothing_else(seed: int) -> None:
    before, after, _ = placements(seed)
    group = MovingGroup(before, bytes_per_step=PIECE)
    slow = seed // 2 % NUM_RANKS

    def hook(rank: int, what: str) -> None:
        if rank == slow:
            time.sleep(0.002)

    group.hook = hook
    group.wires.on_message = lambda src, dst, message: hook(src, "send") or message  # type: ignore[func-returns-value]
    decision = group.start(after)
    check(group, decision, is_committed=True)
    goes_on(group, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("aborts", [False, True])
def test_a_rank_that_hears_late_of_a_migration_begins_it_late_or_gives_it_up(aborts: bool, seed: int) -> None:
    before, after, _ = placements(seed)
    group = MovingGroup(before)
    late = seed // 2 % NUM_RANKS
    group.late = {late: []}
    decision = group.start(after)
    for _ in range(3):
        group.step()
    if aborts:
        group.command("abort")
        group.step()
    for message in group.late.pop(late):
        group.lives[late].handle(message)
    check(group, decision, is_committed=not aborts)
    if aborts:
        assert group.state()["problem"] == "it was aborted by a request"
    goes_on(group, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_shutdown_in_the_middle_of_moves_leaves_nothing_behind(seed: int) -> None:
    before, after, _ = placements(seed)
    group = MovingGroup(before, bytes_per_step=PIECE)
    group.start(after)
    for _ in range(2 * seed):
        group.step()
    for live in group.lives:
        live.stop()
    group.agree()
    group.close()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("what", ["converted", "stage", "send", "verify_staged", "discard_staged"])
def test_no_mover_outlives_a_rank_that_was_killed(what: str, seed: int) -> None:
    """The group ends by the next agreement, which fails; until then the movers that are left find connections lost."""
    before, after, _ = placements(seed)
    group = MovingGroup(before, bytes_per_step=PIECE)
    killed = threading.Event()

    def kill(rank: int) -> None:
        for other in set(range(NUM_RANKS)) - {rank}:
            group.wires.lose(rank, other)
        killed.set()

    once = Once(what, kill, seed % 2)
    group.hook = once
    group.wires.on_message = lambda src, dst, message: once(src, "send") or message  # type: ignore[func-returns-value]
    group.start(after)
    while not killed.is_set():
        group.step()
    start_s = time.monotonic()
    left = [live for rank, live in enumerate(group.lives) if rank != once.rank]
    for live in left:
        live.stop()
    for live in left:
        live.close()
    assert time.monotonic() - start_s < 5
