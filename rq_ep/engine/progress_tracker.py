"""Following a rank through its steps, for somebody who wonders why it does not go on."""

import time
from collections.abc import Callable, Sequence

from torch import nn

from rq_ep.engine.progress import Place


class Position:
    """Follows one rank through its steps; any thread may ask for its place.

    Args:
        layers: the model's expert-parallel layers.
        numbers: their indices in the model.
        operation: the collective of the layers that the rank waits in now.
    """

    def __init__(
        self, layers: Sequence[nn.Module], numbers: Sequence[int], operation: Callable[[], str | None]
    ) -> None:
        self._operation = operation
        self._step = 0
        self._layer: int | None = None
        self._agreeing = False
        self._moved_s = time.monotonic()
        for layer, number in zip(layers, numbers, strict=True):
            layer.register_forward_pre_hook(self._entering(number))

    def begin_step(self) -> None:
        """The rank is about to agree on the next step."""
        self._step, self._layer, self._agreeing = self._step + 1, None, True
        self._moved_s = time.monotonic()

    def agreed(self) -> None:
        """The group has agreed."""
        self._agreeing = False
        self._moved_s = time.monotonic()

    def place(self) -> Place:
        operation = "agreement on the step" if self._agreeing else self._operation()
        return Place(self._step, self._layer, operation, time.monotonic() - self._moved_s)

    def _entering(self, number: int) -> Callable[..., None]:
        def enter(*_: object) -> None:
            self._layer = number
            self._moved_s = time.monotonic()

        return enter
