"""The next placement for a load: from the one that serves, by few moves, or as a strategy places anew."""

from collections.abc import Sequence
from dataclasses import replace

from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.strategy import Strategy
from rq_ep.solver.migration.choose_migration import moved_bytes_LR
from rq_ep.solver.migration.fit_formats import enforce_low_cap
from rq_ep.solver.migration.refit_formats import refit_formats, saved_bytes
from rq_ep.solver.objective.precision import Formats

WORTH_REFITTING = 1.1  # times as many experts in few bits, for which more than the least number changes its format
FEW_EXPERTS = 32  # of a layer, up to which one expert is so large a part of the bytes that a higher price may be better
HIGHER_PRICES = (2, 4)  # times the price: a search seldom takes back what it has moved


def replan(
    problem: PlacementProblem, strategy: Strategy, current: Placement, price_factor: float = 1.0
) -> Placement | None:
    """The placement that the strategy finds for the problem's statistics; None if it finds none inside the limits.

    Where it begins from the one that serves, a move must gain more than `problem.move_price` asks for its bytes.

    Args:
        problem: the load to place for, and the limits.
        strategy: places.
        current: what serves.
        price_factor: times the price, that the search asks for.
    """
    try:
        if not strategy.begins_from_current:
            return strategy.place(replace(problem, move_price=0.0))
        layers = _with_fitting_formats(problem, strategy, current.layers)
        bytes_R = bytes_by_rank(layers, problem.topology.num_ranks, problem.stats.expert_bytes)
        beginning = Placement(tuple(layers), strategy.name, problem.topology, tuple(bytes_R.tolist()))
        held = [list(layer.replicas) for layer in current.layers]
        priced = replace(problem, held=held, move_price=price_factor * problem.move_price)
        return strategy.place(priced, beginning)
    except UserError:  # from there, the search does not get inside the limits
        return None


def refined(problem: PlacementProblem, strategy: Strategy, current: Placement, placement: Placement) -> Placement:
    """The placement or, where experts are few, one found at a higher price, if it is better at the price itself.

    Args:
        problem, strategy, current: as for `replan`.
        placement: what that has found.
    """
    if not strategy.begins_from_current or problem.stats.num_experts > FEW_EXPERTS or not problem.move_price:
        return placement

    def with_price(one: Placement) -> float:
        return float(one.certificate["predicted"]) + price_of(problem, moved_bytes(problem, current, one))

    others = (replan(problem, strategy, current, factor) for factor in HIGHER_PRICES)
    return min([placement, *(one for one in others if one is not None)], key=with_price)


def moved_bytes(problem: PlacementProblem, current: Placement, placement: Placement) -> int:
    """Bytes that all ranks together receive on the way from one placement to the other."""
    return int(moved_bytes_LR([list(layer.replicas) for layer in current.layers], placement.layers, problem).sum())


def price_of(problem: PlacementProblem, num_bytes: int) -> float:
    """What moving so many bytes must gain, in max/mean."""
    assert problem.budget_bytes_R is not None
    return problem.move_price * num_bytes / max(sum(problem.budget_bytes_R), 1)


def _with_fitting_formats(
    problem: PlacementProblem, strategy: Strategy, layers: Sequence[LayerPlacement]
) -> Sequence[LayerPlacement]:
    """The layers with as few changes of format as the cap asks for or, where that frees more bytes, as many as fit."""
    kept = enforce_low_cap(problem, layers)
    refitted = refit_formats(problem, layers, _bytes_to_save(problem, strategy, layers))
    native = problem.stats.native_format
    return refitted if _num_low(refitted, native) > WORTH_REFITTING * _num_low(kept, native) else kept


def _bytes_to_save(problem: PlacementProblem, strategy: Strategy, layers: Sequence[LayerPlacement]) -> int | None:
    """What several low formats are to save: as much as they do or, where none is used yet, as in a new placement.

    None for one low format, of which as much is used as the caps allow.
    """
    if len(Formats.of(problem).names) <= 2:
        return None
    return saved_bytes(problem, layers) or saved_bytes(problem, strategy.place(replace(problem, move_price=0.0)).layers)


def _num_low(layers: Sequence[LayerPlacement], native: str) -> int:
    """Experts stored in another format than the native one."""
    return sum(len({one.expert for one in layer.replicas if one.format != native}) for layer in layers)
