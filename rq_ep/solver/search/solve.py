"""The placement solver: formats, homes, replicas and moves inside a byte budget per rank over all layers.

Several ways to begin are tried on some of the steps, and the search goes on from the best. The result is never worse
than standard EP's contiguous blocks or the candidates it is given.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem, contiguous
from rq_ep.core.rules import Rules
from rq_ep.solver.certificate.certify import certified
from rq_ep.solver.objective.calibration_steps import LayerSteps, calibration_steps
from rq_ep.solver.objective.denoise_steps import redrawn
from rq_ep.solver.objective.precision import damage_LE, low_experts
from rq_ep.solver.search.first_replicas import deal_homes
from rq_ep.solver.search.greedy_fill import promoted
from rq_ep.solver.search.layer_state import GOOD_ENOUGH
from rq_ep.solver.search.ruin_recreate import trade
from rq_ep.solver.search.search_state import Draft, Ready, Start, start_of

STEPS_TO_CHOOSE, LAYERS_TO_CHOOSE = 16, 8  # enough to tell a good beginning from a bad one
PROGRESS_AT_START = 0.1  # what the choice of a beginning is taken to be of the whole


def solve(
    problem: PlacementProblem,
    strategy: str,
    max_steps: int,
    max_moves: int,
    current: Placement | None = None,
    candidates: Sequence[Sequence[LayerPlacement]] = (),
) -> Placement:
    """Place every layer of `problem`.

    Args:
        problem: statistics, ranks, limits, and what to lower. With `time_limit_s` the best found until then.
        strategy: the name the placement will carry.
        max_steps: calibration steps to look at, spread over the record.
        max_moves: moves of replicas tried in each layer.
        current: a placement of the same layers on as many ranks to begin from. It may lack experts, hold too much or
            break rules (a rank was lost, its budget cut): homes are found and replicas given up first. Its formats
            stay. Beyond that, no more than `problem.max_moved_bytes` are moved, and a move must gain more than
            `problem.move_price` asks for its bytes.
        candidates: layers of other placements that the result must not be worse than, and may begin from.

    Raises:
        UserError: the budget is too small (the message says how many bytes would do), or `current` has formats that
            the problem may not use.
    """
    recorded = calibration_steps(problem, max_steps)
    steps = redrawn(problem, recorded)
    ready = Ready.of(problem, max_moves, current)
    if ready.current is not None:
        best = _searched(ready, steps, _repaired(ready, steps, ready.current))
    else:
        known = (start_of(problem, ready.formats, layers) for layers in (contiguous(problem), *candidates))
        plain = [start for start in known if start is not None and ready.keeps_limits(start)]
        best = _searched(ready, steps, _best_start(ready, steps, [*plain, *_dealt(ready, steps)]))
        for start in plain:
            if Draft(ready, recorded, start).rating < Draft(ready, recorded, best.start).rating:
                steps, best = recorded, _searched(ready, recorded, start)
    held_LER, low_LE = best.held_LER, best.low_LE
    if ready.formats.low and ready.current is None:
        more_bits_LE = promoted(
            held_LER, low_LE, damage_LE(problem.stats, ready.formats.low), ready.formats, best.free_R
        )
        if Draft(ready, steps, Start(held_LER, more_bits_LE)).rating < best.rating:  # more bits may be slower
            low_LE = more_bits_LE
    placement = certified(problem, strategy, max_steps, ready.formats, held_LER, low_LE)
    problem.on_progress(1.0)
    return placement


def _searched(ready: Ready, steps: Sequence[LayerSteps], start: Start) -> Draft:
    draft = Draft(ready, steps, start).fill()
    rest = 0.9 - PROGRESS_AT_START
    draft.search(lambda fraction: ready.problem.on_progress(PROGRESS_AT_START + rest * fraction))
    trade(draft, lambda fraction: ready.problem.on_progress(0.9 + 0.09 * fraction))  # the certificate is to come
    return draft


def _best_start(ready: Ready, steps: Sequence[LayerSteps], starts: Sequence[Start]) -> Start:
    """The start that fills up best on some steps of some layers; the plainest come first, and are taken if they do."""
    chosen = np.unique(np.linspace(0, len(steps) - 1, LAYERS_TO_CHOOSE).astype(np.int64))
    few = [steps[at].some(STEPS_TO_CHOOSE) for at in chosen]
    ratings = []
    for number, start in enumerate(starts):
        ratings.append(Draft(*_part(ready, few, start, chosen)).fill().rating)
        ready.problem.on_progress(PROGRESS_AT_START * (number + 1) / len(starts))
        if ratings[-1][0] <= GOOD_ENOUGH or ready.effort.is_over():
            break
    return starts[ratings.index(min(ratings))]


def _part(
    ready: Ready, steps: list[LayerSteps], start: Start, chosen: IntArray
) -> tuple[Ready, list[LayerSteps], Start]:
    """The same for some layers, with what these take and their part of the bytes that are left."""
    bytes_LE = ready.formats.bytes_of(start.low_LE)
    used_LR = np.einsum("ler,le->lr", start.held_LER, bytes_LE)
    left_R = ready.budget_R - used_LR.sum(axis=0)
    if len(chosen) < len(used_LR):
        left_R = left_R // len(used_LR) * len(chosen)
    part = replace(
        ready,
        budget_R=used_LR[chosen].sum(axis=0) + left_R,
        allowed_LER=ready.allowed_LER[chosen],
        fixed_LER=ready.fixed_LER[chosen],
    )
    return part, steps, Start(start.held_LER[chosen], start.low_LE[chosen])


def _dealt(ready: Ready, steps: Sequence[LayerSteps]) -> list[Start]:
    """Starts made anew: all experts native, or the least missed low; a `UserError` if none fits."""
    problem, formats = ready.problem, ready.formats
    mean_LE = np.stack([layer.mean_E for layer in steps])
    options = [(np.zeros(mean_LE.shape, bool), 1)]
    if formats.low is not None and problem.budget_bytes_R is not None:
        low_LE = low_experts(problem, formats)
        group = max(formats.native_bytes // (formats.native_bytes - formats.low_bytes), 1)
        groups = (1, group, group + 1) if problem.rules == Rules() else (1,)  # rules leave no room for patterns
        options += [(low_LE, number) for number in groups]
    starts = []
    for low_LE, group in options:
        held_LER = _homes(ready, mean_LE, low_LE, ready.budget_R, group)
        if held_LER is not None:
            starts.append(Start(held_LER, low_LE))
    if not starts:
        raise UserError(_too_small(ready, mean_LE, options[-1][0]))
    return starts


def _homes(ready: Ready, mean_LE: FloatArray, low_LE: BoolArray, budget_R: IntArray, group: int) -> BoolArray | None:
    """[L, E, R] a home for every expert, low ones dealt in groups where there are no rules; None if it does not fit."""
    if ready.problem.rules != Rules():
        return ready.homes(ready.fixed_LER, mean_LE, low_LE, budget_R)
    homes_LE = deal_homes(mean_LE, low_LE, ready.formats, budget_R, group)
    return None if homes_LE is None else homes_LE[:, :, None] == np.arange(len(budget_R))


def _repaired(ready: Ready, steps: Sequence[LayerSteps], start: Start) -> Start:
    """The start inside the limits, with a home for every expert."""
    mean_LE = np.stack([layer.mean_E for layer in steps])
    held_LER = ready.homes(start.held_LER, mean_LE, start.low_LE, ready.budget_R)
    if held_LER is None:
        raise UserError(_too_small(ready, mean_LE, start.low_LE))
    return Start(held_LER, start.low_LE)


def _too_small(ready: Ready, mean_LE: FloatArray, low_LE: BoolArray) -> str:
    """What to tell the user: the bytes with which the homes alone fit."""
    problem, formats = ready.problem, ready.formats
    assert problem.budget_bytes_R is not None
    num_ranks = problem.topology.num_ranks
    enough = -(-int(formats.bytes_of(low_LE).sum()) // num_ranks)
    while _homes(ready, mean_LE, low_LE, np.full(num_ranks, enough), 1) is None:
        enough += formats.low_bytes
    hint = "" if formats.low else ", or allow a smaller format with --formats and --max-low-precision-share"
    return (
        f"--budget {','.join(map(str, sorted(set(problem.budget_bytes_R))))}: too small for a replica of every expert "
        f"on {num_ranks} ranks: raise it to {enough} bytes per rank{hint}"
    )
