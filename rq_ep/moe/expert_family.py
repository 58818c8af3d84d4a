"""The expert architecture of a model family: layout of the weights, and the activation between the matrices."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import silu

from rq_ep.core.cost import LayerShape
from rq_ep.formats import ExpertLayout, Views, WeightFormat, get_format


@dataclass(frozen=True)
class ExpertFamily:
    """Layout and activation of one expert."""

    layout: ExpertLayout
    apply_gate: Callable[[Tensor], Tensor]  # [N, 2F] -> [N, F]; without a gate the activation, [N, F] -> [N, F]
    post_norm: nn.Module | None = None  # of the output [N, D], the same for all experts of a layer
    down: ClassVar[str] = "down_proj"

    @classmethod
    def gated(cls, hidden_size: int, intermediate_size: int) -> "ExpertFamily":
        """The SwiGLU expert of most families: gate and up projections in one matrix, SiLU, down projection."""
        shapes = {
            "gate_up_proj": (2 * intermediate_size, hidden_size),
            "down_proj": (hidden_size, intermediate_size),
        }
        return cls(ExpertLayout(shapes), silu_gate)

    @property
    def up(self) -> str:
        """Name of the first matrix."""
        return "gate_up_proj" if "gate_up_proj" in self.layout.shapes else "up_proj"

    @property
    def has_bias(self) -> bool:
        return f"{self.down}_bias" in self.layout.shapes

    @property
    def hidden_size(self) -> int:
        return self.layout.shapes[self.down][self.layout.out_axis(self.down)]

    def shape(self, formats: Iterable[str]) -> LayerShape:
        """Sizes for a cost model, with the bytes of an expert in each of `formats`."""
        intermediate_size = self.layout.shapes[self.down][1 - self.layout.out_axis(self.down)]
        sizes = {name: get_format(name).nbytes(self.layout) for name in formats}
        return LayerShape(self.hidden_size, intermediate_size, sizes)

    def forward(self, x_ND: Tensor, format_: WeightFormat, views: Views) -> Tensor:
        """One expert's output [N, D] for rows [N, D], in their dtype."""
        gate_NF = format_.linear(x_ND, views, self.up, self.layout)
        return self.normalized(format_.linear(self.apply_gate(gate_NF), views, self.down, self.layout))

    def normalized(self, out_ND: Tensor) -> Tensor:
        """The outputs of experts [N, D], before they are weighted."""
        return out_ND if self.post_norm is None else self.post_norm(out_ND)


def silu_gate(up_NF: Tensor) -> Tensor:
    """[N, F] SiLU of the gates in the first half of each row [2F], times the second half."""
    gate_NF, up_NF = up_NF.chunk(2, dim=-1)
    return silu(gate_NF) * up_NF
