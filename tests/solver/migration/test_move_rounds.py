"""Rounds of moves lead to the goal, keep to the bytes at every step, and are as few as there can be."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.replicas import Replica
from rq_ep.core.topology import Topology
from rq_ep.solver.migration.move_rounds import MoveRound, move_rounds, with_early_drops
from rq_ep.solver.migration.rounds.format_changes import LowCap

SIZES = {"bf16": 1000, "int8": 504}
ROOM = 1000


def placed(
    rows: Sequence[Sequence[Replica]],
    num_experts: int,
    num_ranks: int,
    budget: int | None = None,
    mixed_formats: tuple[str, ...] = (),
) -> Placement:
    layers = tuple(LayerPlacement.even(number, num_experts, row, mixed_formats) for number, row in enumerate(rows))
    bytes_R = tuple(bytes_by_rank(layers, num_ranks, SIZES).tolist())
    return Placement(layers, "rq", Topology(num_ranks), bytes_R, None if budget is None else (budget,) * num_ranks)


def drawn(generator: np.random.Generator, shape: tuple[int, int, int], slots: int, formats: str) -> list[list[Replica]]:
    """Full ranks: `slots` replicas of random experts on each, one of every expert at least."""
    num_layers, num_experts, num_ranks = shape
    rows = []
    for _ in range(num_layers):
        names = [("bf16", formats)[generator.integers(2)] for _ in range(num_experts)]
        free_R, held = np.full(num_ranks, slots), set()
        for expert in [*generator.permutation(num_experts), *generator.integers(0, num_experts, 3 * slots * num_ranks)]:
            open_ranks = [rank for rank in range(num_ranks) if free_R[rank] and (rank, expert) not in held]
            if open_ranks:
                rank = max(open_ranks, key=lambda rank: (free_R[rank], generator.random()))
                held.add((rank, int(expert)))
                free_R[rank] -= 1
        rows.append([Replica(rank, expert, names[expert]) for rank, expert in sorted(held)])
    return rows


def replay(
    before: list[list[Replica]],
    after: Placement,
    rounds: list[MoveRound],
    room: int = ROOM,
    low_cap: LowCap | None = None,
) -> None:
    """Apply the rounds; assert that bytes and the cap are kept, and that every layer is whole after every round."""
    num_ranks = after.topology.num_ranks
    first = after.layers[0]
    layers = list(placed(before, first.num_experts, num_ranks, None, first.replicas.mixed_formats).layers)
    limit_R = np.maximum(bytes_by_rank(layers, num_ranks, SIZES), after.budget_bytes_R or after.bytes_R)
    allowed = (
        0.0 if low_cap is None else max(low_cap.max_pairs, low_pairs(low_cap, layers), low_pairs(low_cap, after.layers))
    )
    for one in rounds:
        arriving_R = np.zeros(num_ranks, np.int64)
        for _, move in one.receives:
            arriving_R[move.rank] += SIZES[move.format]
        assert (bytes_by_rank(layers, num_ranks, SIZES) + arriving_R <= limit_R + room).all()
        layers = one.applied_to(layers)  # a layer that lacks an expert, or has one in two formats, cannot be made
        assert (bytes_by_rank(layers, num_ranks, SIZES) <= limit_R + room).all()
        assert low_cap is None or low_pairs(low_cap, layers) <= allowed + 1e-6
        for ranks in ([move.source for _, move in one.receives], [move.rank for _, move in one.receives]):
            crossing = [r for r, (_, move) in zip(ranks, one.receives, strict=True) if move.source != move.rank]
            assert max(Counter(rank for rank in crossing if rank is not None).values(), default=0) <= 1
    assert [list(layer.replicas) for layer in layers] == [list(layer.replicas) for layer in after.layers]


def low_pairs(low_cap: LowCap, layers: Sequence[LayerPlacement]) -> float:
    return sum(layer.low_pairs(pairs_E, "bf16") for layer, pairs_E in zip(layers, low_cap.pairs_LE, strict=True))


@pytest.mark.parametrize("formats", ["bf16", "int8"])
def test_random_migrations_of_full_ranks_reach_their_goal_inside_the_room(formats: str) -> None:
    num_stuck = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        num_ranks = int(generator.integers(2, 7))
        shape = int(generator.integers(1, 4)), int(generator.integers(num_ranks, 3 * num_ranks)), num_ranks
        slots = -(-shape[1] // num_ranks) + int(generator.integers(0, 3))
        before, goal = (drawn(generator, shape, slots, formats) for _ in range(2))
        after = placed(goal, shape[1], num_ranks)
        pairs_LE = generator.integers(0, 100, shape[:2])
        low_cap = LowCap(pairs_LE, float(generator.random() * 0.5 * pairs_LE.sum()))
        try:
            rounds = move_rounds(before, after, SIZES, "bf16", ROOM, low_cap=low_cap)
        except UserError:
            num_stuck += 1
            continue
        replay(before, after, rounds, ROOM, low_cap)
    assert num_stuck <= (3 if formats == "int8" else 0), "of sizes that do not match, on ranks without a free byte"


def test_ranks_that_convert_replicas_exchange_others_in_the_same_round() -> None:
    for seed in range(60):
        generator = np.random.default_rng(seed)
        num_ranks = int(generator.integers(2, 7))
        shape = 1, int(generator.integers(num_ranks, 3 * num_ranks)), num_ranks
        slots = -(-shape[1] // num_ranks) + int(generator.integers(0, 3))
        before, goal = (
            [[one._replace(format=("bf16", "int8")[generator.integers(2)]) for one in row] for row in rows]
            for rows in (drawn(generator, shape, slots, "bf16") for _ in range(2))
        )
        after = placed(goal, shape[1], num_ranks, None, ("bf16", "int8"))
        replay(before, after, move_rounds(before, after, SIZES, "bf16", ROOM))


def test_a_rank_sends_one_and_receives_one_in_a_round_and_rounds_are_as_few_as_the_busiest_rank_needs() -> None:
    for seed in range(1000):
        generator = np.random.default_rng(seed)
        num_ranks, num_experts = int(generator.integers(2, 9)), int(generator.integers(8, 25))
        homes_E = generator.integers(0, num_ranks, num_experts)
        before = [[Replica(int(rank), expert, "bf16") for expert, rank in enumerate(homes_E)]]
        new_E = generator.integers(0, num_ranks, num_experts)
        goal = [[Replica(int(rank), expert, "bf16") for expert, rank in enumerate(new_E)]]
        after = placed(goal, num_experts, num_ranks, budget=10**6)
        rounds = move_rounds(before, after, SIZES, "bf16", 10**9)
        moving = homes_E != new_E
        most = max(*np.bincount(homes_E[moving], minlength=1), *np.bincount(new_E[moving], minlength=1))
        assert sum(bool(one.receives) for one in rounds) == most
        for one in rounds:
            for ranks in ([move.source for _, move in one.receives], [move.rank for _, move in one.receives]):
                assert max(Counter(ranks).values(), default=0) <= 1


def test_full_ranks_exchange_experts_in_one_round() -> None:
    before = [[Replica(rank, expert, "bf16") for expert, rank in enumerate((0, 0, 1, 1))]]
    after = placed([[Replica(rank, expert, "bf16") for expert, rank in enumerate((1, 0, 0, 1))]], 4, 2, 2000)
    rounds = move_rounds(before, after, SIZES, "bf16", ROOM)
    assert len(rounds) == 1
    assert {(move.rank, move.expert, move.source) for _, move in rounds[0].receives} == {(1, 0, 0), (0, 2, 1)}
    assert rounds[0].received_bytes_R(2, SIZES).tolist() == [1000, 1000]


def test_replicas_of_most_relief_for_a_byte_come_first() -> None:
    before = [[Replica(0, expert, "bf16") for expert in range(4)]]
    after = placed([[*before[0], *(Replica(1, expert, "bf16") for expert in range(4))]], 4, 2)
    value = {0: 1.0, 1: 4.0, 2: 3.0, 3: 2.0}
    rounds = move_rounds(before, after, SIZES, "bf16", ROOM, lambda layer, replica: value[replica.expert])
    assert [move.expert for one in rounds for _, move in one.receives] == [1, 2, 3, 0]


def test_all_replicas_of_an_expert_change_their_format_together() -> None:
    before = [[Replica(0, 0, "bf16"), Replica(1, 0, "bf16"), Replica(2, 1, "bf16")]]
    low = placed([[Replica(0, 0, "int8"), Replica(1, 0, "int8"), Replica(2, 1, "bf16")]], 2, 3)
    rounds = move_rounds(before, low, SIZES, "bf16", ROOM)
    assert len(rounds) == 1
    assert [move.source for _, move in rounds[0].receives] == [0, 1], "each converts its own"
    assert not rounds[0].received_bytes_R(3, SIZES).any()
    back = move_rounds([list(low.layers[0].replicas)], placed(before, 2, 3, 2000), SIZES, "bf16", ROOM)
    assert len(back) == 1
    assert [move.source for _, move in back[0].receives] == [None, None], "no rank has the native weights"
    replay([list(low.layers[0].replicas)], placed(before, 2, 3, 2000), back)


def test_an_expert_that_moves_and_changes_its_format_leaves_no_stale_replica() -> None:
    before = [[Replica(0, 0, "bf16"), Replica(1, 0, "bf16"), Replica(1, 1, "bf16")]]
    after = placed([[Replica(2, 0, "int8"), Replica(0, 0, "int8"), Replica(1, 1, "bf16")]], 2, 3)
    replay(before, after, move_rounds(before, after, SIZES, "bf16", ROOM))


def test_nothing_to_do_takes_no_round_and_what_is_spare_goes_at_the_end() -> None:
    before = [[Replica(0, 0, "bf16"), Replica(1, 0, "bf16")]]
    assert move_rounds(before, placed(before, 1, 2), SIZES, "bf16", ROOM) == []
    rounds = move_rounds(before, placed([before[0][:1]], 1, 2, 5000), SIZES, "bf16", ROOM)
    assert [len(one.drops) for one in rounds] == [1]


def test_too_little_room_is_said_with_the_bytes_that_would_do() -> None:
    before = [[Replica(0, 0, "bf16"), Replica(1, 1, "bf16")]]
    after = placed([[Replica(1, 0, "bf16"), Replica(0, 1, "bf16")]], 2, 2, 1000)
    with pytest.raises(UserError, match=r"--rebalance-room 999: too little .* raise it to 1000 bytes"):
        move_rounds(before, after, SIZES, "bf16", 999)


def test_a_replica_can_be_dropped_as_soon_as_another_one_serves() -> None:
    before = [[Replica(2 * (expert % 2), expert, "bf16") for expert in range(8)] for _ in range(3)]
    after = placed([[Replica(expert % 3, expert, "bf16") for expert in range(8)] for _ in range(3)], 8, 3, 20_000)
    rounds = move_rounds(before, after, SIZES, "bf16", ROOM)
    assert any(len(layer.replicas) > 8 for one in rounds[:1] for layer in one.applied_to(placed(before, 8, 3).layers))
    layers = list(placed(before, 8, 3).layers)
    for one in with_early_drops(rounds):
        layers = one.applied_to(layers)
        assert all(len(layer.replicas) == 8 for layer in layers)
    assert [list(layer.replicas) for layer in layers] == [list(layer.replicas) for layer in after.layers]


def test_a_replica_stays_as_long_as_another_one_of_its_expert_is_awaited() -> None:
    """When expert 2 arrives on rank 0, it could drop expert 0 or 1; expert 0 arrives on rank 3 only after expert 1."""
    kept = [Replica(0, 3, "bf16"), Replica(1, 0, "bf16"), Replica(2, 1, "bf16"), Replica(3, 2, "bf16")]
    before = [[Replica(0, 0, "bf16"), Replica(0, 1, "bf16"), *kept]]
    arriving = [Replica(0, 2, "bf16"), Replica(3, 0, "bf16"), Replica(3, 1, "bf16")]
    after = placed([[*arriving, *kept]], 4, 4, 3000)
    first, last, *_ = move_rounds(before, after, SIZES, "bf16", ROOM, lambda layer, replica: float(replica.expert))
    assert [(move.rank, move.expert) for _, move in first.receives] == [(3, 1), (0, 2)]
    assert [(move.rank, move.expert) for _, move in first.drops] == [(0, 1)]
    assert [(move.rank, move.expert) for _, move in last.receives] == [(3, 0)]
