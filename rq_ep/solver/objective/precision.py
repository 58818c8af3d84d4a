"""The weight format of every expert: fewest bytes for the least expected damage, up to the caps on pairs and error.

Axes: F formats, the native one first, then those of ever fewer bytes; N experts of all layers together; A steps, each
of which takes one expert to a format of fewer bytes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.stats import ExpertStats

STORED_DISCOUNT = 0.5  # to make an expert native again takes its weights from elsewhere; to make it low does not
ROUNDING = 1e-9  # by which a sum in another order may exceed the damage of all experts
ASSUMED_NATIVE_BITS = 16  # of a weight, where no error was measured: then it is taken to halve with every bit


@dataclass(frozen=True)
class Formats:
    """The formats that a problem allows: the native one, then those of fewer bytes, the smallest last."""

    names: tuple[str, ...]
    bytes_F: IntArray

    @classmethod
    def of(cls, problem: PlacementProblem) -> "Formats":
        size, native = problem.stats.expert_bytes, problem.stats.native_format
        smaller = [name for name in problem.formats if size[name] < size[native]]
        if problem.max_low_precision_share == 0:
            smaller = []
        names = (native, *sorted(smaller, key=lambda name: (size[name], name), reverse=True))
        return cls(names, np.array([size[name] for name in names], np.int64))

    @property
    def native(self) -> str:
        return self.names[0]

    @property
    def native_bytes(self) -> int:
        return int(self.bytes_F[0])

    @property
    def low(self) -> str | None:
        """The smallest of the formats below the native one; None if there is none."""
        return self.names[-1] if len(self.names) > 1 else None

    @property
    def low_bytes(self) -> int:
        return int(self.bytes_F[-1])

    def only(self, number: int) -> "Formats":
        """The native format and the one of this number alone."""
        return Formats((self.names[0], self.names[number]), self.bytes_F[[0, number]])

    def bytes_of(self, format_LE: IntArray) -> IntArray:
        """Bytes of one replica of each expert."""
        sizes: IntArray = self.bytes_F[format_LE]
        return sizes

    def names_of(self, format_E: IntArray) -> list[str]:
        """The name of the format of each expert."""
        return [self.names[number] for number in format_E.tolist()]


def damage_FLE(stats: ExpertStats, formats: Formats) -> FloatArray:
    """[F, L, E] expected damage of storing an expert in a format; infinite for one that calibration never visited.

    It is the KL divergence of the model's output where that was measured for each expert. Else it is the expert's
    contribution times its relative output error, as a share of what the smallest format does to the layer, so that
    layers of larger outputs are not spared for that; errors that were not measured are taken to be equal for all
    experts. How often an expert is used does not say how much it matters.
    """
    damages_FLE = np.zeros((len(formats.names), stats.num_layers, stats.num_experts))
    for number, name in enumerate(formats.names[1:], 1):
        if stats.kl is not None:
            damages_FLE[number] = stats.kl[:, :, stats.formats.index(name)]
        elif stats.error is not None:
            damages_FLE[number] = contributions_LE(stats) * stats.error[:, :, stats.formats.index(name)]
        else:
            bits = ASSUMED_NATIVE_BITS * (formats.bytes_F[number] - formats.low_bytes) / formats.native_bytes
            damages_FLE[number] = contributions_LE(stats) * 0.5**bits
    if stats.kl is None:
        damages_FLE /= np.maximum(damages_FLE[-1].sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    if stats.visits is not None and stats.visits.any():
        damages_FLE[1:, stats.visits == 0] = np.inf
    return damages_FLE


def contributions_LE(stats: ExpertStats) -> FloatArray:
    """[L, E] contribution of each expert: its importance where that was measured, else gate mass, else pairs."""
    measured = (stats.importance, stats.gate_mass, stats.counts.sum(axis=0))
    return next(array for array in measured if array is not None).astype(np.float64)


@dataclass(frozen=True)
class ByteSavings:
    """Experts that go to formats of fewer bytes, step by step, up to the caps of a problem.

    Those steps come first that save a byte for the least damage: the greedy solution of the multiple-choice knapsack
    problem (Kellerer et al., Knapsack Problems, 2004, chapter 11). A step that would exceed a cap is left out.

    Neither pairs of experts below the native format nor damage exceed `max_low_precision_share` of all. The cap on
    damage keeps an expert of few pairs that matters from being taken only because its pairs fit. The errors add up to
    `max_error` at most. An expert of infinite damage stays as it is.
    """

    shape: tuple[int, int]
    experts_A: IntArray  # of all layers together
    formats_A: IntArray  # that the expert gets
    saved_A: IntArray  # bytes of one replica of each expert, with all steps before

    @classmethod
    def of(cls, problem: PlacementProblem, formats: Formats, stored_LE: IntArray | None = None) -> "ByteSavings":
        """Take all steps that the caps allow.

        Args:
            problem: statistics and caps.
            formats: those to use.
            stored_LE: the formats that experts are stored in; to get there counts `STORED_DISCOUNT` of its damage.
        """
        stats = problem.stats
        damage_FN = damage_FLE(stats, formats).reshape(len(formats.names), -1)
        errors_FN = np.stack([error_LE(stats, name).ravel() for name in formats.names])
        pairs_N = stats.counts.sum(axis=0).ravel()
        totals_F = damage_FN[:, np.isfinite(damage_FN[-1])].sum(axis=1)
        # A share of what a format would do to all experts counts as the same share of what the smallest would do.
        scale_F = np.divide(totals_F[-1], totals_F, out=np.ones(len(totals_F)), where=totals_F > 0)
        max_pairs = problem.max_low_precision_share * int(pairs_N.sum())
        max_damage = problem.max_low_precision_share * float(totals_F[-1]) * (1 + ROUNDING)
        max_error = np.inf if problem.max_error is None else problem.max_error - float(errors_FN[0].sum())
        # Numbers of Python: one at a time, those of NumPy take ten times as long.
        bytes_of, pairs_of, now_in = formats.bytes_F.tolist(), pairs_N.tolist(), [0] * len(pairs_N)
        scales, damages, errors = scale_F.tolist(), damage_FN.tolist(), errors_FN.tolist()
        taken, saved, pairs, damage, error = [], 0, 0, 0.0, 0.0
        for expert, before, after in _steps(damage_FN, pairs_N, formats, stored_LE) if max_pairs else ():
            more_pairs = pairs + (pairs_of[expert] if before == 0 else 0)
            more_damage = damage + (damages[after][expert] * scales[after] - damages[before][expert] * scales[before])
            more_error = error + (errors[after][expert] - errors[before][expert])
            fits = more_pairs <= max_pairs and more_damage <= max_damage and more_error <= max_error
            if fits and now_in[expert] == before:
                now_in[expert] = after
                pairs, damage, error = more_pairs, more_damage, more_error
                saved += bytes_of[before] - bytes_of[after]
                taken.append((expert, after, saved))
        experts_A, formats_A, saved_A = np.array(taken, np.int64).reshape(-1, 3).T
        return cls((stats.num_layers, stats.num_experts), experts_A, formats_A, saved_A)

    @property
    def most(self) -> int:
        """Bytes that all steps save together."""
        return int(self.saved_A.max(initial=0))

    def format_LE(self, saved: float | None = None) -> IntArray:
        """[L, E] the formats after the first steps that save so many bytes or, by default, after all."""
        saved = self.most if saved is None else saved
        number = int(np.searchsorted(self.saved_A, saved)) + 1 if saved > 0 else 0
        format_LE = np.zeros(self.shape, np.int64)
        format_LE.ravel()[self.experts_A[:number]] = self.formats_A[:number]  # of two steps of an expert, the later one
        return format_LE


class _Step(NamedTuple):
    """An expert goes from a format to one of fewer bytes."""

    expert: int
    before: int
    after: int


def _steps(damage_FN: FloatArray, pairs_N: IntArray, formats: Formats, stored_LE: IntArray | None) -> list[_Step]:
    """The steps of all experts along their convex hulls of damage over bytes, by rising damage of a byte saved."""
    experts, rows = np.arange(damage_FN.shape[1]), []
    before_N = np.zeros(len(experts), np.int64)
    for _ in formats.names[1:]:
        saved_FN = formats.bytes_F[before_N] - formats.bytes_F[:, None]
        more_FN = damage_FN - damage_FN[before_N, experts]
        price_FN = np.divide(more_FN, saved_FN, out=np.full(more_FN.shape, np.inf), where=saved_FN > 0)
        after_N = len(price_FN) - 1 - np.argmin(price_FN[::-1], axis=0)
        price_N = price_FN[after_N, experts]
        if stored_LE is not None:
            price_N = np.where(after_N <= stored_LE.ravel(), STORED_DISCOUNT, 1.0) * price_N
        rows.append(np.stack([price_N, pairs_N, experts, before_N, after_N])[:, np.isfinite(price_N)])
        before_N = np.where(np.isfinite(price_N), after_N, before_N)
    columns = np.concatenate(rows, axis=1) if rows else np.zeros((5, 0))
    order_A = np.lexsort(columns[[2, 1, 0]])
    return [_Step(*row) for row in columns[2:, order_A].astype(np.int64).T.tolist()]


def error_LE(stats: ExpertStats, name: str) -> FloatArray:
    """[L, E] what each expert adds to the importance-weighted mean relative output error, stored in this format."""
    if stats.error is None:
        return np.zeros(stats.counts.shape[1:])
    contribution_LE = contributions_LE(stats)
    added: FloatArray = contribution_LE * stats.error[:, :, stats.formats.index(name)]
    return added / max(float(contribution_LE.sum()), np.finfo(np.float64).tiny)
