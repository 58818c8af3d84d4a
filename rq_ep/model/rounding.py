"""How weights are rounded to a low-bit format: to the nearest number, or with regard to the inputs they meet."""

from collections.abc import Callable, Mapping

from torch import Tensor

from rq_ep.formats import WeightFormat
from rq_ep.moe.family import ExpertFamily

# (format, one expert's tensors, inputs [n, D] that it met or None, family) -> packed expert, uint8 [nbytes]
Rounding = Callable[[WeightFormat, Mapping[str, Tensor], Tensor | None, ExpertFamily], Tensor]


def nearest(
    format_: WeightFormat, weights: Mapping[str, Tensor], rows_ND: Tensor | None, family: ExpertFamily
) -> Tensor:
    """Every weight by itself, whatever it is multiplied by."""
    return format_.pack(weights, family.layout)


ROUNDINGS: Mapping[str, Rounding] = {"nearest": nearest}
