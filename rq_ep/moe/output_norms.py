"""Output norms of experts that serve, in a sample of steps: what calibration measures as their importance.

Axes: N pairs, G replicas that computed some of them, V the two sums kept of each expert: of routing weight times norm
of the output over its pairs, and the number of these.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rq_ep.core.arrays import FloatArray

NUM_DENSE, DENSE, SPARSE = 128, 4, 32  # every fourth of the first steps is sampled, for a first decision; then fewer
MAX_WAITING = 64  # sampled steps that nobody has taken yet; the oldest are dropped


class OutputNorms:
    """Samples the steps of one rank; one thread runs the layers, and another takes what was sampled.

    Nothing waits for a device here before it is taken.
    """

    def __init__(self) -> None:
        self._step = 0
        self._is_sampled = False
        self._has_run = False  # a layer, in the step under way
        self._sums: dict[int, Tensor] = {}  # layer -> [V, E], of the step under way
        self._steps: deque[dict[int, Tensor]] = deque(maxlen=MAX_WAITING)

    def between_steps(self) -> None:
        """Hand over the step that has ended, and choose whether the next one is sampled."""
        if self._sums:
            self._steps.append(self._sums)
            self._sums = {}
        self._step += self._has_run
        self._has_run = False
        self._is_sampled = self._step % (DENSE if self._step < NUM_DENSE else SPARSE) == 0

    def discard(self) -> None:
        """Forget the step under way, which was cut off."""
        self._sums, self._has_run = {}, False

    def sums_of(self, layer: int, num_experts: int, device: torch.device) -> Tensor | None:
        """[V, E] sums that a call of the layer adds to; None: it is not sampled."""
        self._has_run = True
        if not self._is_sampled:
            return None
        if layer not in self._sums:
            self._sums[layer] = torch.zeros(2, num_experts, dtype=torch.float64, device=device)
        return self._sums[layer]

    def take(self) -> Iterator[tuple[int, FloatArray]]:
        """Index of a layer and its sums [V, E], for every layer of the steps sampled since the last call."""
        while self._steps:
            for layer, sums_VE in self._steps.popleft().items():
                yield layer, sums_VE.cpu().numpy()


def add_norms(sums_VE: Tensor, experts: Sequence[int], ends_G: Sequence[int], out_ND: Tensor, weight_N: Tensor) -> None:
    """Add the outputs of replicas to the sums of their experts.

    Args:
        sums_VE: changed in place.
        experts: of each of the G replicas.
        ends_G: where the pairs of each replica end.
        out_ND: outputs, before they are weighted.
        weight_N: routing weights.
    """
    norm_N = torch.linalg.vector_norm(out_ND, dim=1, dtype=torch.float32) * weight_N
    up_to_N = torch.cat([norm_N.new_zeros(1, dtype=torch.float64), norm_N.cumsum(0, dtype=torch.float64)])
    norm_G = up_to_N[torch.tensor(ends_G, device=out_ND.device)].diff(prepend=up_to_N[:1])
    pairs_G = torch.tensor(ends_G, dtype=torch.float64).diff(prepend=torch.zeros(1, dtype=torch.float64))
    sums_VE.index_add_(1, torch.tensor(experts, device=out_ND.device), torch.stack([norm_G, pairs_G.to(norm_G.device)]))
