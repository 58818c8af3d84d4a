"""The formats that torchao has, too: the same bits.

Runs where torchao is: `pip install -c launch/constraints.txt -e .[oracles]`.
"""

import pytest
import torch

from rq_ep.formats import FORMATS
from rq_ep.formats.int4 import OFFSET
from rq_ep.formats.kernels.unpack import nibbles
from rq_ep.formats.mxfp4 import GROUP_SIZE
from rq_ep.formats.quantized import Parts

primitives = pytest.importorskip("torchao.quantization.quant_primitives")
mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")

NUM_OUT, NUM_IN = 48, 256
WEIGHT = torch.randn(NUM_OUT, NUM_IN, generator=torch.Generator().manual_seed(0)) * 0.02


def parts_of(name: str) -> Parts:
    return FORMATS[name].quantize(WEIGHT)  # type: ignore[attr-defined, no-any-return]


def test_int8_by_output_channel() -> None:
    block, levels = (1, NUM_IN), (torch.int8, -127, 127)
    scale, zero = primitives.choose_qparams_affine(
        WEIGHT, primitives.MappingType.SYMMETRIC, block, *levels, scale_dtype=torch.float32
    )
    parts = parts_of("int8")
    assert torch.equal(parts["scale"], scale.flatten())
    assert torch.equal(parts["levels"], primitives.quantize_affine(WEIGHT, block, scale, zero, *levels))


def test_fp8_by_output_channel() -> None:
    scale = primitives._choose_scale_float8(WEIGHT, [1, NUM_IN], torch.float8_e4m3fn)
    numbers = primitives._quantize_affine_float8(WEIGHT, scale, torch.float8_e4m3fn)
    parts = parts_of("fp8")
    assert torch.equal(parts["scale"], scale.flatten())
    assert torch.equal(parts["numbers"].view(torch.uint8), numbers.view(torch.uint8))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_levels_by_our_scales(group: int) -> None:
    """torchao's own scales are for levels up to 7; ours bring the largest weight to -8, whichever its sign."""
    parts = parts_of(f"int4_g{group}")
    zero = torch.zeros(parts["scale"].shape, dtype=torch.int32)
    levels = primitives.quantize_affine(WEIGHT, (1, group), parts["scale"].float(), zero, torch.int8, -8, 7)
    assert torch.equal(nibbles(parts["codes"]).to(torch.int8) - OFFSET, levels)


def test_mxfp4_blocks_of_groups_with_the_same_scale() -> None:
    """torchao takes a group's scale from its largest weight alone; ours is the better of two."""
    scales, blocks = mx.to_mx(WEIGHT, torch.float4_e2m1fn_x2, GROUP_SIZE, mx.ScaleCalculationMode.FLOOR)
    parts = parts_of("mxfp4")
    is_same = parts["scales"] == scales.view(torch.uint8)
    assert is_same.float().mean() > 0.5
    assert torch.equal(parts["blocks"][is_same], blocks.view(parts["blocks"].shape)[is_same])
