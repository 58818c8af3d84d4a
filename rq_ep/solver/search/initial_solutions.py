"""The solutions that a search begins with: the formats and first replicas of all experts, and which of them is best."""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.rules import Rules
from rq_ep.solver.objective.calibration_steps import LayerSteps
from rq_ep.solver.objective.expert_weights import weights_SE
from rq_ep.solver.objective.precision import ByteSavings
from rq_ep.solver.search.first_replicas import assign_first_replicas
from rq_ep.solver.search.layer_state import GOOD_ENOUGH
from rq_ep.solver.search.local_search import tail_weighted_mean
from rq_ep.solver.search.search_state import SearchContext, SearchState, Solution, solution_of
from rq_ep.solver.workers import ALONE

STEPS_TO_CHOOSE, LAYERS_TO_CHOOSE = 16, 8  # enough to tell a good initial solution from a bad one
GROUPINGS = (0, 1, 2)  # of `assign_first_replicas`
PARTS = (0.25, 0.5, 0.75, 1.0)  # of the bytes that several low formats can save
SAME_BALANCE = 0.001  # of max/mean, which may be given up for less damage
NUM_RANDOM = 4  # random solutions
COARSE_STEPS, COARSE_LAYERS, COARSE_AT_ONCE = 16, 3, 4  # the same and how many replicas are added at once, in a hurry
TIMES_COARSE = 4  # from so much time on, choosing them one by one on all steps comes further
ROUNDING = 1e-4  # of a rating
PROGRESS_AT_START = 0.1  # share of the work that the choice of an initial solution is taken to be


def known_solutions(context: SearchContext, placements: Sequence[Sequence[LayerPlacement]]) -> list[Solution]:
    """Those of the placements that keep the limits."""
    solutions = [solution_of(context.problem, context.formats, layers) for layers in placements]
    return [solution for solution in solutions if solution is not None and context.keeps_limits(solution)]


def constructed(context: SearchContext, steps: Sequence[LayerSteps]) -> tuple[list[Solution], list[Solution]]:
    """Initial solutions made anew: experts native, or those of least damage in one low format; and in several of them.

    Of several formats, the parts of the bytes that they can save make solutions of more and of less damage.

    Raises:
        UserError: none fits the budget.
    """
    problem, formats = context.problem, context.formats
    mean_LE = np.stack([layer.mean_E for layer in steps])
    alone, together = [np.zeros(mean_LE.shape, np.int64)], []
    if formats.low is not None and problem.budget_bytes_R is not None:
        for number in range(1, len(formats.names)):
            alone.append(ByteSavings.of(problem, formats.only(number)).format_LE() * number)
        if len(formats.names) > 2:
            savings = ByteSavings.of(problem, formats)
            together = [savings.format_LE(part * savings.most) for part in PARTS]
    made = [
        [solution for format_LE in choices for solution in _grouped(context, mean_LE, format_LE)]
        for choices in (alone, together)
    ]
    if not any(made):
        raise UserError(_too_small(context, mean_LE, (together or alone)[-1]))
    return made[0], made[1]


def _grouped(context: SearchContext, mean_LE: FloatArray, format_LE: IntArray) -> list[Solution]:
    """First replicas of experts in these formats, grouped in every way that fits."""
    one_way = not format_LE.any() or context.problem.rules != Rules()  # rules place experts one by one
    groupings = GROUPINGS[:1] if one_way else GROUPINGS
    held = [_first_replicas(context, mean_LE, format_LE, context.budget_R, grouping) for grouping in groupings]
    return [Solution(held_LER, format_LE) for held_LER in held if held_LER is not None]


def completed(context: SearchContext, steps: Sequence[LayerSteps], solution: Solution) -> Solution:
    """The solution inside the limits, with a replica of every expert."""
    mean_LE = np.stack([layer.mean_E for layer in steps])
    held_LER = context.complete(solution.held_LER, mean_LE, solution.format_LE, context.budget_R)
    if held_LER is None:
        raise UserError(_too_small(context, mean_LE, solution.format_LE))
    return Solution(held_LER, solution.format_LE)


def best_initial(context: SearchContext, steps: Sequence[LayerSteps], solutions: Sequence[Solution]) -> Solution:
    """The solution that is best after greedy addition of replicas, judged on some steps of some layers.

    The simplest come first, and the first that is balanced well enough is taken.
    """
    num_layers, at_once = LAYERS_TO_CHOOSE, 1
    if context.effort.deadline is not None:
        num_layers, at_once = COARSE_LAYERS, COARSE_AT_ONCE
    chosen_layers = np.unique(np.linspace(0, len(steps) - 1, num_layers).astype(np.int64))
    few_steps = [steps[i].some(STEPS_TO_CHOOSE) for i in chosen_layers]
    alone = replace(context, workers=ALONE)  # the workers take whole solutions

    def rating_of(solution: Solution) -> tuple[float, float]:
        part, part_solution = _some_layers(alone, solution, chosen_layers)
        return SearchState(part, few_steps, part_solution).add_replicas(at_once).rating

    ratings = []
    for rating in context.workers.map(rating_of, solutions):
        ratings.append(rating)
        context.problem.on_progress(PROGRESS_AT_START * len(ratings) / len(solutions))
        if rating[0] <= GOOD_ENOUGH or context.effort.is_over():
            break
    best = min(value for value, _ in ratings)
    as_good = [rating for rating in ratings if rating[0] <= best + SAME_BALANCE]
    return solutions[ratings.index(min(as_good, key=lambda rating: rating[::-1]))]


