"""Placement for engines of equal slots: as many replicas on every rank, one format, an expert's pairs split evenly.

SGLang, TensorRT-LLM, vLLM and vLLM-Ascend serve that way. EPLB places for the mean load. Here a search goes on from
EPLB's placement, layer by layer, for the mean over steps of max/mean or, where one step was recorded, for that alone.

Axes: J slots of a rank; A attempted moves.
"""

from collections.abc import Sequence
from dataclasses import replace
from time import monotonic
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.core.rules import Rules
from rq_ep.core.strategy import Strategy
from rq_ep.solver.certificate.certify import certify
from rq_ep.solver.objective.calibration_steps import LayerSteps, calibration_steps
from rq_ep.solver.search.slots.rank_leveling import leveled
from rq_ep.solver.search.slots.slot_search import even_imbalance, improve_slots
from rq_ep.solver.workers import workers

MAX_STEPS = 256  # of calibration that the search looks at; 64 leave up to 0.03 more of max/mean on held-out steps
MAX_MOVES = 20_000  # attempted in each layer; three times as many gain less than 0.01


def place_slots(
    problem: PlacementProblem,
    strategy: Strategy,
    start: Sequence[LayerPlacement],
    max_steps: int = MAX_STEPS,
    max_moves: int = MAX_MOVES,
) -> Placement:
    """The best placement of the search with as many slots as `start`, never worse than it on the calibration steps.

    Args:
        problem: statistics, ranks and limits; `rules.whole_groups` keeps groups of experts on nodes.
        strategy: serves the placement, which carries its name; it must split evenly, as `eplb` does.
        start: the initial placement, such as EPLB's layers.
        max_steps: calibration steps to look at, spread over the record.
        max_moves: moves attempted in each layer.

    Raises:
        UserError: `start` has no equal slots, or a limit is set that these engines do not know.
    """
    _check_limits(problem)
    deadline = None if problem.time_limit_s is None else monotonic() + problem.time_limit_s
    rows = zip(
        start,
        calibration_steps(problem, max_steps),
        problem.rules.allowed_LER(problem.stats, problem.topology),
        strict=True,
    )
    tasks = [
        _SlotTask(
            steps, _slots_of(layer, problem.topology.num_ranks), allowed_ER, max_moves, (problem.seed, i), deadline
        )
        for i, (layer, steps, allowed_ER) in enumerate(rows)
    ]
    layers = []
    with workers(problem.num_workers) as threads:
        for layer, slots_RJ in zip(start, threads.map(_improved, tasks), strict=True):
            layers.append(_layer_of(layer, slots_RJ, problem.stats.native_format))
            problem.on_progress(len(layers) / len(tasks))
    before = [even_imbalance(task.steps, task.slots_RJ) for task in tasks]
    placement = certify(problem, strategy, layers, max_steps, searched_from=round(float(np.mean(before)), 4))
    return _bounded_by_slots(placement)


class _SlotTask(NamedTuple):
    """A layer to search."""

    steps: LayerSteps
    slots_RJ: IntArray
    allowed_ER: BoolArray
    max_moves: int
    entropy: tuple[int, ...]
    deadline: float | None


def _improved(task: _SlotTask) -> IntArray:
    is_over = task.deadline is not None and monotonic() >= task.deadline
    draws_A3 = np.random.default_rng(task.entropy).random((0 if is_over else task.max_moves, 3))
    if len(task.steps.counts_SE) == 1:  # the mean alone; numbers of replicas that fit it better fit other steps worse
        recorded_SE = task.steps.counts_SE if task.steps.recorded_SE is None else task.steps.recorded_SE
        return leveled(recorded_SE[0].astype(np.float64), task.slots_RJ, task.allowed_ER)
    return improve_slots(task.steps, task.slots_RJ, task.allowed_ER, draws_A3)


def check_slots(problem: PlacementProblem) -> int:
    """The number of slots of each rank in each layer, for the experts and `num_redundant_experts` more.

    Raises:
        UserError: they are not as many on every rank; the message names numbers that would be.
    """
    num_experts, num_ranks = problem.stats.num_experts, problem.topology.num_ranks
    num_slots = num_experts + problem.num_redundant_experts
    if num_slots % num_ranks:
        above = -num_slots % num_ranks
        near = [problem.num_redundant_experts + change for change in (above - num_ranks, above)]
        fitting = " or ".join(str(number) for number in near if number >= 0)
        raise UserError(
            f"--num-redundant-experts {problem.num_redundant_experts}: {num_experts} experts and these are "
            f"{num_slots} slots, not a multiple of {num_ranks} ranks: {fitting} would do"
        )
    if num_slots > num_experts * num_ranks:
        raise UserError(
            f"--num-redundant-experts {problem.num_redundant_experts}: {num_slots // num_ranks} slots on a rank for "
            f"{num_experts} experts, so some would be there twice: {num_experts * (num_ranks - 1)} at most"
        )
    return num_slots // num_ranks


def _bounded_by_slots(placement: Placement) -> Placement:
    """The placement with a bound for as many slots in every layer: these engines cannot give one layer another's."""
    bounds = [layer.bound or 1.0 for layer in placement.layers]
    bound = float(np.mean(bounds))
    certificate = {
        **placement.certificate,
        "bound": bound,
        "gap": placement.certificate["predicted"] / bound - 1,
        "binding": placement.layers[int(np.argmax(bounds))].binding,
    }
    return replace(placement, certificate=certificate)


def _check_limits(problem: PlacementProblem) -> None:
    """Refuse by name what an engine of equal slots cannot keep or this search does not weigh."""
    unsupported = {
        f"--objective {problem.objective}": problem.objective != "prefill",
        f"--tail-weight {problem.tail_weight:g}": problem.tail_weight > 0,
        f"--max-error {problem.max_error}": problem.max_error is not None,
        f"--max-moved-bytes {problem.max_moved_bytes}": problem.max_moved_bytes is not None,
        f"--move-price {problem.move_price:g}": problem.move_price > 0,
        "--rules": replace(problem.rules, whole_groups=False) != Rules(),
    }
    for what, is_set in unsupported.items():
        if is_set:
            raise UserError(
                f"{what}: not kept for engines of equal slots, whose pairs are balanced, by whole groups at most: "
                "leave it out, or place with rq"
            )


def _slots_of(layer: LayerPlacement, num_ranks: int) -> IntArray:
    replicas = layer.replicas
    on_rank_R = np.bincount(replicas.ranks_P, minlength=num_ranks)
    if (on_rank_R != on_rank_R[0]).any():
        raise UserError(
            f"layer {layer.index}: {on_rank_R.min()} to {on_rank_R.max()} slots on a rank; these engines have equally "
            "many: choose --num-redundant-experts so that experts and redundant ones divide by --num-ranks"
        )
    slots_RJ: IntArray = replicas.experts_P.reshape(num_ranks, -1)
    return slots_RJ


def _layer_of(start: LayerPlacement, slots_RJ: IntArray, native_format: str) -> LayerPlacement:
    replicas = [Replica(rank, expert, native_format) for rank, row in enumerate(slots_RJ.tolist()) for expert in row]
    return LayerPlacement.even(start.index, start.num_experts, replicas)
