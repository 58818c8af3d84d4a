"""Calibrated rounding: less output error than round-to-nearest, in the same bytes."""

import pytest
import torch
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.formats import FORMATS, ExpertLayout, is_intact
from rq_ep.formats.gptq import pack_gptq, second_moments
from rq_ep.formats.int4 import Int4

LAYOUT = ExpertLayout({"gate_up_proj": (96, 128), "down_proj": (128, 72)})
TRANSPOSED = ExpertLayout({"down_proj": (72, 128), "down_proj_bias": (128,)}, is_transposed=True)
INT4 = [format_ for format_ in FORMATS.values() if isinstance(format_, Int4)]


def random_weights(layout: ExpertLayout) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=random) * 0.05 for name, shape in layout.shapes.items()}


def outlier_rows(num_rows: int, num_in: int, seed: int) -> Tensor:
    """Rows with a few common directions, and a few inputs ten times as large as the others."""
    directions = torch.randn(num_in // 4, num_in, generator=torch.Generator().manual_seed(7))
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, num_in // 4, generator=random) @ directions * 0.2
    rows += 0.3 * torch.randn(num_rows, num_in, generator=random)
    rows[:, :: num_in // 5] *= 10
    return rows


def moments_of(layout: ExpertLayout) -> dict[str, Tensor]:
    return {name: second_moments(outlier_rows(512, layout.matrix_shape(name)[1], 1)) for name in layout.matrices}


def output_error(format_: Int4, packed: Tensor, weights: dict[str, Tensor], layout: ExpertLayout, name: str) -> float:
    """On other rows of the same kind."""
    rounded = format_.dequantize(format_.views(packed, layout), name, layout, torch.float32)
    exact, rounded = (w.T if layout.is_transposed else w for w in (weights[name], rounded))
    x_NI = outlier_rows(256, exact.shape[1], 2)
    return float((x_NI @ (rounded - exact).T).norm() / (x_NI @ exact.T).norm())


@pytest.mark.parametrize("layout", [LAYOUT, TRANSPOSED], ids=["plain", "transposed"])
@pytest.mark.parametrize("format_", INT4, ids=lambda format_: format_.name)
def test_output_error_falls(format_: Int4, layout: ExpertLayout) -> None:
    weights = random_weights(layout)
    nearest, fitted = format_.pack(weights, layout), pack_gptq(format_, weights, moments_of(layout), layout)
    assert fitted.shape == nearest.shape
    assert is_intact(fitted)
    assert torch.equal(fitted, pack_gptq(format_, weights, moments_of(layout), layout)), "bits differ"
    for name in layout.matrices:
        before, after = (output_error(format_, packed, weights, layout, name) for packed in (nearest, fitted))
        assert after < 0.75 * before, (name, before, after)


@pytest.mark.parametrize("moment", [1.0, 1e-8, 1e8])
def test_independent_inputs_are_rounded_to_nearest(moment: float) -> None:
    weights = random_weights(LAYOUT)
    moments = {name: torch.eye(LAYOUT.matrix_shape(name)[1]) * moment for name in LAYOUT.matrices}
    for format_ in INT4:
        assert torch.equal(pack_gptq(format_, weights, moments, LAYOUT), format_.pack(weights, LAYOUT))


def test_inputs_that_are_always_zero_give_finite_weights() -> None:
    """Fewer rows than inputs, and inputs that are always zero: the moments have no inverse of their own."""
    weights, rows = random_weights(LAYOUT), outlier_rows(8, 128, 1)
    rows[:, 5] = 0
    moments = moments_of(LAYOUT) | {"gate_up_proj": second_moments(rows)}
    views = INT4[0].views(pack_gptq(INT4[0], weights, moments, LAYOUT), LAYOUT)
    assert INT4[0].dequantize(views, "gate_up_proj", LAYOUT, torch.float32).isfinite().all()


def test_moments_without_information_are_refused() -> None:
    weights, moments = random_weights(LAYOUT), moments_of(LAYOUT)
    for bad, message in (
        (torch.zeros(72, 72), "no calibration row reached 'down_proj'"),
        (torch.full((72, 72), torch.nan), "inputs of 'down_proj' are infinite or undefined"),
        (torch.ones(72, 71), r"'down_proj': \(72, 72\) expected, not \(72, 71\)"),
    ):
        with pytest.raises(UserError, match=message):
            pack_gptq(INT4[0], weights, moments | {"down_proj": bad}, LAYOUT)
    with pytest.raises(UserError, match=r"'down_proj'.*not None"):
        pack_gptq(INT4[0], weights, {"gate_up_proj": moments["gate_up_proj"]}, LAYOUT)
    weights["down_proj"][0, 0] = torch.inf
    with pytest.raises(UserError, match="'down_proj' of an expert holds infinite"):
        pack_gptq(INT4[0], weights, moments, LAYOUT)
