"""Members that go on without other ranks hold every expert again, inside their bytes at every moment."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_ep.core.errors import UserError
from rq_ep.core.moves import RECEIVE
from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.solver.certificate.certify import certify
from rq_ep.solver.migration.members import lowered, lowered_problem
from rq_ep.solver.migration.move_rounds import MoveRound, move_rounds
from rq_ep.solver.migration.recover import Recovery, recover
from rq_ep.solver.migration.warm_start import place_for_members
from rq_ep.strategies.rq import ReplicateQuantize
from tests.solver import instances

SIZES = {"bf16": 1000, "int8": 504}
ROOM = 1000


def placed(
    rows: Sequence[Sequence[Replica]], num_experts: int, num_ranks: int, budget: int | None = None, *mixed: str
) -> Placement:
    layers = tuple(LayerPlacement.even(2 * i, num_experts, row, mixed) for i, row in enumerate(rows))
    bytes_R = tuple(bytes_by_rank(layers, num_ranks, SIZES).tolist())
    return Placement(layers, "rq", Topology(num_ranks), bytes_R, None if budget is None else (budget,) * num_ranks)


def problem_of(
    placement: Placement,
    budget: int | None,
    formats: Sequence[str] = ("bf16",),
    pairs_LE: object = None,
    cap: float = 1.0,
) -> PlacementProblem:
    """The problem of a placement with equal budgets; without `pairs_LE`, experts have the same load."""
    layers = tuple(layer.index for layer in placement.layers)
    stats = ExpertStats.uniform(layers, placement.layers[0].num_experts, SIZES, "bf16")
    if pairs_LE is not None:
        stats = replace(stats, counts=np.array([pairs_LE], np.int64))
    budget_R = None if budget is None else (budget,) * placement.topology.num_ranks
    return PlacementProblem(stats, placement.topology, budget_R, tuple(formats), max_low_precision_share=cap)


def drawn(seed: int) -> tuple[PlacementProblem, Placement]:
    """A placement of a few layers on 1 to 6 ranks, some more ranks than experts, inside budgets of some slack."""
    generator = np.random.default_rng(seed)
    num_layers, num_experts, num_ranks = (int(generator.integers(1, end)) for end in (4, 10, 7))
    has_low = bool(generator.integers(2))
    rows = []
    for _ in range(num_layers):
        held = {(int(generator.integers(num_ranks)), expert) for expert in range(num_experts)}
        held |= {
            (int(generator.integers(num_ranks)), int(generator.integers(num_experts)))
            for _ in range(generator.integers(2 * num_ranks))
        }
        names = [("bf16", "int8")[has_low and generator.random() < 0.3] for _ in range(num_experts)]
        rows.append([Replica(rank, expert, names[expert]) for rank, expert in held])
    placement = placed(rows, num_experts, num_ranks)
    budget = max(placement.bytes_R) + int(generator.integers(3)) * 500
    pairs_LE = generator.integers(0, 100, (num_layers, num_experts)) * generator.integers(2)
    cap = float(generator.choice([0.0, 0.2, 1.0]))
    problem = problem_of(placement, budget, ("bf16", "int8") if has_low else ("bf16",), pairs_LE, cap)
    return problem, placement


def check(
    problem: PlacementProblem, before: Placement, members: Sequence[int], recovery: Recovery, room: int = ROOM
) -> None:
    """Replay the rounds; assert what holds on the way and in the end."""
    after, stats = recovery.placement, problem.stats
    replay(before, after, members, recovery.rounds, problem.budget_bytes_R, room)
    assert all(one.rank in members for layer in after.layers for one in layer.replicas)
    pairs_LE = stats.counts.sum(axis=0) if stats.counts.any() else np.ones(stats.counts.shape[1:], np.int64)
    low, low_before = (
        sum(layer.low_pairs(pairs_E, "bf16") for layer, pairs_E in zip(one.layers, pairs_LE, strict=True))
        for one in (after, before)
    )
    assert low <= max(problem.max_low_precision_share * pairs_LE.sum(), low_before) + 1e-6
    for old, new in zip(before.layers, after.layers, strict=True):
        held = {(one.rank, one.expert) for one in old.replicas if one.rank in members}
        numbers = Counter(one.expert for one in new.replicas)
        lost = held - {(one.rank, one.expert) for one in new.replicas}
        assert all(numbers[expert] for _, expert in lost), "only spare replicas are given up"


def replay(
    before: Placement,
    after: Placement,
    members: Sequence[int],
    rounds: Sequence[MoveRound],
    budget_R: Sequence[int] | None,
    room: int = ROOM,
) -> None:
    """Apply the rounds to what the members hold; bytes are kept, and sources hold what they send."""
    num_ranks, held_by = after.topology.num_ranks, set(members)
    layers = list(before.layers)

    def bytes_R() -> np.ndarray:
        alone = [[one for one in layer.replicas if one.rank in held_by] for layer in layers]
        return sum(
            np.bincount([one.rank for one in row], [SIZES[one.format] for one in row], num_ranks) for row in alone
        )

    limit_R = np.maximum(bytes_R(), after.bytes_R if budget_R is None else budget_R) + room
    for one in rounds:
        arriving_R = np.zeros(num_ranks)
        for position, move in one.receives:
            assert move.do == RECEIVE
            assert move.rank in held_by
            if move.source is not None:
                assert move.source in held_by
                formats = {
                    r.format for r in layers[position].replicas if (r.rank, r.expert) == (move.source, move.expert)
                }
                assert formats & {move.format, "bf16"}, "the source cannot make this format"
            arriving_R[move.rank] += SIZES[move.format]
        assert (bytes_R() + arriving_R <= limit_R).all()
        crossing = [move for _, move in one.receives if move.source != move.rank]
        for ranks in ([move.source for move in crossing if move.source is not None], [move.rank for move in crossing]):
            assert max(Counter(ranks).values(), default=0) <= 1
        layers = one.applied_to(layers, after)
        assert (bytes_R() <= limit_R).all()
    assert [list(layer.replicas) for layer in layers] == [list(layer.replicas) for layer in after.layers]


def test_every_loss_of_one_rank_or_two_leaves_members_that_hold_every_expert_where_that_is_possible() -> None:
    num_refused = 0
    for seed in range(120):
        problem, placement = drawn(seed)
        ranks = range(placement.topology.num_ranks)
        for members in (*combinations(ranks, len(ranks) - 1), *combinations(ranks, max(len(ranks) - 2, 0))):
            if not members:
                continue
            try:
                recovery = recover(problem, placement, members, ROOM)
            except UserError:
                assert not is_possible(problem, placement, len(members))
                num_refused += 1
                continue
            check(problem, placement, members, recovery)
    assert 30 < num_refused < 300, "cases that are refused, and others"


def is_possible(problem: PlacementProblem, placement: Placement, num_members: int) -> bool:
    """Whether some placement of one replica of each expert keeps to the budgets and the cap, tried exhaustively."""
    assert problem.budget_bytes_R is not None
    pairs_LE = (
        problem.stats.counts.sum(axis=0) if problem.stats.counts.any() else np.ones(problem.stats.counts.shape[1:])
    )
    low = sum(layer.low_pairs(pairs_E, "bf16") for layer, pairs_E in zip(placement.layers, pairs_LE, strict=True))
    num_low = 0
    if "int8" in problem.formats and problem.max_low_precision_share:
        cap = max(problem.max_low_precision_share * pairs_LE.sum(), low)
        num_low = int((np.cumsum(np.sort(pairs_LE, axis=None)) <= cap).sum())
    reached = {(pairs_LE.size - num_low, num_low)}  # native and low experts that are still to be placed
    for budget in problem.budget_bytes_R[:num_members]:
        reached = {
            (natives - more, max(lows - (budget - 1000 * more) // 504, 0))
            for natives, lows in reached
            for more in range(min(natives, budget // 1000) + 1)
        }
    return (0, 0) in reached


def test_what_survives_stays_and_what_is_lost_comes_from_the_checkpoint_to_the_rank_of_least_load() -> None:
    rows = [[Replica(0, 0, "bf16"), Replica(1, 0, "bf16"), Replica(1, 1, "bf16"), Replica(2, 2, "bf16")]]
    placement = placed(rows, 3, 3)
    after, rounds = recover(problem_of(placement, 2000, pairs_LE=[[60, 30, 10]]), placement, [1, 2], ROOM)
    assert list(after.layers[0].replicas) == [Replica(1, 0, "bf16"), Replica(1, 1, "bf16"), Replica(2, 2, "bf16")]
    assert [one.receives for one in rounds] == [()], "another replica serves; nothing moves"
    after, rounds = recover(problem_of(placement, 2000, pairs_LE=[[60, 30, 10]]), placement, [0, 2], ROOM)
    assert list(after.layers[0].replicas)[1:] == [Replica(2, 1, "bf16"), Replica(2, 2, "bf16")]
    assert [(move.rank, move.expert, move.source) for one in rounds for _, move in one.receives] == [(2, 1, None)]


def test_the_bytes_may_fit_exactly_and_an_error_says_how_many_are_missing() -> None:
    rows = [[Replica(expert % 4, expert, "bf16") for expert in range(12)]]
    placement = placed(rows, 12, 4)
    problem = problem_of(placement, 4000)
    check(problem, placement, [0, 1, 3], recovery := recover(problem, placement, [0, 1, 3], ROOM))
    assert recovery.placement.bytes_R == (4000, 4000, 0, 4000)
    with pytest.raises(UserError) as error:
        recover(replace(problem, budget_bytes_R=(4000, 4000, 4000, 3999)), placement, [0, 1, 3], ROOM)
    assert "the ranks that are left (3) cannot hold every expert: 1 bytes are missing" in str(error.value)
    for flag in ("--budget", "--formats (now bf16)", "--max-low-precision-share (now 1)"):
        assert flag in str(error.value)
    with pytest.raises(UserError, match="9000 bytes are missing"):
        recover(problem_of(placement, 3000), placement, [2], ROOM)


def test_spare_replicas_go_first_then_tolerant_experts_lose_bits_and_never_more_pairs_than_the_cap() -> None:
    rows = [[Replica(0, 0, "bf16"), Replica(1, 0, "bf16"), Replica(1, 1, "bf16"), Replica(2, 2, "bf16")]]
    placement = placed(rows, 3, 3)
    problem = problem_of(placement, 2000, ("bf16", "int8"), [[70, 20, 10]], 0.3)
    after = recover(problem, placement, [0, 1], ROOM).placement
    assert list(after.layers[0].replicas)[1] == Replica(0, 2, "bf16"), "there is room"
    tight = replace(problem, budget_bytes_R=(1000, 2000, 2000))
    check(tight, placement, [0, 1], recovery := recover(tight, placement, [0, 1], ROOM))
    assert [one.format for one in recovery.placement.layers[0].replicas] == ["bf16"] * 3, "a spare replica went"
    alone = replace(problem, budget_bytes_R=(2008, 2008, 2008))
    check(alone, placement, [1], recovery := recover(alone, placement, [1], ROOM))
    assert [*recovery.placement.layers[0].replicas] == [
        Replica(1, 0, "bf16"), Replica(1, 1, "int8"), Replica(1, 2, "int8"),
    ]  # fmt: skip
    assert recovery.placement.low_precision_planned == pytest.approx(0.3)
    with pytest.raises(UserError, match="496 bytes are missing"):
        recover(replace(alone, max_low_precision_share=0.29), placement, [1], ROOM)


def test_one_member_may_hold_everything_and_ranks_may_be_more_than_experts() -> None:
    placement = placed(
        [[Replica(3, 0, "bf16"), Replica(5, 1, "bf16")], [Replica(0, 0, "bf16"), Replica(1, 1, "bf16")]], 2, 6
    )
    problem = problem_of(placement, None)
    for members in ([2], [4], [0, 2], [0, 1, 2, 3, 4, 5]):
        check(problem, placement, members, recover(problem, placement, members, ROOM))
    assert recover(problem, placement, range(6), ROOM) == Recovery(placement_of(problem, placement), ())


def placement_of(problem: PlacementProblem, placement: Placement) -> Placement:
    return replace(placement, budget_bytes_R=problem.budget_bytes_R, low_precision_planned=0.0, certificate={})


def test_an_expert_that_is_left_in_few_bits_alone_is_native_again_where_the_cap_asks_for_it() -> None:
    rows = [[Replica(0, 0, "bf16"), Replica(1, 0, "int8"), Replica(1, 1, "bf16"), Replica(2, 1, "bf16")]]
    placement = placed(rows, 2, 3, None, "int8", "bf16")
    problem = problem_of(placement, 3000, ("bf16", "int8"), [[50, 50]], 0.25)
    check(problem, placement, [1, 2], recovery := recover(problem, placement, [1, 2], ROOM))
    assert [(move.expert, move.format, move.source) for one in recovery.rounds for _, move in one.receives] == [
        (0, "bf16", None)
    ]
    check(problem, placement, [0, 1], recovery := recover(problem, placement, [0, 1], ROOM))
    assert [*recovery.placement.layers[0].replicas] == [one for one in placement.layers[0].replicas if one.rank < 2]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9))
def test_a_second_loss_during_a_recovery_and_the_way_back_when_all_have_joined_again(seed: int) -> None:
    problem, placement = drawn(seed)
    generator = np.random.default_rng(seed)
    num_ranks = placement.topology.num_ranks
    if num_ranks < 3:
        return
    first, second = generator.permutation(num_ranks)[:2].tolist()
    members = [rank for rank in range(num_ranks) if rank != first]
    fewer = [rank for rank in members if rank != second]
    try:
        begun = recover(problem, placement, members, ROOM)
        layers = placement.layers
        for one in begun.rounds[: generator.integers(len(begun.rounds) + 1)]:
            layers = tuple(one.applied_to(layers, begun.placement))
        bytes_R = tuple(bytes_by_rank(layers, num_ranks, SIZES).tolist())
        halfway = replace(begun.placement, layers=layers, bytes_R=bytes_R)
        recovery = recover(problem, halfway, fewer, ROOM)
    except UserError:
        return
    check(problem, halfway, fewer, recovery)
    grown = recover(problem, recovery.placement, range(num_ranks), ROOM)
    assert grown.placement.layers == recovery.placement.layers, "what serves is kept"
    assert not grown.rounds
    held = [list(layer.replicas) for layer in grown.placement.layers]
    goal = replace(placement, budget_bytes_R=problem.budget_bytes_R)
    back = move_rounds(held, goal, SIZES, "bf16", ROOM)
    replay(grown.placement, goal, range(num_ranks), back, problem.budget_bytes_R)


def test_what_members_hold_in_the_end_is_as_balanced_as_what_is_placed_for_them_alone() -> None:
    problem = instances.problem(np.stack([instances.skewed(16, 4000, seed, 24) for seed in (1, 2)], axis=1), 4)
    problem = replace(problem, budget_bytes_R=(10_000,) * 4)
    strategy, members = ReplicateQuantize(max_moves=300), [0, 1, 3]
    recovery = recover(problem, strategy.place(problem), members, ROOM)
    after = place_for_members(strategy, problem, recovery.placement, members)
    fresh = strategy.place(lowered_problem(problem, members))
    assert after.certificate["predicted"] <= fresh.certificate["predicted"]
    first = certify(lowered_problem(problem, members), strategy, lowered(recovery.placement, members).layers)
    assert fresh.certificate["predicted"] < first.certificate["predicted"] < 1.1 * fresh.certificate["predicted"]
    assert after.topology == problem.topology
    assert after.bytes_R[2] == 0
    held = [list(layer.replicas) for layer in recovery.placement.layers]
    replay(recovery.placement, after, members, move_rounds(held, after, SIZES, "bf16", ROOM), problem.budget_bytes_R)


def test_the_same_loss_has_the_same_answer() -> None:
    placement = placed([[Replica(expert % 3, expert, "bf16") for expert in range(8)] for _ in range(3)], 8, 3)
    one, other = (recover(problem_of(placement, 14000), placement, [0, 1], ROOM) for _ in range(2))
    assert one.placement.to_dict() == other.placement.to_dict()
    assert one.rounds == other.rounds
