"""The loads of single steps, for the decision whether to rebalance; the totals are counted as ever."""

from collections import deque
from collections.abc import Iterator

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.stats import PHASES
from rq_ep.moe.telemetry import LayerCall, PhaseTimer
from rq_ep.parallel import EPGroup
from rq_ep.serve.rank.loads.load_totals import LoadTotals

MAX_WAITING = 4096  # steps that nobody has taken yet; the oldest are dropped


class StepLoads:
    """Records layer calls twice: in the totals, and as the loads of a step, which one thread makes and another takes.

    Args:
        totals: records every call as well.
    """

    def __init__(self, totals: LoadTotals) -> None:
        self._totals = totals
        self._phase = 0
        self._counts: dict[int, IntArray] = {}  # layer -> [E] routed pairs in the step under way
        self._steps: deque[tuple[dict[int, IntArray], int]] = deque(maxlen=MAX_WAITING)

    def timer(self, group: EPGroup) -> PhaseTimer:
        """Start to time one layer call."""
        return self._totals.timer(group)

    def record(self, call: LayerCall) -> None:
        self._totals.record(call)
        self._counts[call.layer] = call.counts_RE.sum(axis=0)

    def between_steps(self, is_prefill: bool) -> None:
        """Hand over the step that has ended; `is_prefill`: whether any rank prefills in the one that begins."""
        if self._counts:
            self._steps.append((self._counts, self._phase))
            self._counts = {}
        self._phase = PHASES.index("prefill" if is_prefill else "decode")

    def discard(self) -> None:
        """Forget the step under way, which was cut off, and those that nobody has taken: the group changes."""
        self._counts = {}
        self._steps.clear()

    def take(self) -> Iterator[tuple[IntArray, int]]:
        """The steps since the last call: [L, E] routed pairs, of all ranks together, and the index of the phase."""
        while True:
            try:
                counts, phase = self._steps.popleft()
            except IndexError:  # none are left: the engine's thread may discard them at any time
                return
            yield np.stack([counts[layer] for layer in sorted(counts)]), phase
