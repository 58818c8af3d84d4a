"""The placement solver: formats, first replicas, further replicas and moves inside a byte budget for each rank.

Several initial solutions are tried on some of the steps, and the search goes on from the best; where the problem is
tiny, it goes on from all of them and from some random ones. The result is never worse than standard EP's contiguous
blocks or the candidates it is given.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem, contiguous, ignore_progress
from rq_ep.core.strategy import Strategy
from rq_ep.solver.certificate.certify import certified
from rq_ep.solver.objective.calibration_steps import LayerSteps, calibration_steps
from rq_ep.solver.objective.denoise_steps import denoise_steps
from rq_ep.solver.objective.objective import is_plain
from rq_ep.solver.search.greedy_fill import raise_formats
from rq_ep.solver.search.initial_solutions import (
    PROGRESS_AT_START,
    ROUNDING,
    SAME_BALANCE,
    best_initial,
    completed,
    constructed,
    filled_in_time,
    known_solutions,
    least_value,
    random_solutions,
)
from rq_ep.solver.search.local_search import LEAST_GAIN
from rq_ep.solver.search.ruin_recreate import ruin_and_recreate
from rq_ep.solver.search.search_state import SearchContext, SearchState, Solution
from rq_ep.solver.search.spare_replicas import drop_spares
from rq_ep.solver.workers import workers

TINY = 2**10  # layers times steps, experts and ranks, up to which the search begins from every initial solution
FEWER_FROM_CURRENT = 6  # times fewer moves: a search that begins from a placement that serves begins near its end


def solve(
    problem: PlacementProblem,
    strategy: Strategy,
    max_steps: int,
    max_moves: int,
    current: Placement | None = None,
    candidates: Sequence[Sequence[LayerPlacement]] = (),
) -> Placement:
    """Place every layer of `problem`.

    Args:
        problem: statistics, ranks, limits, and formats. With `time_limit_s`, the best placement until then is returned.
        strategy: serves the placement, which carries its name.
        max_steps: calibration steps to look at, spread over the record.
        max_moves: moves of replicas attempted in each layer; from `current` a sixth of them.
        current: a placement of the same layers on as many ranks to begin from. It may lack experts, hold too much or
            break rules (a rank was lost, its budget cut): first, missing experts get a replica and what exceeds the
            limits is dropped. Its formats stay. Beyond that, no more than `problem.max_moved_bytes` are moved, and a
            move must gain more than `problem.move_price` asks for its bytes.
        candidates: layers of other placements that the result must not be worse than, and may begin from.

    Raises:
        UserError: the budget is too small (the message says how many bytes would do), or `current` has formats that
            the problem may not use.
    """
    num_moves = max_moves if current is None else max_moves // FEWER_FROM_CURRENT
    with workers(problem.num_workers) as threads:
        context = SearchContext.of(problem, num_moves, current, threads)
        solution = _solution(context, calibration_steps(problem, max_steps), candidates)
    placement = certified(problem, strategy, max_steps, context.formats, solution.held_LER, solution.format_LE)
    problem.on_progress(1.0)
    return placement


def _solution(
    context: SearchContext, recorded: list[LayerSteps], candidates: Sequence[Sequence[LayerPlacement]]
) -> Solution:
    """The best solution that the search finds for these steps, from the current one, if there is one."""
    problem = context.problem
    steps = recorded if context.effort.is_over() else denoise_steps(problem, recorded, context.workers)
    if context.current is not None:
        return _search(context, steps, completed(context, steps, context.current)).solution
    known = known_solutions(context, [contiguous(problem), *candidates])
    alone, together = constructed(context, steps)
    begun = [solutions for solutions in ([*known, *alone], together) if solutions]
    states = []
    for number, solutions in enumerate(begun):
        part = _share_of_time(context, number, len(begun))
        states.append(_best_search(part, steps, solutions))
    best = _least_damage(states)
    are_recorded = all(one is other for one, other in zip(steps, recorded, strict=True))
    rating = best.rating if are_recorded else _rating(context, recorded, best.solution)
    for solution in known:  # on recorded steps, the result must not be worse than any of these
        if solution.equals(best.solution) or least_value(context, recorded, solution) >= rating[0] + ROUNDING:
            continue
        state = SearchState(context, recorded, solution)
        if state.rating < rating:
            steps, best = recorded, state if context.effort.is_over() else _search(context, recorded, solution)
            rating = best.rating
    return _refined(context, steps, best)


def _best_search(context: SearchContext, steps: Sequence[LayerSteps], solutions: Sequence[Solution]) -> SearchState:
    """What the search makes of the most promising solution or, where the problem is tiny, the best it makes of any."""
    initial = best_initial(context, steps, solutions)
    best = _search(context, steps, initial)
    if sum(layer.loads_SE.size * layer.num_ranks for layer in steps) > TINY:
        return best
    quiet = replace(context, problem=replace(context.problem, on_progress=ignore_progress))
    for solution in [*solutions, *random_solutions(context, steps, solutions)]:
        if solution is initial or context.effort.is_over():
            continue
        if SearchState(quiet, steps, solution).floor < best.value - LEAST_GAIN:
            best = min(best, _search(quiet, steps, solution), key=lambda state: state.rating)
    return best


def _share_of_time(context: SearchContext, number: int, num_searches: int) -> SearchContext:
    """The context for one of several searches, which share the time that is left and the progress."""
    problem, effort, now = context.problem, context.effort, time.monotonic()
    if num_searches == 1:
        return context
    deadline = None if effort.deadline is None else now + (effort.deadline - now) / (num_searches - number)

    def on_progress(fraction: float) -> None:
        problem.on_progress((number + fraction) / num_searches)

    return replace(
        context, problem=replace(problem, on_progress=on_progress), effort=replace(effort, deadline=deadline)
    )


def _least_damage(states: Sequence[SearchState]) -> SearchState:
    """The state of least damage among those that are balanced as well as the best."""
    best = min(state.value for state in states)
    return min((state for state in states if state.value <= best + SAME_BALANCE), key=lambda state: state.rating[::-1])


def _search(context: SearchContext, steps: Sequence[LayerSteps], initial: Solution) -> SearchState:
    """Add replicas greedily, search each layer, then ruin and recreate over all layers."""
    on_progress = context.problem.on_progress
    state = SearchState(context, steps, filled_in_time(context, steps, initial)).add_replicas()
    if context.effort.is_over() and context.current is None:  # else what was moved and does not pay must go
        return state
    rest = 0.9 - PROGRESS_AT_START
    state.search(lambda fraction: on_progress(PROGRESS_AT_START + rest * fraction))
    ruin_and_recreate(state, lambda fraction: on_progress(0.9 + 0.09 * fraction))  # the certificate is to come
    return state


def _refined(context: SearchContext, steps: Sequence[LayerSteps], state: SearchState) -> Solution:
    """The solution after bytes that are left gave experts more bits, unless that makes it worse.

    Where there are several low formats, replicas that balance hardly misses leave their bytes for that, too.
    """
    if not state.format_LE.any():
        return state.solution
    several, spare = len(context.formats.names) > 2, state
    if several:
        spare = SearchState(context, steps, state.solution)
        drop_spares(spare, SAME_BALANCE)
    held_LER = spare.held_LER
    format_LE = raise_formats(held_LER, state.format_LE, context.damage_FLE, context.formats, spare.free_R)
    if not several and (format_LE == state.format_LE).all():
        return state.solution
    if not several and is_plain(context.problem):  # formats do not change the balance
        spares = context.damage(format_LE) < context.damage(state.format_LE)
        return Solution(held_LER, format_LE) if spares else state.solution
    refined = SearchState(context, steps, Solution(held_LER, format_LE))
    if not several:
        return refined.solution if refined.rating < state.rating else state.solution
    refined.add_replicas()
    is_as_good = refined.value <= state.value + SAME_BALANCE
    return refined.solution if is_as_good and refined.rating[1] < state.rating[1] else state.solution


def _rating(context: SearchContext, steps: Sequence[LayerSteps], solution: Solution) -> tuple[float, float]:
    return SearchState(context, steps, solution).rating
