"""The placement solver: formats, homes, replicas and swaps inside a byte budget per rank over all layers.

Several ways to begin are tried, and the one with the best balance on the calibration steps is kept; standard EP's
contiguous blocks are among them, so the result is never worse than these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.topology import home_ranks
from rq_ep.solver.certify import certified
from rq_ep.solver.cuts import LayerBalance, starting_sets
from rq_ep.solver.fill import GOOD_ENOUGH, fill, promote
from rq_ep.solver.homes import deal_homes
from rq_ep.solver.improve import improve, trim
from rq_ep.solver.precision import Formats, damage_LE, least_missed
from rq_ep.solver.steps import LayerSteps, calibration_steps

BoolArray = npt.NDArray[np.bool_]
UNLIMITED = 2**60
NUM_ROUNDS = 2  # of filling and moving
COST_OF_INEXACT = 5  # a move takes that much longer where sets of ranks are too many to list, so fewer are tried


@dataclass
class Draft:
    """A placement being made: every expert has a home, and what is left of each rank's bytes."""

    layers: list[LayerBalance]
    low_LE: BoolArray
    bytes_LE: IntArray
    free_R: IntArray

    @classmethod
    def of(
        cls,
        problem: PlacementProblem,
        steps: Sequence[LayerSteps],
        formats: Formats,
        homes_LE: IntArray,
        low_LE: BoolArray,
    ) -> "Draft":
        num_ranks = problem.topology.num_ranks
        sets_GR = starting_sets(num_ranks)
        held_LER = homes_LE[:, :, None] == np.arange(num_ranks)
        bytes_LE = formats.bytes_of(low_LE)
        free_R = _budget(problem) - np.einsum("ler,le->r", held_LER, bytes_LE)
        layers = [LayerBalance(layer, held_ER, sets_GR) for layer, held_ER in zip(steps, held_LER, strict=True)]
        return cls(layers, low_LE.copy(), bytes_LE, free_R)

    @property
    def rating(self) -> tuple[float, int]:
        """Lower is better: mean balance, taken as good enough below a threshold, then fewer experts in few bits."""
        imbalance = float(np.mean([layer.refine() for layer in self.layers])) if self.layers else 1.0
        return max(round(imbalance, 4), GOOD_ENOUGH), int(self.low_LE.sum())

    def complete(self, max_moves: int, seed: int, on_progress: Callable[[float], None] = lambda fraction: None) -> None:
        """Replicas by gain, then moves; bytes that a balanced layer can spare serve the others in a second round."""
        generator = np.random.default_rng(seed)
        if not all(layer.is_exact for layer in self.layers):
            max_moves //= COST_OF_INEXACT
        for turn in range(NUM_ROUNDS):
            if turn and any(layer.imbalance > GOOD_ENOUGH for layer in self.layers):
                for layer, bytes_E in zip(self.layers, self.bytes_LE, strict=True):
                    trim(layer, bytes_E, self.free_R)
            fill(self.layers, self.bytes_LE, self.free_R)
            for done, (layer, bytes_E) in enumerate(zip(self.layers, self.bytes_LE, strict=True)):
                improve(layer, bytes_E, self.free_R, max_moves // NUM_ROUNDS, generator)
                on_progress((turn + (done + 1) / len(self.layers)) / NUM_ROUNDS)
        fill(self.layers, self.bytes_LE, self.free_R)


def solve(problem: PlacementProblem, strategy: str, max_steps: int, max_moves: int) -> Placement:
    """Place every layer of `problem`.

    Args:
        problem: statistics, ranks and limits.
        strategy: the name the placement will carry.
        max_steps: calibration steps to look at, spread over the record.
        max_moves: moves of replicas tried in each layer.

    Raises:
        UserError: the budget is too small; the message says how many bytes would do.
    """
    steps = calibration_steps(problem, max_steps)
    formats = Formats.of(problem)
    drafts = [
        Draft.of(problem, steps, formats, homes_LE, low_LE) for homes_LE, low_LE in _starts(problem, steps, formats)
    ]
    for number, draft in enumerate(drafts):
        draft.complete(max_moves // 4, problem.seed)
        problem.on_progress((number + 1) / len(drafts) / 2)
        if draft.rating[0] <= GOOD_ENOUGH:
            break
    best = min(drafts, key=lambda draft: draft.rating)
    best.complete(max_moves, problem.seed, lambda fraction: problem.on_progress((1 + fraction) / 2))
    if formats.low:
        promote(best.layers, best.low_LE, damage_LE(problem.stats, formats.low), formats, best.free_R)
    held_LER = np.stack([layer.held_ER for layer in best.layers])
    return certified(problem, strategy, steps, formats, held_LER, best.low_LE)


def _starts(
    problem: PlacementProblem, steps: Sequence[LayerSteps], formats: Formats
) -> list[tuple[IntArray, BoolArray]]:
    """Homes and low experts to begin with, the plainest first."""
    stats, num_ranks = problem.stats, problem.topology.num_ranks
    budget_R = _budget(problem)
    all_native_LE = np.zeros((stats.num_layers, stats.num_experts), bool)
    mean_LE = np.stack([layer.mean_E for layer in steps])
    starts = []
    homes_E = home_ranks(stats.num_experts, num_ranks)
    if (np.bincount(homes_E, minlength=num_ranks) * stats.num_layers * formats.native_bytes <= budget_R).all():
        starts.append((np.tile(homes_E, (stats.num_layers, 1)), all_native_LE))
    options = [(all_native_LE, 1)]
    if formats.low is not None and problem.budget_bytes_R is not None:
        low_LE = _low_experts(problem, formats)
        group = max(formats.native_bytes // (formats.native_bytes - formats.low_bytes), 1)
        options += [(low_LE, number) for number in (1, group, group + 1)]
    for low_LE, group in options:
        homes_LE = deal_homes(mean_LE, low_LE, formats, budget_R, group)
        if homes_LE is not None:
            starts.append((homes_LE, low_LE))
    if not starts:
        raise UserError(_too_small(problem, formats, mean_LE, options[-1][0]))
    return starts


def _budget(problem: PlacementProblem) -> IntArray:
    return np.array(problem.budget_bytes_R or [UNLIMITED] * problem.topology.num_ranks, np.int64)


def _low_experts(problem: PlacementProblem, formats: Formats) -> BoolArray:
    assert formats.low is not None
    damages_LE, pairs_LE = damage_LE(problem.stats, formats.low), problem.stats.counts.sum(axis=0)
    share = problem.max_low_precision_share
    return np.stack([least_missed(damage_E, pairs_E, share) for damage_E, pairs_E in zip(damages_LE, pairs_LE)])


def _too_small(problem: PlacementProblem, formats: Formats, mean_LE: FloatArray, low_LE: BoolArray) -> str:
    """What to tell the user: the bytes with which the homes alone fit."""
    assert problem.budget_bytes_R is not None
    num_ranks = problem.topology.num_ranks
    enough = -(-int(formats.bytes_of(low_LE).sum()) // num_ranks)
    while deal_homes(mean_LE, low_LE, formats, np.full(num_ranks, enough), 1) is None:
        enough += formats.low_bytes
    hint = "" if formats.low else ", or allow a smaller format with --formats and --max-low-precision-share"
    return (
        f"--budget {','.join(map(str, sorted(set(problem.budget_bytes_R))))}: too small for a replica of every expert "
        f"on {num_ranks} ranks: raise it to {enough} bytes per rank{hint}"
    )
