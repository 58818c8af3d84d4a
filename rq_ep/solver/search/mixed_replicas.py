"""Replicas of one expert in two formats: further replicas in few bits take a half or a quarter of the bytes.

First, some placements are solved whose experts keep to one format each; they leave more or less of the cap on low
pairs. In each of them extra native replicas are exchanged for low ones, those first whose exchange costs least balance,
and the freed bytes are filled with more low replicas. Several numbers of exchanges are tried. The best placement inside
the caps is taken, which may be one that mixes nothing.

Steps are split by `split.two_format_split`: in no step do low replicas compute more than half of their expert's pairs.
The pairs that they compute of the calibration steps count against the caps.

Axes: V virtual experts: the upper and then the lower halves of the experts' pairs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replicas
from rq_ep.core.strategy import Strategy
from rq_ep.solver.certificate.certify import certify, with_shares
from rq_ep.solver.objective.calibration_steps import LayerSteps, calibration_steps
from rq_ep.solver.objective.precision import Formats, damage_LE, error_LE
from rq_ep.solver.objective.step_balance import ExactSplit
from rq_ep.solver.search.greedy_fill import add_replicas
from rq_ep.solver.search.layer_state import GOOD_ENOUGH, LayerSplit
from rq_ep.solver.search.local_search import tail_weighted_mean
from rq_ep.solver.search.neighborhood import LayerLimits
from rq_ep.solver.search.search_state import UNLIMITED, Solution, solution_of

PARTS = (1.0, 0.9, 0.85, 0.8, 0.7, 0.6)  # of the cap on low pairs, for whole experts
EXCHANGED = (1.0, 0.5, 0.25, 0.12, 0.06, 0.0)  # of the extra replicas
STEPS_TO_PRICE = 16  # calibration steps on which exchanges are priced
LEAST_GAIN = 5e-4  # of max/mean


class Mixture(NamedTuple):
    """Layers, and what they make of the calibration steps."""

    layers: list[LayerPlacement]
    value: float  # max/mean over ranks, as the problem weighs the tail
    low_LE: FloatArray  # share of each expert's pairs that is computed in few bits


def place_mixed(
    problem: PlacementProblem,
    strategy: Strategy,
    max_steps: int,
    solve_uniform: Callable[[PlacementProblem], Placement],
) -> Placement:
    """The best placement of the search in which experts may have replicas in two formats.

    Args:
        problem: its caps hold for low replicas, too.
        strategy: serves the placement, which carries its name.
        max_steps: calibration steps to look at.
        solve_uniform: places with one format for all replicas of an expert.

    Raises:
        UserError: the budget is too small.
    """
    steps, best, uniform = calibration_steps(problem, max_steps), None, None
    for number, part in enumerate(PARTS):
        part_problem = replace(
            problem,
            max_low_precision_share=part * problem.max_low_precision_share,
            time_limit_s=None if problem.time_limit_s is None else problem.time_limit_s / len(PARTS),
            on_progress=partial(_progress, problem, number),
        )
        try:
            placement = solve_uniform(part_problem)
        except UserError:
            if uniform is None:
                raise
            break  # with so few low experts the bytes are too few
        mixing = _Mixing.of(problem, steps, placement.layers)
        if uniform is None or best is None:
            uniform, best = placement, mixing.evaluated(mixing.uniform.held_LER, np.zeros_like(mixing.uniform.held_LER))
        for mixture in mixing.mixtures():
            if mixture.value < best.value - LEAST_GAIN and mixing.keeps_caps(mixture):
                best = mixture
        if best.value <= GOOD_ENOUGH:
            break
    assert uniform is not None
    assert best is not None
    problem.on_progress(1.0)
    unmixed = uniform.certificate["predicted"]
    return certify(problem, strategy, best.layers, max_steps, predicted_unmixed=unmixed)


def _progress(problem: PlacementProblem, number: int, fraction: float) -> None:
    problem.on_progress((number + fraction) / (len(PARTS) + 1))


@dataclass(frozen=True)
class _Mixing:
    """A placement of one format for each expert, and the mixtures that can be made of it."""

    problem: PlacementProblem
    formats: Formats
    steps: Sequence[LayerSteps]
    uniform: Solution
    may_mix_LE: BoolArray  # experts that may have low replicas beside native ones

    @classmethod
    def of(cls, problem: PlacementProblem, steps: Sequence[LayerSteps], layers: Sequence[LayerPlacement]) -> "_Mixing":
        formats = Formats.of(problem)
        uniform = solution_of(problem, formats, layers)
        assert uniform is not None
        assert formats.low is not None
        visited_LE = np.isfinite(damage_LE(problem.stats, formats.low))
        return cls(problem, formats, steps, uniform, visited_LE & ~uniform.low_LE)

    def mixtures(self) -> Iterator[Mixture]:
        """Mixtures with more and fewer native replicas exchanged, and the freed bytes filled."""
        exchanges = self._by_cost()
        for number in sorted({round(part * len(exchanges)) for part in EXCHANGED}, reverse=True):
            native_LER, low_LER = self.uniform.held_LER.copy(), np.zeros_like(self.uniform.held_LER)
            for i, expert, rank in exchanges[:number]:
                if native_LER[i, expert].sum() > 1:
                    native_LER[i, expert, rank], low_LER[i, expert, rank] = False, True
            yield self.evaluated(native_LER, self._filled(native_LER, low_LER))

    def evaluated(self, native_LER: BoolArray, low_LER: BoolArray) -> Mixture:
        """The mixture of replicas in their experts' formats and further low ones, evaluated on all steps."""
        rows = zip(self.steps, range(len(native_LER)), native_LER, low_LER, strict=True)
        layers, values, low = zip(*(self._evaluated_layer(*row) for row in rows), strict=True)
        return Mixture(list(layers), float(np.mean(values)), np.stack(low))

    def keeps_caps(self, mixture: Mixture) -> bool:
        """Whether low pairs and predicted errors are inside the problem's caps; a low pair's error is the mean one."""
        problem, formats = self.problem, self.formats
        pairs_LE = problem.stats.counts.sum(axis=0)
        if (mixture.low_LE * pairs_LE).sum() > problem.max_low_precision_share * int(pairs_LE.sum()):
            return False
        if problem.max_error is None:
            return True
        assert formats.low is not None
        native_LE, low_LE = error_LE(problem.stats, formats.native), error_LE(problem.stats, formats.low)
        return bool((native_LE + mixture.low_LE * (low_LE - native_LE)).sum() <= problem.max_error)

    def _evaluated_layer(
        self, steps: LayerSteps, i: int, native_ER: BoolArray, low_ER: BoolArray
    ) -> tuple[LayerPlacement, float, FloatArray]:
        """A layer, its max/mean, and [E] the share of its experts' pairs in few bits."""
        formats, num_experts = self.formats, len(native_ER)
        assert formats.low is not None
        ranks_P, experts_P = np.nonzero((native_ER | low_ER).T)
        is_low_P = self.uniform.low_LE[i, experts_P] | low_ER[experts_P, ranks_P]
        names = tuple(formats.low if low else formats.native for low in is_low_P.tolist())
        replicas = Replicas(ranks_P, experts_P, names, (formats.low, formats.native) if low_ER.any() else ())
        balance = ExactSplit(steps.num_ranks).balance(replicas, steps.counts_SE)
        even_P = 1 / np.bincount(experts_P, minlength=num_experts)[experts_P]
        layer = with_shares(
            LayerPlacement(self.problem.stats.layers[i], num_experts, replicas, even_P), balance.pairs_P
        )
        low_E = np.bincount(experts_P, layer.shares_P * is_low_P, minlength=num_experts).astype(np.float64)
        value = tail_weighted_mean(balance.ratio_S, self.problem.tail_weight) if len(balance.ratio_S) else 1.0
        return layer, float(value), low_E

    def _by_cost(self) -> list[tuple[int, int, int]]:
        """(layer, expert, rank) of native replicas of experts that have others, the cheapest to exchange first.

        What one exchange costs alone: balance, then low pairs.
        """
        costs = []
        for i, steps in enumerate(self.steps):
            few, held_ER = steps.some(STEPS_TO_PRICE), self.uniform.held_LER[i]
            low_ER = np.zeros_like(held_ER)
            _, before, _ = self._evaluated_layer(few, i, held_ER, low_ER)
            extra_ER = held_ER & (self.may_mix_LE[i] & (held_ER.sum(axis=1) > 1))[:, None]
            for expert, rank in np.argwhere(extra_ER).tolist():
                low_ER[expert, rank] = True
                _, after, low_E = self._evaluated_layer(few, i, held_ER & ~low_ER, low_ER)
                low_ER[expert, rank] = False
                low_pairs = low_E[expert] * int(self.problem.stats.counts[:, i, expert].sum())
                costs.append((after - before, low_pairs, (i, expert, rank)))
        return [exchange for _, _, exchange in sorted(costs)]

    def _filled(self, native_LER: BoolArray, low_LER: BoolArray) -> BoolArray:
        """[L, E, R] the low replicas and further ones, added greedily while they fit and gain."""
        problem, formats = self.problem, self.formats
        bytes_LE = formats.bytes_of(self.uniform.low_LE)
        used_R = np.einsum("ler,le->r", native_LER, bytes_LE) + low_LER.sum(axis=(0, 1)) * formats.low_bytes
        budget_R = np.array(problem.budget_bytes_R or [UNLIMITED] * problem.topology.num_ranks, np.int64)
        allowed_LER = problem.rules.allowed_LER(problem.stats, problem.topology) & self.may_mix_LE[:, :, None]
        free_R, move_budget = budget_R - used_R, np.array([UNLIMITED])
        layers = [self._virtual_layer(*row) for row in zip(self.steps, native_LER, low_LER, strict=True)]
        limits = [self._virtual_limits(*row, free_R, move_budget) for row in zip(bytes_LE, allowed_LER, strict=True)]
        add_replicas(layers, limits, lambda: False)
        lower_LER = np.stack([layer.held_ER[len(native_LER[0]) :] for layer in layers])
        return lower_LER & ~native_LER

    def _virtual_layer(self, steps: LayerSteps, native_ER: BoolArray, low_ER: BoolArray) -> LayerSplit:
        """A layer with two virtual experts for each expert, as `split.two_format_split` has them."""
        lower_SE = steps.counts_SE // 2
        counts_SV = np.concatenate([steps.counts_SE - lower_SE, lower_SE], axis=1)
        return LayerSplit.of(
            replace(steps, counts_SE=counts_SV).loads_SE, np.concatenate([native_ER, native_ER | low_ER])
        )

    def _virtual_limits(
        self, bytes_E: IntArray, allowed_ER: BoolArray, free_R: IntArray, move_budget: IntArray
    ) -> LayerLimits:
        """The limits of virtual experts: only lower halves may get more replicas, low ones."""
        topology, num_virtual = self.problem.topology, 2 * len(bytes_E)
        return LayerLimits(
            bytes_E=np.concatenate([bytes_E, np.full_like(bytes_E, self.formats.low_bytes)]),
            free_R=free_R,
            allowed_ER=np.concatenate([np.zeros_like(allowed_ER), allowed_ER]),
            fixed_ER=np.zeros((num_virtual, topology.num_ranks), bool),
            nodes_R=topology.nodes_R,
            num_nodes=topology.num_nodes if self.problem.rules.spread_nodes else 1,
            present_ER=np.ones((num_virtual, topology.num_ranks), bool),
            price=0.0,
            move_budget=move_budget,
        )
