"""The placement solver: formats, first replicas, further replicas and moves inside a byte budget for each rank.

Several initial solutions are tried on some of the steps, and the search goes on from the best. The result is never
worse than standard EP's contiguous blocks or the candidates it is given.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem, contiguous
from rq_ep.core.rules import Rules
from rq_ep.core.strategy import Strategy
from rq_ep.solver.certificate.certify import certified
from rq_ep.solver.objective.calibration_steps import LayerSteps, calibration_steps
from rq_ep.solver.objective.denoise_steps import denoise_steps
from rq_ep.solver.objective.precision import damage_LE, low_experts
from rq_ep.solver.search.first_replicas import assign_first_replicas
from rq_ep.solver.search.greedy_fill import promote_to_native
from rq_ep.solver.search.layer_state import GOOD_ENOUGH
from rq_ep.solver.search.ruin_recreate import ruin_and_recreate
from rq_ep.solver.search.search_state import SearchContext, SearchState, Solution, solution_of

STEPS_TO_CHOOSE, LAYERS_TO_CHOOSE = 16, 8  # enough to tell a good initial solution from a bad one
FEWER_FROM_CURRENT = 4  # times fewer moves: a search that begins from a placement that serves begins near its end
PROGRESS_AT_START = 0.1  # share of the work that the choice of an initial solution is taken to be


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
        max_moves: moves of replicas attempted in each layer; from `current` a quarter of them.
        current: a placement of the same layers on as many ranks to begin from. It may lack experts, hold too much or
            break rules (a rank was lost, its budget cut): first, missing experts get a replica and what exceeds the
            limits is dropped. Its formats stay. Beyond that, no more than `problem.max_moved_bytes` are moved, and a
            move must gain more than `problem.move_price` asks for its bytes.
        candidates: layers of other placements that the result must not be worse than, and may begin from.

    Raises:
        UserError: the budget is too small (the message says how many bytes would do), or `current` has formats that
            the problem may not use.
    """
    recorded = calibration_steps(problem, max_steps)
    steps = denoise_steps(problem, recorded)
    num_moves = max_moves if current is None else max_moves // FEWER_FROM_CURRENT
    context = SearchContext.of(problem, num_moves, current)
    if context.current is not None:
        best = _search(context, steps, _completed(context, steps, context.current))
    else:
        known = _known_solutions(context, [contiguous(problem), *candidates])
        initial = _best_initial(context, steps, [*known, *_constructed(context, steps)])
        best = _search(context, steps, initial)
        for solution in known:  # on recorded steps, the result must not be worse than any of these
            if _rating(context, recorded, solution) < _rating(context, recorded, best.solution):
                steps, best = recorded, _search(context, recorded, solution)
    low_LE = best.low_LE if context.current is not None else _promoted(context, steps, best)
    placement = certified(problem, strategy, max_steps, context.formats, best.held_LER, low_LE)
    problem.on_progress(1.0)
    return placement


def _known_solutions(context: SearchContext, placements: Sequence[Sequence[LayerPlacement]]) -> list[Solution]:
    """Those of the placements that keep the limits."""
    solutions = [solution_of(context.problem, context.formats, layers) for layers in placements]
    return [solution for solution in solutions if solution is not None and context.keeps_limits(solution)]


