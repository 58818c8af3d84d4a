"""A rank's place in its steps; without torch, as the HTTP process reads it too."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A rank's place: its step, the MoE layer it entered last in it (None: none yet), the collective it waits in.

    `stuck_s` is the time since it last began a step or entered a layer. Places order by how far the ranks have come.
    """

    step: int
    layer: int | None
    operation: str | None
    stuck_s: float

    @property
    def progress(self) -> tuple[int, int, bool]:
        """Higher is further: a rank that waits in a collective has come further than one that has not reached it."""
        return self.step, -1 if self.layer is None else self.layer, self.operation is not None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", MoE layer {self.layer}"
        return f"step {self.step}{layer}, {self.operation or 'computing'}"
