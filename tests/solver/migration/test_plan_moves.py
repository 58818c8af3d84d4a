"""Moves lead from one placement to another, in whatever formats, and keep to the bytes they state."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rq_ep.core.errors import UserError
from rq_ep.core.moves import DROP, RECEIVE, LayerMoves, Move, Moves
from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.replicas import Replica
from rq_ep.core.topology import Topology
from rq_ep.solver.migration.plan_moves import plan_moves

SIZES = {"bf16": 1000, "int8": 504, "int4": 270}


def drawn(num_ranks: int, seed: int, num_layers: int = 3, num_experts: int = 9) -> list[list[Replica]]:
    """Replicas on random ranks, all of an expert in one random format."""
    generator = np.random.default_rng(seed)
    layers = []
    for _ in range(num_layers):
        layer = []
        for expert in range(num_experts):
            name = str(generator.choice(list(SIZES), p=[0.6, 0.3, 0.1]))
            ranks = generator.choice(num_ranks, size=generator.integers(1, 4), replace=False)
            layer += [Replica(int(rank), expert, name) for rank in ranks]
        layers.append(layer)
    return layers


def placed(layers: list[list[Replica]], num_ranks: int, budget: int | None = None) -> Placement:
    table = tuple(LayerPlacement.even(2 * at, 9, replicas) for at, replicas in enumerate(layers))
    bytes_R = tuple(bytes_by_rank(table, num_ranks, SIZES).tolist())
    return Placement(table, "rq", Topology(num_ranks, 2), bytes_R, None if budget is None else (budget,) * num_ranks)


def numbered(layers: list[list[Replica]]) -> dict[int, list[Replica]]:
    return {2 * at: replicas for at, replicas in enumerate(layers)}


@pytest.mark.parametrize("seed", range(8))
def test_moves_lead_from_one_placement_to_another(seed: int, tmp_path: Path) -> None:
    before, after = drawn(4, seed), placed(drawn(4, seed + 100), 4)
    moves = plan_moves(before, after, SIZES, "bf16")
    moves.save(tmp_path / "moves.json")
    again = Moves.load(tmp_path / "moves.json")
    assert again == moves
    again.check(numbered(before), after, SIZES, "bf16")
    if moves.room_bytes:
        with pytest.raises(UserError, match=r"bytes on rank \d, above"):
            replace(moves, room_bytes=moves.room_bytes - 1).check(numbered(before), after, SIZES, "bf16")


def test_nothing_moves_where_nothing_changes() -> None:
    before = drawn(4, 0)
    moves = plan_moves(before, placed(before, 4), SIZES, "bf16")
    assert moves.layers == ()
    assert moves.room_bytes == 0
    assert not moves.received_bytes_R(SIZES).any()


def test_room_is_needed_only_where_full_ranks_exchange() -> None:
    before = [[Replica(0, 0, "bf16"), Replica(1, 1, "bf16"), *(Replica(2, expert, "bf16") for expert in range(2, 9))]]
    after = [[replica._replace(rank=(1, 0, 2)[replica.rank]) for replica in before[0]]]
    moves = plan_moves(before, placed(after, 3, 7000), SIZES, "bf16")
    assert moves.room_bytes == 0, "below their budgets they have room"
    tight = replace(placed(after, 3), budget_bytes_R=(1000, 1000, 7000))
    moves = plan_moves(before, tight, SIZES, "bf16")
    assert moves.room_bytes == 1000
    assert [move.do for move in moves.layers[0].moves] == [RECEIVE, DROP, RECEIVE, DROP]
    moves.check(numbered(before), tight, SIZES, "bf16")


def test_a_rank_makes_few_bits_itself_and_fetches_the_native_format() -> None:
    native, low = [[Replica(0, e, "bf16") for e in range(9)]], [[Replica(0, e, "int8") for e in range(9)]]
    made = plan_moves(native, placed(low, 1), SIZES, "bf16")
    assert {move.source for move in made.layers[0].moves} == {0}
    assert made.received_bytes_R(SIZES).tolist() == [0]
    fetched = plan_moves(low, placed(native, 1), SIZES, "bf16")
    assert {move.source for move in fetched.layers[0].moves} == {None}, "from the checkpoint: nobody holds it"
    assert fetched.received_bytes_R(SIZES).tolist() == [9000]


def test_sources_on_the_same_node_come_first_and_share_the_work() -> None:
    before = [[Replica(rank, 0, "bf16") for rank in (0, 2, 3)] + [Replica(0, e, "bf16") for e in range(1, 9)]]
    after = [[*before[0], Replica(1, 0, "bf16")]]
    assert plan_moves(before, placed(after, 4), SIZES, "bf16").layers[0].moves == (Move(RECEIVE, 1, 0, "bf16", 0),)


def test_lost_experts_come_from_replicas_or_the_checkpoint() -> None:
    whole = drawn(3, 5)
    left = [[replica for replica in layer if replica.rank != 2] for layer in whole]
    after = placed(whole, 3)
    moves = plan_moves(left, after, SIZES, "bf16")
    moves.check(numbered(left), after, SIZES, "bf16")
    for layer, replicas in zip(moves.layers, left, strict=True):
        kept = {replica.expert: replica.format for replica in replicas}
        for move in layer.moves:
            assert move.rank == 2
            assert (move.source is None) == (move.expert not in kept)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Move(DROP, 1, 0, "bf16"), "layer 0, move 0: rank 1 holds no bf16 replica of expert 0 to drop"),
        (Move(DROP, 0, 0, "int8"), "holds no int8 replica"),
        (Move(RECEIVE, 0, 0, "bf16", 0), "holds expert 0 in bf16 already"),
        (Move(RECEIVE, 1, 1, "bf16", 2), "rank 2 cannot give expert 1 in bf16; it holds no replica of it"),
        (Move(RECEIVE, 1, 0, "bf16", 0), "the moves do not lead to the placement"),
    ],
)
def test_wrong_moves_are_refused_by_number(wrong: Move, message: str) -> None:
    before = [[Replica(0, expert, "bf16") for expert in range(9)]]
    moves = Moves(3, 10_000, (LayerMoves(0, (wrong,)),))
    with pytest.raises(UserError, match=message):
        moves.check(numbered(before), placed(before, 3), SIZES, "bf16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "format is None, expected 'rq_ep.moves/1'"),
        ('{"format": "rq_ep.placement/1"}', "expected 'rq_ep.moves/1'"),
        ('{"format": "rq_ep.moves/1", "num_ranks": 2', "not a readable moves file"),
        ('{"format": "rq_ep.moves/1", "num_ranks": 2, "model": null}', "incomplete moves file"),
        ('{"format": "rq_ep.moves/1", "num_ranks": 1e9, "model": null, "layers": []}', "must be a whole number"),
        ("[" * 100_000, "nested too deeply"),
        (
            '{"format": "rq_ep.moves/1", "num_ranks": 2, "model": null, "room_bytes": 0, "layers": [], '
            '"previous_ranks": [0]}',
            "previous_ranks names 1 ranks, but num_ranks is 2",
        ),
        (
            '{"format": "rq_ep.moves/1", "num_ranks": 2, "model": null, "room_bytes": 0, "layers": [{"layer": 0, '
            '"moves": [{"do": "explode", "rank": 0, "expert": 0, "format": "bf16", "source": null}]}]}',
            "unknown move 'explode'",
        ),
    ],
)
def test_bad_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "moves.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        Moves.load(file)
    with pytest.raises(UserError, match="no such file; write it with `rq-ep place --current"):
        Moves.load(tmp_path / "none.json")
