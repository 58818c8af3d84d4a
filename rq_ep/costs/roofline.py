"""A roofline cost model: what a plan would take on a machine of given peak rates. Modelled, never measured."""

from dataclasses import dataclass

from rq_ep.core.cost import LayerCost, LayerShape
from rq_ep.core.errors import UserError

MATRICES = 3  # of a gated expert: gate, up, down


@dataclass(frozen=True)
class Roofline:
    """Peak rates of one rank. Sustained ones are lower: compare strategies with it, do not promise seconds."""

    flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float  # in each direction
    latency_s: float
    activation_bytes: int = 2  # of one number on the wire

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "memory_bytes_per_s", "link_bytes_per_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} {getattr(self, name)}: must be positive")

    def layer(self, shape: LayerShape) -> LayerCost:
        """Modelled seconds of the parts of a layer of this shape."""
        flops = 2.0 * MATRICES * shape.hidden_size * shape.intermediate_size
        return LayerCost(
            pair_s=dict.fromkeys(shape.expert_bytes, flops / self.flops_per_s),
            stream_s={name: size / self.memory_bytes_per_s for name, size in shape.expert_bytes.items()},
            transfer_s={name: size / self.link_bytes_per_s for name, size in shape.expert_bytes.items()},
            row_s=shape.hidden_size * self.activation_bytes / self.link_bytes_per_s,
            latency_s=self.latency_s,
        )


# Data-sheet peaks per rank: dense bf16 arithmetic, HBM, NVLink in one direction. The CPU row is an order of magnitude.
MACHINES: dict[str, Roofline] = {
    "h200": Roofline(989e12, 4.8e12, 450e9, 10e-6),
    "h100": Roofline(989e12, 3.35e12, 450e9, 10e-6),
    "cpu": Roofline(50e9, 10e9, 5e9, 50e-6, activation_bytes=4),
}
