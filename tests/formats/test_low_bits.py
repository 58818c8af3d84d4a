"""The low-bit formats one by one: error on any weights, bits as others store them, compiled loops, packed kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from rq_ep.core.errors import UserError
from rq_ep.formats import FORMATS, ExpertLayout
from rq_ep.formats.int8 import Int8, can_multiply_packed
from rq_ep.formats.kernels.unpack import scale_channels
from rq_ep.formats.mxfp4 import Mxfp4
from rq_ep.formats.quantized import Quantized

LOW_BIT = {name: format_ for name, format_ in FORMATS.items() if isinstance(format_, Quantized)}
BYTES_PER_WEIGHT = {  # without alignment and checksum
    "int8": 1, "fp8": 1, "int4_g32": 0.5 + 2 / 32, "int4_g64": 0.5 + 2 / 64, "int4_g128": 0.5 + 2 / 128,
    "mxfp4": 0.5 + 1 / 32, "fp8_g64": 1 + 4 / 64, "fp8_g128": 1 + 4 / 128,
}  # fmt: skip


def dequantized(format_: Quantized, weight: Tensor) -> Tensor:
    levels, scale = format_.expand(format_.quantize(weight), weight.shape[1], torch.float32)
    return levels if scale is None else levels * scale[:, None]


@pytest.mark.parametrize("name", LOW_BIT)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_error_is_bounded_for_any_weights(name: str, data: st.DataObject) -> None:
    num_out, num_in = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 140))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    weight = torch.randn(num_out, num_in, generator=random) * 10.0 ** data.draw(st.integers(-30, 30))
    weight *= torch.rand(num_out, num_in, generator=random) < data.draw(st.floats(0, 1))  # zeros
    weight *= 10.0 ** (data.draw(st.floats(0, 3)) * torch.randn(num_out, num_in, generator=random)).clamp(-5, 5)
    error = (dequantized(LOW_BIT[name], weight) - weight).abs()
    assert (error <= LOW_BIT[name].max_error * weight.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("name", LOW_BIT)
@pytest.mark.parametrize("shape", [(3, 256), (4, 96), (2, 20), (5, 7), (1, 1)], ids=str)
def test_compiled_loops_give_the_bits_of_tensor_operations(name: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02
    parts = LOW_BIT[name].quantize(weight)
    fast, scale = LOW_BIT[name].expand(parts, shape[1], torch.bfloat16)
    slow, slow_scale = LOW_BIT[name].expand(parts, shape[1], torch.float32)
    if scale is None:
        assert slow_scale is None
        assert torch.equal(fast, slow.bfloat16())
    else:
        torch.testing.assert_close(fast.float() * scale[:, None], slow)


@pytest.mark.parametrize("shape", [(1, 7), (5, 48), (33, 1)], ids=str)
def test_channels_are_scaled_in_place_in_either_memory_order(shape: tuple[int, int]) -> None:
    out = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = torch.rand(shape[1], generator=torch.Generator().manual_seed(1))
    expected = (out.float() * scale).bfloat16()
    assert torch.equal(scale_channels(out.clone().T.contiguous().T, scale), expected)
    assert scale_channels(out, scale) is out
    assert torch.equal(out, expected)
    out[0, 0] = torch.nan
    assert scale_channels(out, scale)[0, 0].isnan()


def test_every_8_bit_number_comes_out_exactly() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 256)
    ones = torch.ones(1)
    levels, _ = LOW_BIT["int8"].expand({"levels": every.view(torch.int8), "scale": ones}, 256, torch.bfloat16)
    assert torch.equal(levels, every.view(torch.int8).bfloat16())
    numbers = every.view(torch.float8_e4m3fn)
    actual, _ = LOW_BIT["fp8"].expand({"numbers": numbers, "scale": ones}, 256, torch.bfloat16)
    is_number = ~numbers.float().isnan()
    assert torch.equal(actual[is_number], numbers.bfloat16()[is_number])


def by_hand(format_: Quantized, parts: dict[str, Tensor], o: int, i: int) -> float:
    """One weight, decoded from the stored numbers as the formats' definitions have it."""
    number = {name: tensor.float().numpy() if tensor.is_floating_point() else tensor for name, tensor in parts.items()}
    match format_.name.split("_g"):
        case ["int8"]:
            return int(number["levels"][o, i]) * float(number["scale"][o])
        case ["fp8", *group]:
            byte = int(parts["numbers"].view(torch.uint8)[o, i])
            exponent, mantissa = byte >> 3 & 15, byte & 7
            value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
            scale = number["scale"][o, i // int(group[0])] if group else number["scale"][o]
            return (-value if byte & 128 else value) * float(scale)
        case ["int4", group]:
            byte = int(number["codes"][o, i // 2])
            return ((byte >> 4 if i % 2 else byte & 15) - 8) * float(number["scale"][o, i // int(group)])
        case ["mxfp4"]:
            byte = int(number["blocks"][o, i // 32, i % 32 // 2])
            code = byte >> 4 if i % 2 else byte & 15
            exponent, mantissa = code >> 1 & 3, code & 1
            value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
            return (-value if code & 8 else value) * 2.0 ** (int(number["scales"][o, i // 32]) - 127)
    raise AssertionError(f"{format_.name} has no definition here")


@pytest.mark.parametrize("name", LOW_BIT)
def test_stored_numbers_mean_what_the_definitions_say(name: str) -> None:
    weight = torch.randn(3, 140, generator=torch.Generator().manual_seed(5)) * torch.logspace(-3, 1, 140)
    parts = dict(LOW_BIT[name].quantize(weight))
    expected = torch.tensor([[by_hand(LOW_BIT[name], parts, o, i) for i in range(140)] for o in range(3)])
    torch.testing.assert_close(dequantized(LOW_BIT[name], weight), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LOW_BIT)
def test_bytes_are_those_of_the_bits(name: str) -> None:
    layout = ExpertLayout({"gate_up_proj": (512, 256), "down_proj": (256, 256)})
    num_weights, num_channels = 768 * 256, 768
    scales = 4 * num_channels if name in ("int8", "fp8") else 0
    assert 0 <= LOW_BIT[name].nbytes(layout) - BYTES_PER_WEIGHT[name] * num_weights - scales <= 16
    packed = LOW_BIT[name].pack({n: torch.randn(s) for n, s in layout.shapes.items()}, layout)
    assert packed.nbytes == packed.untyped_storage().nbytes() == LOW_BIT[name].nbytes(layout)


def test_int4_uses_all_levels_and_short_groups() -> None:
    weight = torch.linspace(-7, 8, 16)[None] * 0.5  # the largest is positive: it becomes -8 under a negative scale
    parts = FORMATS["int4_g32"].quantize(weight)
    assert parts["scale"].tolist() == [[-0.5]]
    assert torch.equal(dequantized(LOW_BIT["int4_g32"], weight), weight)
    weight = torch.cat([torch.full((1, 32), 8.0), torch.full((1, 5), 0.25)], 1)  # the rest has a scale of its own
    assert torch.equal(dequantized(LOW_BIT["int4_g32"], weight), weight)


def stored_as_gpt_oss(seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (48, 2, 16), dtype=torch.uint8, generator=random)
    return blocks, torch.randint(110, 130, (48, 2), dtype=torch.uint8, generator=random)


def test_mxfp4_is_kept_as_gpt_oss_stores_it() -> None:
    layout = ExpertLayout({"gate_up_proj": (64, 48), "gate_up_proj_bias": (48,)}, is_transposed=True)
    blocks, scales = stored_as_gpt_oss()
    mxfp4, bias = Mxfp4(), torch.randn(48)
    packed = mxfp4.pack_parts(
        {"gate_up_proj": {"blocks": blocks, "scales": scales}}, {"gate_up_proj_bias": bias}, layout
    )
    views = mxfp4.views(packed, layout)
    assert torch.equal(views["gate_up_proj.blocks"], blocks)
    assert torch.equal(views["gate_up_proj.scales"], scales)
    assert torch.equal(views["gate_up_proj_bias"], bias)
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0]  # [in, out]
    assert torch.equal(mxfp4.dequantize(views, "gate_up_proj", layout, torch.float32), expected)
    again = mxfp4.pack({"gate_up_proj": expected, "gate_up_proj_bias": bias}, layout)
    restored = mxfp4.dequantize(mxfp4.views(again, layout), "gate_up_proj", layout, torch.float32)
    assert torch.equal(restored, expected), "what mxfp4 can hold is packed without an error"


def test_parts_that_do_not_fit_are_refused() -> None:
    layout = ExpertLayout({"down_proj": (48, 64)})
    blocks, scales = stored_as_gpt_oss()
    for parts in ({"blocks": blocks}, {"blocks": blocks[:-1], "scales": scales}, {"blocks": blocks.int()}):
        with pytest.raises(UserError, match=r"'down_proj'.*mxfp4"):
            Mxfp4().pack_parts({"down_proj": parts}, {}, layout)
    with pytest.raises(UserError, match=r"'down_proj'.*undefined scale"):
        Mxfp4().pack_parts({"down_proj": {"blocks": blocks, "scales": scales | 255}}, {}, layout)
    fp8 = {"numbers": torch.full((48, 64), 127, dtype=torch.uint8).view(torch.float8_e4m3fn), "scale": torch.ones(48)}
    with pytest.raises(UserError, match=r"'down_proj'.*undefined"):
        LOW_BIT["fp8"].pack_parts({"down_proj": fp8}, {}, layout)


@pytest.mark.parametrize("num_rows", [1, 3, 4, 8, 17, 25])
@pytest.mark.parametrize("num_in", [16, 20, 24, 40, 48, 100])
@pytest.mark.parametrize(("is_fast", "max_rows"), [(True, 8), (False, 24)], ids=["native products", "products in fp32"])
def test_the_packed_kernel_runs_only_where_it_is_right(
    num_in: int, num_rows: int, is_fast: bool, max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rq_ep.formats.int8.has_fast_products", lambda dtype: is_fast)
    calls = []
    kernel = torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *args: calls.append(1) or kernel(*args))
    random = torch.Generator().manual_seed(0)
    weight, x = torch.randn(37, num_in, generator=random), torch.randn(num_rows, num_in, generator=random).bfloat16()
    actual = Int8().product(x, Int8().quantize(weight))
    assert bool(calls) == (num_in % 16 == 0 and num_rows <= max_rows) == can_multiply_packed(x)
    expected = x.float() @ dequantized(LOW_BIT["int8"], weight).T
    torch.testing.assert_close(actual.float(), expected, rtol=2e-2, atol=2e-2 * num_in**0.5)
    assert not can_multiply_packed(x.float())
