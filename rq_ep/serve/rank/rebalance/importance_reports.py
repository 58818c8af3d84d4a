"""Reports of a rank on what its experts contribute, through the HTTP process to rank 0, which decides."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from rq_ep.core.arrays import FloatArray
from rq_ep.moe import EPExperts
from rq_ep.moe.output_norms import OutputNorms
from rq_ep.serve.messages import ImportanceReport

REPORT_EVERY_S = 1.0


class ImportanceReports:
    """Has the output norms of this rank's experts sampled, and sends their sums now and then.

    Args:
        layers: of the model, in the order of its placement.
        send: sends a message to the HTTP process.
        clock: seconds.
    """

    def __init__(
        self,
        layers: Sequence[EPExperts],
        send: Callable[[ImportanceReport], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._norms = OutputNorms()
        self._positions = {layer.placement.index: position for position, layer in enumerate(layers)}
        self._send = send
        self._clock = clock
        self._sent_at_s = clock()
        for layer in layers:
            layer.sample_norms(self._norms)

    def between_steps(self) -> None:
        """A step has ended; on the engine's thread."""
        self._norms.between_steps()

    def tick(self) -> None:
        """Send what was sampled, if it is time to; on another thread."""
        if self._clock() - self._sent_at_s < REPORT_EVERY_S:
            return
        self._sent_at_s = self._clock()
        sums: dict[int, FloatArray] = {}  # position of a layer -> [2, E]
        for layer, norms_2E in self._norms.take():
            position = self._positions[layer]
            sums[position] = sums[position] + norms_2E if position in sums else norms_2E
        rows = []
        for position, (norm_E, pairs_E) in sorted(sums.items()):
            experts = np.flatnonzero(pairs_E)
            rows.append([position, experts.tolist(), norm_E[experts].tolist(), pairs_E[experts].tolist()])
        if rows:
            self._send(ImportanceReport(rows))
