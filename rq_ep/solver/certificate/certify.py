"""The certificate of a placement: its balance on calibration steps, a lower bound, and how well both generalize."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem, contiguous
from rq_ep.core.replicas import Replicas
from rq_ep.core.strategy import Strategy
from rq_ep.solver.certificate.generalization import generalization, mean_of
from rq_ep.solver.certificate.layer_bounds import bounds_of, holds_for
from rq_ep.solver.objective.calibration_steps import LayerSteps, layer_steps, spread_steps
from rq_ep.solver.objective.objective import busiest_S, described, evaluator_of, step_balances
from rq_ep.solver.objective.precision import Formats, error_LE
from rq_ep.solver.objective.step_balance import EvenSplit

MAX_NAMED = 8  # layers in a warning


def certified(
    problem: PlacementProblem,
    strategy: Strategy,
    max_steps: int,
    formats: Formats,
    held_LER: BoolArray,
    format_LE: IntArray,
) -> Placement:
    """The certified placement in which rank r holds expert e where `held_LER` is true, in its format of `formats`.

    `max_steps` is the number of calibration steps that the solver looked at.
    """
    stats = problem.stats
    layers = [
        LayerPlacement.sharing_evenly(
            number, stats.num_experts, Replicas.from_mask(held_ER, formats.names_of(format_E))
        )
        for number, held_ER, format_E in zip(stats.layers, held_LER, format_LE, strict=True)
    ]
    return certify(problem, strategy, layers, max_steps)


def certify(
    problem: PlacementProblem,
    strategy: Strategy,
    layers: Sequence[LayerPlacement],
    max_steps: int | None = None,
    **notes: Any,
) -> Placement:
    """Put `layers` together as the placement of `strategy`, with shares and figures on the calibration steps.

    The bound of a layer holds for every placement of that layer in as many bytes and low pairs as it takes here, the
    bound in the certificate for every placement of the model inside the budget and the cap; both under any split.
    Where experts are lent in the steps that are evaluated, bytes do not bound.

    Args:
        problem: statistics, ranks and limits.
        strategy: serves the placement, which carries its name; its split is evaluated.
        layers: one for each layer of the statistics; their shares are replaced where the exact split serves.
        max_steps: calibration steps to evaluate, spread over the record; default: the strategy's.
        notes: further entries of the certificate.
    """
    split = evaluator_of(problem, strategy)
    seen_S = spread_steps(problem, strategy.max_steps if max_steps is None else max_steps)
    steps = layer_steps(problem, seen_S)
    balances = step_balances(problem, layers, steps, split)
    if strategy.split == "exact":
        layers = [with_shares(layer, balance.pairs_P) for layer, balance in zip(layers, balances, strict=True)]
    ratios = [balance.ratio_S for balance in balances]
    placement = problem.placement(strategy.name, layers)
    overall, bounds = bounds_of(problem, placement, steps, is_lending=strategy.lends and strategy.split is None)
    layers = [
        replace(layer, predicted=mean_of([ratio_S]), bound=bound.value, binding=bound.binding)
        for layer, ratio_S, bound in zip(layers, ratios, bounds, strict=True)
    ]
    predicted = mean_of(ratios)
    on_other_steps = generalization(problem, layers, split, seen_S, ratios)
    certificate = {
        "objective": f"{described(problem)}, mean over calibration steps and layers",
        "tail_weight": problem.tail_weight,
        "split": split.rule,
        "predicted": predicted,
        "bound": overall.value,
        "bound_holds_for": holds_for(problem),
        "gap": predicted / overall.value - 1,
        "binding": overall.binding,
        "steps": max(len(ratio_S) for ratio_S in ratios),
        **_beside_standard(problem, layers, steps, ratios),
        **_tail(ratios),
        **on_other_steps,
        "warnings": [*_oddities(problem, placement), *on_other_steps["warnings"]],
        "load": _load_R(problem, layers).tolist(),
        "bytes_by_format": _bytes_by_format(problem, layers),
        "replicas_by_format": dict(sorted(Counter(name for la in layers for name in la.replicas.formats_P).items())),
        "formats": _by_format(problem, layers),
        **notes,
    }
    return replace(placement, layers=tuple(layers), certificate=certificate)


def _oddities(problem: PlacementProblem, placement: Placement) -> list[str]:
    """Warnings of what is legal and rarely meant."""
    warnings = []
    pairs_L = problem.stats.counts.sum(axis=(0, 2))
    idle = [str(number) for number, pairs in zip(problem.stats.layers, pairs_L.tolist(), strict=True) if not pairs]
    if idle and len(idle) < len(placement.layers):
        warnings.append(
            f"no pair was recorded in layer {', '.join(idle[:MAX_NAMED])}{', ...' * (len(idle) > MAX_NAMED)}"
        )
    empty = placement.bytes_R.count(0)
    if empty and (problem.budget_bytes_R is None or min(problem.budget_bytes_R) > 0):
        warnings.append(
            f"{empty} of {len(placement.bytes_R)} ranks hold no expert: {problem.stats.num_experts} experts and such "
            "replicas as fit do not fill them; start fewer ranks or raise --budget"
        )
    return warnings


def _by_format(problem: PlacementProblem, layers: Sequence[LayerPlacement]) -> dict[str, dict[str, float]]:
    """What each allowed format stores: experts, their share of the pairs, and the expected damage, where measured.

    `error` is what the experts add to the mean output error that `--max-error` caps, `kl` the sum of what each was
    measured to do to the answers alone. Where an expert comes in several formats, each counts by its share.
    """
    stats = problem.stats
    of_pairs_LE = stats.counts.sum(axis=0) / max(int(stats.counts.sum()), 1)
    rows: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys([*problem.formats, *sorted({name for la in layers for name in la.replicas.formats_P})]):
        shares_LE = np.zeros(of_pairs_LE.shape)
        for shares_E, layer in zip(shares_LE, layers, strict=True):
            is_P = np.array([other == name for other in layer.replicas.formats_P])
            np.add.at(shares_E, layer.replicas.experts_P[is_P], layer.shares_P[is_P])
        rows[name] = {"experts": int((shares_LE > 0).sum()), "pairs": float((shares_LE * of_pairs_LE).sum())}
        if stats.error is not None and name in stats.formats:
            rows[name]["error"] = float((shares_LE * error_LE(stats, name)).sum())
        if stats.kl is not None and name in stats.formats:
            rows[name]["kl"] = float((shares_LE * stats.kl[:, :, stats.formats.index(name)]).sum())
    return rows


def with_shares(layer: LayerPlacement, pairs_P: IntArray) -> LayerPlacement:
    """The layer with the shares that its replicas computed; an unused expert keeps its own."""
    totals_E = np.bincount(layer.replicas.experts_P, pairs_P, minlength=layer.num_experts)
    totals_P = totals_E[layer.replicas.experts_P]
    shares_P = np.divide(pairs_P, totals_P, out=layer.shares_P.copy(), where=totals_P > 0)
    return replace(layer, shares_P=shares_P)


def _tail(ratios: Sequence[FloatArray]) -> dict[str, float]:
    """The tail of the steps: p90 and CVaR (mean of the worst tenth), both mean over layers, and the worst of all."""
    used = [np.sort(ratio_S) for ratio_S in ratios if len(ratio_S)]
    if not used:
        return {"p90": 1.0, "cvar90": 1.0, "worst": 1.0}
    return {
        "p90": float(np.mean([np.quantile(ratio_S, 0.9) for ratio_S in used])),
        "cvar90": float(np.mean([ratio_S[-max(len(ratio_S) // 10, 1) :].mean() for ratio_S in used])),
        "worst": float(max(ratio_S[-1] for ratio_S in used)),
    }


def _beside_standard(
    problem: PlacementProblem,
    layers: Sequence[LayerPlacement],
    steps: Sequence[LayerSteps],
    ratios: Sequence[FloatArray],
) -> dict[str, float]:
    """`standard`: max/mean of standard EP. `of_standard`: load of the busiest rank as a share of standard EP's."""
    plain = contiguous(problem)
    home = EvenSplit(problem.topology.num_ranks, "home")
    standard = [balance.ratio_S for balance in step_balances(problem, plain, steps, home)]

    def carried(placed: Sequence[LayerPlacement], placed_ratios: Sequence[FloatArray]) -> float:
        rows = zip(placed, steps, placed_ratios, strict=True)
        return sum(float(busiest_S(problem, one, of_layer, ratio_S).sum()) for one, of_layer, ratio_S in rows)

    of_standard = carried(plain, standard)
    return {
        "standard": mean_of(standard),
        "of_standard": carried(layers, ratios) / of_standard if of_standard else 1.0,
    }


