"""Which experts were chosen lately: every rank keeps it, as any of them may have to lead a recovery."""

from collections import Counter

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.moe.telemetry import LayerCall, PhaseTimer
from rq_ep.parallel import EPGroup

EVERY = 8  # steps, of which one is looked at: a microsecond a layer is too much for all of them
KEPT_SHARE = 0.99  # of what was seen before, each time


class RecentPairs:
    """Records the pairs of each expert in a sample of the steps; the older they are, the less they count."""

    def __init__(self) -> None:
        self._num_calls: Counter[int] = Counter()  # by layer
        self._pairs: dict[int, FloatArray] = {}  # layer -> [E]

    def timer(self, group: EPGroup) -> PhaseTimer:
        """Start to time one layer call, on the host's clock."""
        return PhaseTimer(group.clock, None)

    def record(self, call: LayerCall) -> None:
        is_seen = self._num_calls[call.layer] % EVERY == 0
        self._num_calls[call.layer] += 1
        if is_seen and call.plan.loads_R.any():
            counts_E = call.counts_RE.sum(axis=0)
            self._pairs[call.layer] = self._pairs.get(call.layer, 0.0) * KEPT_SHARE + counts_E

    def counts_LE(self, num_layers: int) -> IntArray | None:
        """[L, E] pairs of each expert; None: nothing is known of some layer yet."""
        pairs = dict(self._pairs)  # of another thread
        if len(pairs) < num_layers:
            return None
        return np.ceil(np.stack([pairs[layer] for layer in sorted(pairs)])).astype(np.int64)