def _constructed(context: SearchContext, steps: Sequence[LayerSteps]) -> list[Solution]:
    """Initial solutions made anew: all experts native, or those of least damage low; a `UserError` if none fits."""
    problem, formats = context.problem, context.formats
    mean_LE = np.stack([layer.mean_E for layer in steps])
    options = [(np.zeros(mean_LE.shape, bool), 1)]
    if formats.low is not None and problem.budget_bytes_R is not None:
        low_LE = low_experts(problem, formats)
        group_size = max(formats.native_bytes // (formats.native_bytes - formats.low_bytes), 1)
        # Under rules experts cannot be placed in groups.
        group_sizes = (1, group_size, group_size + 1) if problem.rules == Rules() else (1,)
        options += [(low_LE, size) for size in group_sizes]
    solutions = []
    for low_LE, group_size in options:
        held_LER = _first_replicas(context, mean_LE, low_LE, context.budget_R, group_size)
        if held_LER is not None:
            solutions.append(Solution(held_LER, low_LE))
    if not solutions:
        raise UserError(_too_small(context, mean_LE, options[-1][0]))
    return solutions


def _completed(context: SearchContext, steps: Sequence[LayerSteps], solution: Solution) -> Solution:
    """The solution inside the limits, with a replica of every expert."""
    mean_LE = np.stack([layer.mean_E for layer in steps])
    held_LER = context.complete(solution.held_LER, mean_LE, solution.low_LE, context.budget_R)
    if held_LER is None:
        raise UserError(_too_small(context, mean_LE, solution.low_LE))
    return Solution(held_LER, solution.low_LE)


def _best_initial(context: SearchContext, steps: Sequence[LayerSteps], solutions: Sequence[Solution]) -> Solution:
    """The solution that is best after greedy addition of replicas, judged on some steps of some layers.

    The simplest come first, and the first that is balanced well enough is taken.
    """
    chosen_layers = np.unique(np.linspace(0, len(steps) - 1, LAYERS_TO_CHOOSE).astype(np.int64))
    few_steps = [steps[i].some(STEPS_TO_CHOOSE) for i in chosen_layers]
    ratings = []
    for number, solution in enumerate(solutions):
        part, part_solution = _some_layers(context, solution, chosen_layers)
        ratings.append(SearchState(part, few_steps, part_solution).add_replicas().rating)
        context.problem.on_progress(PROGRESS_AT_START * (number + 1) / len(solutions))
        if ratings[-1][0] <= GOOD_ENOUGH or context.effort.is_over():
            break
    return solutions[ratings.index(min(ratings))]


def _some_layers(context: SearchContext, solution: Solution, chosen_layers: IntArray) -> tuple[SearchContext, Solution]:
    """The same for some layers, with the bytes that they take and their part of the bytes that are left."""
    bytes_LE = context.formats.bytes_of(solution.low_LE)
    used_LR = np.einsum("ler,le->lr", solution.held_LER, bytes_LE)
    left_R = context.budget_R - used_LR.sum(axis=0)
    if len(chosen_layers) < len(used_LR):
        left_R = left_R // len(used_LR) * len(chosen_layers)
    part = replace(
        context,
        budget_R=used_LR[chosen_layers].sum(axis=0) + left_R,
        allowed_LER=context.allowed_LER[chosen_layers],
        fixed_LER=context.fixed_LER[chosen_layers],
    )
    return part, Solution(solution.held_LER[chosen_layers], solution.low_LE[chosen_layers])


def _search(context: SearchContext, steps: Sequence[LayerSteps], initial: Solution) -> SearchState:
    """Add replicas greedily, search each layer, then ruin and recreate over all layers."""
    on_progress = context.problem.on_progress
    state = SearchState(context, steps, initial).add_replicas()
    rest = 0.9 - PROGRESS_AT_START
    state.search(lambda fraction: on_progress(PROGRESS_AT_START + rest * fraction))
    ruin_and_recreate(state, lambda fraction: on_progress(0.9 + 0.09 * fraction))  # the certificate is to come
    return state


def _promoted(context: SearchContext, steps: Sequence[LayerSteps], state: SearchState) -> BoolArray:
    """[L, E] the low experts that remain when the bytes left make others native, unless more bits make it worse."""
    if not context.formats.low:
        return state.low_LE
    damages_LE = damage_LE(context.problem.stats, context.formats.low)
    low_LE = promote_to_native(state.held_LER, state.low_LE, damages_LE, context.formats, state.free_R)
    return low_LE if _rating(context, steps, Solution(state.held_LER, low_LE)) < state.rating else state.low_LE


def _rating(context: SearchContext, steps: Sequence[LayerSteps], solution: Solution) -> tuple[float, int]:
    return SearchState(context, steps, solution).rating


def _first_replicas(
    context: SearchContext, mean_LE: FloatArray, low_LE: BoolArray, budget_R: IntArray, group_size: int
) -> BoolArray | None:
    """[L, E, R] first replicas, of low experts in groups where there are no rules; None if they do not fit."""
    if context.problem.rules != Rules():
        return context.complete(context.fixed_LER, mean_LE, low_LE, budget_R)
    ranks_LE = assign_first_replicas(mean_LE, low_LE, context.formats, budget_R, group_size)
    return None if ranks_LE is None else ranks_LE[:, :, None] == np.arange(len(budget_R))


def _too_small(context: SearchContext, mean_LE: FloatArray, low_LE: BoolArray) -> str:
    """The message for a budget that is too small, with the bytes at which the first replicas alone fit."""
    problem, formats = context.problem, context.formats
    assert problem.budget_bytes_R is not None
    num_ranks = problem.topology.num_ranks
    enough = -(-int(formats.bytes_of(low_LE).sum()) // num_ranks)
    while _first_replicas(context, mean_LE, low_LE, np.full(num_ranks, enough), 1) is None:
        enough += formats.low_bytes
    hint = "" if formats.low else ", or allow a smaller format with --formats and --max-low-precision-share"
    return (
        f"--budget {','.join(map(str, sorted(set(problem.budget_bytes_R))))}: too small for a replica of every expert "
        f"on {num_ranks} ranks: raise it to {enough} bytes per rank{hint}"
    )