def _load_R(problem: PlacementProblem, layers: Sequence[LayerPlacement]) -> FloatArray:
    """[R] planned load of each rank in units of the mean, mean over layers."""
    loads_LE = problem.stats.counts.sum(axis=0)
    num_ranks = problem.topology.num_ranks
    loads_LR = np.stack([layer.loads_R(loads_E, num_ranks) for layer, loads_E in zip(layers, loads_LE, strict=True)])
    means_L1 = loads_LR.mean(axis=1, keepdims=True)
    load_R: FloatArray = np.divide(loads_LR, means_L1, out=np.ones_like(loads_LR), where=means_L1 > 0).mean(axis=0)
    return load_R


def _bytes_by_format(problem: PlacementProblem, layers: Sequence[LayerPlacement]) -> dict[str, list[int]]:
    """Format -> [R] bytes of its replicas on each rank."""
    bytes_by_format: dict[str, list[int]] = {}
    for name in sorted({name for layer in layers for name in layer.replicas.formats_P}):
        number_R = np.zeros(problem.topology.num_ranks, np.int64)
        for layer in layers:
            is_P = np.array([other == name for other in layer.replicas.formats_P])
            number_R += np.bincount(layer.replicas.ranks_P[is_P], minlength=len(number_R))
        bytes_by_format[name] = (number_R * problem.stats.expert_bytes[name]).tolist()
    return bytes_by_format