def filled_in_time(context: SearchContext, steps: Sequence[LayerSteps], solution: Solution) -> Solution:
    """The solution or, where little time is left for a new placement, with replicas that were chosen coarsely."""
    effort, started = context.effort, time.monotonic()
    if effort.deadline is None or effort.is_over() or context.current is not None:
        return solution
    few_steps = [layer.some(COARSE_STEPS) for layer in steps]
    coarse = SearchState(context, few_steps, solution).add_replicas(COARSE_AT_ONCE).solution
    now = time.monotonic()
    return coarse if effort.deadline - now < TIMES_COARSE * (now - started) else solution


def least_value(context: SearchContext, steps: Sequence[LayerSteps], solution: Solution) -> float:
    """A lower bound on the value of a search state of this solution, without a split: experts of one replica alone."""
    problem, values = context.problem, []
    for layer, held_ER, format_E in zip(steps, solution.held_LER, solution.format_LE, strict=True):
        alone_ER = held_ER & (held_ER.sum(axis=1, keepdims=True) == 1)
        loads_SR = weights_SE(problem, context.formats, layer, format_E) @ alone_ER.astype(np.float64)
        native_S = weights_SE(problem, context.formats, layer, np.zeros_like(format_E)).sum(axis=1)
        fullest_S = loads_SR.max(axis=1) * layer.num_ranks / native_S
        values.append(tail_weighted_mean(fullest_S, problem.tail_weight) if len(fullest_S) else 1.0)
    return float(np.mean(values))


def random_solutions(
    context: SearchContext, steps: Sequence[LayerSteps], solutions: Sequence[Solution]
) -> list[Solution]:
    """First replicas for loads that are wrong at random, with the formats of each solution in turn."""
    generator = np.random.default_rng(context.problem.seed)
    mean_LE, random = np.stack([layer.mean_E for layer in steps]), []
    for number in range(NUM_RANDOM):
        format_LE = solutions[number % len(solutions)].format_LE
        wrong_LE = mean_LE * generator.lognormal(size=mean_LE.shape)
        held_LER = _first_replicas(context, wrong_LE, format_LE, context.budget_R, 0)
        if held_LER is not None:
            random.append(Solution(held_LER, format_LE))
    return random


def _some_layers(context: SearchContext, solution: Solution, chosen_layers: IntArray) -> tuple[SearchContext, Solution]:
    """The same for some layers, with the bytes that they take and their part of the bytes that are left."""
    bytes_LE = context.formats.bytes_of(solution.format_LE)
    used_LR = np.einsum("ler,le->lr", solution.held_LER, bytes_LE)
    left_R = context.budget_R - used_LR.sum(axis=0)
    if len(chosen_layers) < len(used_LR):
        left_R = left_R // len(used_LR) * len(chosen_layers)
    part = replace(
        context,
        budget_R=used_LR[chosen_layers].sum(axis=0) + left_R,
        allowed_LER=context.allowed_LER[chosen_layers],
        fixed_LER=context.fixed_LER[chosen_layers],
        damage_FLE=context.damage_FLE[:, chosen_layers],
    )
    return part, Solution(solution.held_LER[chosen_layers], solution.format_LE[chosen_layers])


def _first_replicas(
    context: SearchContext, mean_LE: FloatArray, format_LE: IntArray, budget_R: IntArray, grouping: int
) -> BoolArray | None:
    """[L, E, R] first replicas, in groups where there are no rules; None if they do not fit."""
    if context.problem.rules != Rules():
        return context.complete(context.fixed_LER, mean_LE, format_LE, budget_R)
    ranks_LE = assign_first_replicas(mean_LE, format_LE, context.formats, budget_R, grouping)
    return None if ranks_LE is None else ranks_LE[:, :, None] == np.arange(len(budget_R))


def _too_small(context: SearchContext, mean_LE: FloatArray, format_LE: IntArray) -> str:
    """The message for a budget that is too small, with the bytes at which the first replicas alone fit."""
    problem, formats = context.problem, context.formats
    assert problem.budget_bytes_R is not None
    num_ranks = problem.topology.num_ranks
    enough = -(-int(formats.bytes_of(format_LE).sum()) // num_ranks)
    while _first_replicas(context, mean_LE, format_LE, np.full(num_ranks, enough), 0) is None:
        enough += formats.low_bytes
    hint = "" if formats.low else ", or allow a smaller format with --formats and --max-low-precision-share"
    return (
        f"--budget {','.join(map(str, sorted(set(problem.budget_bytes_R))))}: too small for a replica of every expert "
        f"on {num_ranks} ranks: raise it to {enough} bytes per rank{hint}"
    )
