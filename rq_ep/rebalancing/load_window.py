"""The loads of the last steps, sampled so that a step counts by its pairs."""

from collections import deque
from typing import NamedTuple

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.stats import PHASES

MAX_KEPT = 128  # steps of a phase; twice as many as the solver looks at, because half of them plan and half accept


class ObservedLoads(NamedTuple):
    """Loads of S sampled steps, in the order in which they were made."""

    counts_SLE: IntArray  # routed pairs
    phase_S: IntArray  # index into PHASES

    def take(self, chosen_S: IntArray) -> "ObservedLoads":
        """The chosen ones of these steps."""
        return ObservedLoads(self.counts_SLE[chosen_S], self.phase_S[chosen_S])


class _Kept(NamedTuple):
    time: float  # full steps
    counts_LE: IntArray


class LoadWindow:
    """The loads of the last `num_steps` full steps, with at most `MAX_KEPT` steps of each phase.

    Steps of few tokens count as parts of a full one. A step is kept when so many pairs have been routed since the last
    one of its phase that was: a few long prefill steps among many short ones are not lost, and the memory is bounded
    whatever the length of the window.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._now = 0.0  # full steps
        self._kept: tuple[deque[_Kept], ...] = tuple(deque() for _ in PHASES)
        self._pairs_between = [0.0] * len(PHASES)  # that a phase routes from one step that is kept to the next
        self._pairs_since = [0.0] * len(PHASES)

    def observe(self, counts_LE: IntArray, phase: int, part: float = 1.0) -> None:
        """Take the loads of a step.

        Args:
            counts_LE: [L, E] routed pairs, of all ranks together.
            phase: index into PHASES.
            part: of a full step, that this one counts as.
        """
        self._now += part
        for number, kept in enumerate(self._kept):
            while kept and kept[0].time <= self._now - self._num_steps:
                kept.popleft()
                if len(kept) < MAX_KEPT // 2:
                    self._pairs_between[number] /= 2  # traffic has become thinner
        kept, pairs = self._kept[phase], float(counts_LE.sum())
        self._pairs_since[phase] += pairs
        if not pairs or self._pairs_since[phase] < self._pairs_between[phase]:
            return
        kept.append(_Kept(self._now, counts_LE.copy()))
        self._pairs_since[phase] = 0.0
        if len(kept) > MAX_KEPT:
            remaining = list(kept)[1::2]
            kept.clear()
            kept.extend(remaining)
            self._pairs_between[phase] = max(2 * self._pairs_between[phase], 2 * pairs)

    def loads(self) -> ObservedLoads:
        """The steps that are kept."""
        rows = [(one.time, phase, one.counts_LE) for phase, kept in enumerate(self._kept) for one in kept]
        rows.sort(key=lambda row: row[0])
        if not rows:
            return ObservedLoads(np.zeros((0, 0, 0), np.int64), np.zeros(0, np.int64))
        _, phases, counts = zip(*rows, strict=True)
        return ObservedLoads(np.stack(counts), np.array(phases, np.int64))
