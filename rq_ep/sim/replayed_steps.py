"""The steps of a record that are replayed: loads as they were calibrated, or a trace of what every token chose."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.stats import PHASES, ExpertStats
from rq_ep.sim.traces import RoutingTrace


@dataclass(frozen=True)
class ReplayedSteps:
    """Steps of statistics or, where there is one, of a trace of the same model."""

    stats: ExpertStats
    trace: RoutingTrace | None
    chosen_S: IntArray  # which steps of the record

    @classmethod
    def of(cls, stats: ExpertStats, trace: RoutingTrace | None = None, max_steps: int | None = None) -> "ReplayedSteps":
        """Choose the steps of a record.

        Args:
            stats: loads and sizes; with a trace, sizes alone.
            trace: what every token chose.
            max_steps: so many at most, spread over the record; default: all.

        Raises:
            UserError: the trace is of another model, or the chosen steps routed nothing.
        """
        if trace is not None:
            trace.check(stats)
        chosen_S = _spread(stats.num_steps if trace is None else len(trace.tokens_S), max_steps)
        has_pairs = stats.counts[chosen_S].any() if trace is None else trace.ids_NLK.size
        if not has_pairs:
            source, remedy = (stats.source, "calibrate") if trace is None else (trace.source, "record")
            raise UserError(f"{source}: no routed pairs to replay; {remedy} again, on more text")
        return cls(stats, trace, chosen_S)

    @property
    def num_steps(self) -> int:
        return len(self.chosen_S)

    def counts(self, num_ranks: int) -> Iterator[IntArray]:
        """Pairs of each step: [L, E] or, of a trace, from each of the ranks, [L, R, E]."""
        return (
            iter(self.stats.counts[self.chosen_S]) if self.trace is None else self.trace.steps(self.chosen_S, num_ranks)
        )

    @property
    def by_phase(self) -> dict[str, IntArray]:
        """Phase -> its places among the chosen steps, in the order of `PHASES`; empty where steps have no phase."""
        phase_S = self.stats.phase if self.trace is None else self.trace.phase_S
        if phase_S is None:
            return {}
        places = {name: np.flatnonzero(phase_S[self.chosen_S] == number) for number, name in enumerate(PHASES)}
        return {name: places_S for name, places_S in places.items() if places_S.size}


def _spread(num_steps: int, max_steps: int | None) -> IntArray:
    """[S] at most `max_steps` of so many steps, at equal distances."""
    if max_steps is None:
        return np.arange(num_steps)
    number = min(max_steps, num_steps)
    return np.unique(((np.arange(number) + 0.5) * num_steps / number).astype(np.int64))
