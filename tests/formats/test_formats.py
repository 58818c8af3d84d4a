"""Every format of the table keeps what it declares, on layouts as model families have them."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from rq_ep.core.errors import UserError
from rq_ep.formats import FORMATS, ExpertLayout, get_format, is_intact, native_format_name
from rq_ep.formats.quantized import Parts, Quantized

LAYOUTS = {
    "gated": ExpertLayout({"gate_up_proj": (24, 20), "down_proj": (20, 12)}),
    "odd": ExpertLayout({"gate_up_proj": (6, 5), "down_proj": (5, 3)}),
    "transposed": ExpertLayout(
        {"gate_up_proj": (20, 24), "gate_up_proj_bias": (24,), "down_proj": (12, 20), "down_proj_bias": (20,)},
        is_transposed=True,
    ),
    "long": ExpertLayout({"up_proj": (96, 64), "up_proj_bias": (96,), "down_proj": (64, 96), "down_proj_bias": (64,)}),
}
LOW_BIT = [name for name, format_ in FORMATS.items() if not format_.is_native]
EVERY = pytest.mark.parametrize(
    ("name", "layout"), [pytest.param(f, LAYOUTS[x], id=f"{f}-{x}") for f in FORMATS for x in LAYOUTS]
)


def weights_of(layout: ExpertLayout, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in layout.shapes.items()}


@EVERY
def test_round_trip_stays_within_the_declared_error(name: str, layout: ExpertLayout) -> None:
    format_ = FORMATS[name]
    weights = weights_of(layout)
    weights[layout.matrices[0]][0] = 0  # a row of zeros must not divide by its largest weight
    views = format_.views(format_.pack(weights, layout), layout)
    for tensor, weight in weights.items():
        actual = format_.dequantize(views, tensor, layout, torch.float32)
        assert actual.shape == weight.shape
        if tensor in layout.matrices:
            largest = weight.abs().amax(1 - layout.out_axis(tensor), keepdim=True)
            assert ((actual - weight).abs() <= format_.max_error * largest).all()
        else:
            assert ((actual - weight).abs() <= torch.finfo(torch.bfloat16).eps * weight.abs()).all()


@EVERY
def test_packed_expert_is_one_aligned_deterministic_buffer(name: str, layout: ExpertLayout) -> None:
    format_ = FORMATS[name]
    packed = format_.pack(weights_of(layout), layout)
    assert packed.dtype == torch.uint8
    assert packed.shape == (format_.nbytes(layout),)
    assert torch.equal(packed, format_.pack(dict(reversed(weights_of(layout).items())), layout))
    packing = format_.packing(layout)
    assert all(field.offset % 16 == 0 for field in packing.fields.values())
    assert packing.nbytes % 16 == 0
    ends = sorted((field.offset, field.end) for field in packing.fields.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(ends)), "fields overlap"


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 20])
@pytest.mark.parametrize("is_fast", [True, False], ids=["native products", "products in fp32"])
def test_linear_is_the_product_with_the_dequantized_matrix(
    name: str, layout: ExpertLayout, dtype: torch.dtype, num_rows: int, is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq_ep.formats.kernels.blocked_product.has_fast_products", lambda dtype: is_fast)
    format_ = FORMATS[name]
    views = format_.views(format_.pack(weights_of(layout), layout), layout)
    for matrix in layout.matrices:
        weight = format_.dequantize(views, matrix, layout, torch.float32)
        weight = weight if layout.is_transposed else weight.T
        x = torch.randn(num_rows, len(weight), generator=torch.Generator().manual_seed(1)).to(dtype)
        expected = x.float() @ weight
        if f"{matrix}_bias" in layout.shapes:
            expected += format_.dequantize(views, f"{matrix}_bias", layout, torch.float32)
        actual = format_.linear(x, views, matrix, layout)
        assert actual.dtype == dtype
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance * len(weight) ** 0.5)


@EVERY
def test_views_share_the_bytes_of_a_stack(name: str, layout: ExpertLayout) -> None:
    format_ = FORMATS[name]
    stack = torch.stack([format_.pack(weights_of(layout, seed=seed), layout) for seed in range(3)])
    stacked = format_.views(stack, layout)
    for field, tensor in format_.views(stack[1], layout).items():
        assert torch.equal(stacked[field][1].view(torch.uint8), tensor.view(torch.uint8))
        assert tensor.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()


@EVERY
def test_a_changed_byte_fails_the_checksum(name: str, layout: ExpertLayout) -> None:
    packed = FORMATS[name].pack(weights_of(layout), layout)
    assert is_intact(packed)
    for position in (0, len(packed) // 2, len(packed) - 9):
        broken = packed.clone()
        broken[position] ^= 1
        assert not is_intact(broken)


def test_swapped_blocks_fail_the_checksum() -> None:
    layout = LAYOUTS["long"]
    packed = FORMATS["fp32"].pack(weights_of(layout), layout)
    swapped = packed.clone()
    swapped[:4096], swapped[4096:8192] = packed[4096:8192], packed[:4096]
    assert not is_intact(swapped)


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_native_weights_come_back_bit_by_bit(name: str) -> None:
    dtype = FORMATS[name].dtype  # type: ignore[attr-defined]
    layout = LAYOUTS["transposed"]
    weights = weights_of(layout, dtype)
    views = FORMATS[name].views(FORMATS[name].pack(weights, layout), layout)
    assert all(torch.equal(views[tensor], weight) for tensor, weight in weights.items())
    assert native_format_name(dtype) == name


@pytest.mark.parametrize("name", LOW_BIT)
def test_blocks_of_channels_give_the_whole_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS["long"]
    format_ = FORMATS[name]
    views = format_.views(format_.pack(weights_of(layout), layout), layout)
    x = torch.randn(5, 64)
    whole = format_.linear(x, views, "up_proj", layout)
    seen: list[int] = []
    expand = type(format_).expand

    def record(self: Quantized, parts: Parts, *rest: Any) -> tuple[Tensor, Tensor | None]:
        seen.append(len(next(iter(parts.values()))))
        return expand(self, parts, *rest)

    monkeypatch.setattr(type(format_), "expand", record)
    monkeypatch.setattr("rq_ep.formats.kernels.blocked_product._BLOCK_ELEMENTS", {"cpu": 7 * 64})
    torch.testing.assert_close(format_.linear(x, views, "up_proj", layout), whole)
    assert sum(seen) == 96
    assert max(seen) <= 7


@pytest.mark.parametrize("name", LOW_BIT)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["down_proj", "gate_up_proj_bias"])
def test_weights_that_are_not_finite_are_refused(name: str, bad: float, where: str) -> None:
    weights = weights_of(LAYOUTS["transposed"])
    weights[where].view(-1)[-1] = bad
    with pytest.raises(UserError, match=where):
        FORMATS[name].pack(weights, LAYOUTS["transposed"])


def test_missing_tensors_and_unknown_formats_are_refused() -> None:
    layout = LAYOUTS["gated"]
    with pytest.raises(UserError, match="down_proj"):
        FORMATS["int8"].pack({"gate_up_proj": torch.zeros(24, 20)}, layout)
    with pytest.raises(UserError, match="did you mean 'int8'"):
        get_format("int-8")
    with pytest.raises(UserError, match="float64"):
        native_format_name(torch.float64)
