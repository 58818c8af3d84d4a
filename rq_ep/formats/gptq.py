"""GPTQ (Frantar et al., arXiv 2210.17323): rounding to int4 that minimises the output error on calibration inputs.

Rounding one weight leaves an error in the output. GPTQ compensates it by the weights not yet rounded, as far as their
inputs correlate with its own. Scales and bytes are laid out as for round-to-nearest, so kernels need no change.

Axes: O output channels, I inputs, B inputs of a block.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.formats.int4 import Int4, pack_levels, to_levels
from rq_ep.formats.layout import ExpertLayout
from rq_ep.formats.quantized import check_finite

DAMPING = 0.01  # of the mean second moment, added to each input's: the paper's
_BLOCK = 128  # inputs; errors reach those behind a block in one product


def second_moments(x_NI: Tensor) -> Tensor:
    """Second moments of rows [N, I]: fp32 [I, I], the sum of x x^T. Those of several batches add up."""
    x_NI = x_NI.float()
    return x_NI.T @ x_NI


def pack_gptq(
    format_: Int4,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    layout: ExpertLayout,
    damping: float = DAMPING,
) -> Tensor:
    """Pack one expert by GPTQ: uint8 [nbytes] as of `format_.pack`, with less output error on its inputs.

    An output channel is rounded to nearest if that is better on these inputs. A weight may move by several steps, so
    the format's `max_error` does not hold.

    Args:
        format_: of the result.
        weights: its tensors, named and shaped as in the layout.
        moments: of each matrix's inputs, see `second_moments`.
        layout: tensors of one expert.
        damping: share of the mean second moment that is added to each input's own.

    Raises:
        UserError: weights or moments are not finite or misshapen, or no row reached this expert.
    """
    layout.check(weights)
    matrices = {}
    for name in layout.matrices:
        weight = weights[name].T if layout.is_transposed else weights[name]
        check_finite(name, weight)
        _check_moments(name, moments, layout)
        weight_OI = weight.float().contiguous()
        scale_OG = format_.scales(weight_OI)
        scale_OI = format_.expand_scales(scale_OG, weight_OI.shape[1])
        levels_OI = _fitted_levels(weight_OI, scale_OI, moments[name], damping)
        matrices[name] = {"codes": pack_levels(levels_OI), "scale": scale_OG}
    return format_.pack_parts(matrices, weights, layout)


def _check_moments(name: str, moments: Mapping[str, Tensor], layout: ExpertLayout) -> None:
    num_in = layout.matrix_shape(name)[1]
    shape = tuple(moments[name].shape) if name in moments else None
    if shape != (num_in, num_in):
        raise UserError(f"second moments of the inputs of {name!r}: {(num_in, num_in)} expected, not {shape}")
    if not moments[name].isfinite().all():
        raise UserError(f"the inputs of {name!r} are infinite or undefined: check the model")
    if not moments[name].any():
        raise UserError(f"no calibration row reached {name!r} of an expert: give more text, or leave it as it is")


def _fitted_levels(weight_OI: Tensor, scale_OI: Tensor, moment_II: Tensor, damping: float) -> Tensor:
    """GPTQ's levels, or the nearest ones in channels where these have less error on the inputs."""
    nearest_OI = to_levels(weight_OI, scale_OI)
    fitted_OI = _gptq(weight_OI, scale_OI, moment_II, damping)
    nearest_error_O, fitted_error_O = (
        torch.einsum("oi,ij,oj->o", difference_OI, moment_II.float(), difference_OI)
        for difference_OI in (weight_OI - levels_OI * scale_OI for levels_OI in (nearest_OI, fitted_OI))
    )
    return torch.where((fitted_error_O < nearest_error_O)[:, None], fitted_OI, nearest_OI)


def _gptq(weight_OI: Tensor, scale_OI: Tensor, moment_II: Tensor, damping: float) -> Tensor:
    """GPTQ's levels, [O, I] as float. Inputs of large moment are rounded first, when most weights can compensate."""
    hessian_II = moment_II.double()
    diagonal_I = hessian_II.diagonal()
    order = diagonal_I.argsort(descending=True, stable=True)
    hessian_II = hessian_II[order][:, order]
    hessian_II.diagonal().add_(damping * diagonal_I.mean())
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    upper_II = torch.linalg.cholesky(inverse_II, upper=True).float()

    # Transposed, so that an input's weights are contiguous.
    weight_IO, scale_IO = weight_OI.T[order], scale_OI.T[order]
    levels_IO = torch.empty_like(weight_IO)
    for start in range(0, len(order), _BLOCK):
        end = min(start + _BLOCK, len(order))
        errors_BO = torch.empty_like(weight_IO[start:end])
        for i in range(start, end):
            levels_IO[i] = to_levels(weight_IO[i], scale_IO[i])
            errors_BO[i - start] = (weight_IO[i] - levels_IO[i] * scale_IO[i]) / upper_II[i, i]
            weight_IO[i + 1 : end].addr_(upper_II[i, i + 1 : end], errors_BO[i - start], alpha=-1)
        weight_IO[end:].addmm_(upper_II[start:end, end:].T, errors_BO, alpha=-1)
    return levels_IO[order.argsort()].T
