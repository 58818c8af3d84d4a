"""How much an expert's output suffers when its weights are stored in fewer bits."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rq_ep.core.arrays import FloatArray
from rq_ep.formats import ExpertLayout, WeightFormat


@torch.no_grad()
def output_errors(
    module: nn.Module,
    layout: ExpertLayout,
    rows: Sequence[Tensor],
    formats: Sequence[WeightFormat],
    packed: Callable[[int, str], Tensor | None] = lambda expert, name: None,
) -> FloatArray:
    """Relative output error of each expert of a layer in each format, computed in fp32.

    It is |f_q(x) - f(x)| / |f(x)| over the rows x together (Frobenius norms). An expert without rows, which no
    calibration token chose, is measured on the rows of all others.

    Args:
        module: experts module; its own forward method does the computing, on packed and unpacked weights.
        layout: of one of its experts.
        rows: [E] inputs [n, D] of each expert.
        formats: the Q formats to measure, at least one.
        packed: (expert, format name) -> the expert as it was packed in advance; None where each weight is to be rounded
            to the nearest.

    Returns:
        [E, Q].
    """
    everything = torch.cat(list(rows))
    parameters = {name: parameter.float() for name, parameter in module.named_parameters()}
    device = next(iter(parameters.values())).device
    inputs = [(own if len(own) else everything).to(device).float() for own in rows]
    ids_N = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(own) for own in inputs])).to(device)
    hidden_ND = torch.cat(inputs)

    def outputs(weights: dict[str, Tensor]) -> Tensor:
        out: Tensor = functional_call(module, weights, (hidden_ND, ids_N[:, None], hidden_ND.new_ones(len(ids_N), 1)))
        return out

    def squares_E(out_ND: Tensor) -> Tensor:
        norms_N = out_ND.double().square().sum(1)
        return norms_N.new_zeros(len(rows)).index_add_(0, ids_N, norms_N)

    exact_ND = outputs(parameters)
    size_E = squares_E(exact_ND).clamp_(min=torch.finfo(torch.float64).tiny)
    errors = []
    for format_ in formats:
        rounded = {name: torch.empty_like(parameter) for name, parameter in parameters.items()}
        for expert in range(len(rows)):
            buffer = packed(expert, format_.name)
            if buffer is None:
                buffer = format_.pack({name: parameter[expert] for name, parameter in parameters.items()}, layout)
            views = format_.views(buffer.to(device), layout)
            for name, parameter in rounded.items():
                parameter[expert] = format_.dequantize(views, name, layout, torch.float32)
        errors.append((squares_E(outputs(rounded) - exact_ND) / size_E).sqrt())
    result_EQ: FloatArray = torch.stack(errors, dim=1).cpu().numpy()
    return result_EQ
