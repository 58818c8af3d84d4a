"""A rank's progress through its steps, for the watchdog; without torch, as the HTTP process reads it too."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Progress:
    """How far a rank has come: its step, the MoE layer it entered last in it (None: none yet), and a collective.

    `operation` is the collective that the rank waits in, None while it computes; `stuck_s` is the time since it last
    began a step or entered a layer. Steps count from the `generation` of the group on, which `is_over` once the rank
    makes no more steps in it, but waits for the next one.
    """

    step: int
    layer: int | None
    operation: str | None
    stuck_s: float
    generation: int = 0
    is_over: bool = False

    @property
    def order(self) -> tuple[int, bool, int, int, bool]:
        """Higher is further: a rank that waits in a collective has come further than one that has not reached it."""
        layer = -1 if self.layer is None else self.layer
        return self.generation, self.is_over, self.step, layer, self.operation is not None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", MoE layer {self.layer}"
        return f"step {self.step}{layer}, {self.operation or 'computing'}"


@dataclass(frozen=True)
class MoverProgress:
    """How far a rank has come in migrations of experts.

    `staged` is as in `MoverFlags`, `num_pieces` those of experts that it has sent and received. `activity` is what it
    does, such as "verifies expert 3 of layer 5"; empty: nothing is to be done now. `is_exchanging`: it waits for other
    ranks' messages.
    """

    staged: int = 0
    num_pieces: int = 0
    activity: str = ""
    is_exchanging: bool = False


class Layer(Protocol):
    """A module that calls hooks when it is entered."""

    def register_forward_pre_hook(self, hook: Callable[..., None]) -> object: ...


class ProgressTracker:
    """Follows one rank through its steps; any thread may read its progress.

    Args:
        layers: the model's expert-parallel layers.
        indices: their indices in the model.
        operation: the collective of the layers that the rank waits in now.
    """

    def __init__(self, layers: Sequence[Layer], indices: Sequence[int], operation: Callable[[], str | None]) -> None:
        self._operation = operation
        self._step = 0
        self._layer: int | None = None
        self._is_agreeing = False
        self._generation, self._is_over = 0, False
        self._moved_s = time.monotonic()
        for layer, index in zip(layers, indices, strict=True):
            layer.register_forward_pre_hook(self._enter_hook(index))

    def begin_step(self) -> None:
        """The rank is about to agree on the next step."""
        self._step, self._layer, self._is_agreeing = self._step + 1, None, True
        self._moved_s = time.monotonic()

    def end_agreement(self) -> None:
        """The group has agreed on the step."""
        self._is_agreeing = False
        self._moved_s = time.monotonic()

    def end_generation(self) -> None:
        """The members of the group change; whatever the rank did has ended."""
        self._is_agreeing, self._is_over = False, True
        self._moved_s = time.monotonic()

    def begin_generation(self, generation: int) -> None:
        """The rank makes its first step with the new members next."""
        self._step, self._layer = 0, None
        self._generation, self._is_over = generation, False
        self._moved_s = time.monotonic()

    def current(self) -> Progress:
        operation = "agreement on the step" if self._is_agreeing else self._operation()
        stuck_s = time.monotonic() - self._moved_s
        return Progress(self._step, self._layer, operation, stuck_s, self._generation, self._is_over)

    def _enter_hook(self, index: int) -> Callable[..., None]:
        def enter(*_: object) -> None:
            self._layer = index
            self._moved_s = time.monotonic()

        return enter
