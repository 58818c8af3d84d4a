"""Recovery: members that go on without the other ranks, at once, with a replica of every expert inside their bytes.

What the members hold stays where it is, as far as there is room. An expert that none of them holds is read from the
checkpoint. It is a first answer, within a fraction of a second; `place_again` finds a better one beside the steps. No
answer is prepared for each rank that may be lost: that would save that fraction and no more (`bench recover`).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray
from rq_ep.core.errors import UserError
from rq_ep.core.moves import DROP, Move
from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.problem import PlacementProblem, ignore_progress
from rq_ep.core.replicas import Replica
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.solver.compiled import numba
from rq_ep.solver.migration.member_replicas import MemberReplicas
from rq_ep.solver.migration.members import lowered_problem
from rq_ep.solver.migration.move_rounds import MoveRound, move_rounds
from rq_ep.solver.migration.restoration import Restoration
from rq_ep.solver.migration.rounds.format_changes import LowCap
from rq_ep.solver.objective.calibration_steps import calibration_steps
from rq_ep.solver.objective.denoise_steps import denoise_steps
from rq_ep.solver.search.search_state import SearchContext, SearchState, Solution

NUM_STEPS = 8  # calibration steps that the search looks at
NUM_MOVES = 600  # attempted in each layer: a tenth of a second for 58 layers of 64 experts on 8 ranks
PRICE = 1.0  # max/mean that moving as many bytes as the whole budget must gain: clients wait for these bytes
MORE_MOVED = 0.5  # bytes moved for balance, in those that have to move


class Recovery(NamedTuple):
    """Where the experts are to be, and the way there."""

    placement: Placement  # on all ranks; those that are not members hold nothing
    rounds: tuple[MoveRound, ...]  # sources are members or the checkpoint; what other ranks held is dropped


def recover(problem: PlacementProblem, placement: Placement, members: Sequence[int], room_bytes: int) -> Recovery:
    """The placement of the members, and the rounds that lead to it.

    Where every expert has a replica on a member, nothing moves. Until the rounds have been made, some experts may have
    none: no step can run. The rounds begin at `placement` as it is: replicas of other ranks stay in it until theirs are
    dropped, so that every layer has every expert at all times, and only members send. The cap on low pairs is kept;
    where it did not hold before, it is not exceeded further.

    Args:
        problem: loads, formats, cap and budgets of all ranks; where no load is known, every expert has the same.
        placement: what serves, or served. Replicas on ranks that are not members are as good as gone.
        members: ascending; one that joins may hold nothing.
        room_bytes: of a rank, beside its budget, for what arrives.

    Raises:
        UserError: the members cannot hold every expert; the message says how many bytes are missing.
    """
    replicas = MemberReplicas(problem, placement, members)
    before_LER = replicas.held_LER
    try:
        has_moved = Restoration(problem, members, replicas, by_damage=True).restore()
    except UserError:  # the fewest pairs let most experts be stored in few bits
        replicas = MemberReplicas(problem, placement, members, keeps_low=False)
        before_LER = replicas.held_LER
        has_moved = Restoration(problem, members, replicas, by_damage=False).restore()
    if has_moved:
        _balance(problem, members, replicas, before_LER)
    after = replicas.placement()
    is_member = set(members)
    held = [[one for one in layer.replicas if one.rank in is_member] for layer in placement.layers]
    low_cap = LowCap(replicas.pairs_LE, problem.max_low_precision_share * int(replicas.pairs_LE.sum()))
    stats = problem.stats
    rounds = move_rounds(held, after, stats.expert_bytes, stats.native_format, room_bytes, low_cap=low_cap)
    return Recovery(after, _with_drops(rounds, placement, is_member))


def warm_up() -> None:
    """Have all loaded and compiled that a recovery takes, before it is needed: the first time takes seconds.

    Loads are so uneven that every part of the search has something to do.
    """
    sizes, topology = {"fp32": 2, "int8": 1}, Topology(4)
    held = [Replica(rank, expert, "fp32") for rank in range(4) for expert in (rank, rank + 4, (rank + 1) % 4)]
    layers = tuple(LayerPlacement.even(index, 8, held) for index in range(2))
    bytes_R = tuple(bytes_by_rank(layers, 4, sizes).tolist())
    placement = Placement(layers, "rq", topology, bytes_R, bytes_R)
    stats = ExpertStats.uniform((0, 1), 8, sizes, "fp32")
    stats = replace(stats, counts=np.stack([np.arange(16).reshape(2, 8) ** power for power in (4, 6)]))
    recover(PlacementProblem(stats, topology, (18,) * 4, ("fp32", "int8")), placement, (0, 1, 2), room_bytes=2)


def _balance(
    problem: PlacementProblem, members: Sequence[int], replicas: MemberReplicas, before_LER: BoolArray
) -> None:
    """Choose better ranks for what has to move, and better spare replicas to give up, by a short search.

    It is left out where it would take too long or might not be served: without a compiler, where formats are mixed, and
    where no expert had more than one replica.
    """
    format_LE = replicas.solver_format_LE()
    if numba is None or format_LE is None or before_LER.sum(axis=2).max() < 2:
        return
    before_LEM, after_LEM = (held_LER[:, :, members] for held_LER in (before_LER, replicas.held_LER))
    to_move = int(((after_LEM & ~before_LEM) * replicas.bytes_LE[:, :, None]).sum())
    alone = replace(
        lowered_problem(problem, members), move_price=PRICE, max_moved_bytes=round((1 + MORE_MOVED) * to_move),
        time_limit_s=None, num_workers=1,
    )  # fmt: skip
    context = replace(SearchContext.of(alone, NUM_MOVES, None), current=Solution(before_LEM, format_LE))
    steps = denoise_steps(alone, calibration_steps(alone, NUM_STEPS))
    state = SearchState(context, steps, Solution(after_LEM, format_LE)).add_replicas()
    state.search(ignore_progress)
    replicas.hold(state.held_LER, members)


def _with_drops(rounds: Sequence[MoveRound], before: Placement, members: set[int]) -> tuple[MoveRound, ...]:
    """The rounds with the replicas of other ranks dropped: an expert's when it arrives or changes its format first."""
    arrives = {
        (position, move.expert): number
        for number, one in reversed(list(enumerate(rounds)))
        for position, move in one.receives
    }
    last = {position: number for number, one in enumerate(rounds) for position in one.layers}
    drops: defaultdict[int, list[tuple[int, Move]]] = defaultdict(list)  # of each round
    for position, layer in enumerate(before.layers):
        for replica in layer.replicas:
            if replica.rank not in members:
                number = arrives.get((position, replica.expert), last.get(position, 0))
                drops[number].append((position, Move(DROP, *replica)))
    if drops and not rounds:
        rounds = [MoveRound((), ())]
    return tuple(one._replace(drops=(*one.drops, *drops[number])) for number, one in enumerate(rounds))
