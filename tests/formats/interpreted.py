"""Run as a program with TRITON_INTERPRET=1: the GPU's kernels, computed by Triton's interpreter on the CPU.

In fp16: the interpreter multiplies bf16 numbers as if their bits were integers.
"""

import torch
from torch import Tensor

from rq_ep.formats import FORMATS, ExpertLayout
from rq_ep.formats.int4 import Int4
from rq_ep.formats.kernels.triton_codes import pairs_to_bf16
from rq_ep.formats.kernels.triton_grouped import can_multiply, grouped_product, operand
from rq_ep.formats.mxfp4 import Mxfp4
from rq_ep.formats.quantized import Quantized

LAYOUT = ExpertLayout({"gate_up_proj": (80, 256), "down_proj": (130, 384)})  # out: no multiples of a block
SLOTS, ENDS = (0, 2, 3), (3, 4, 25)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


def check(name: str, matrix: str, dtype: torch.dtype, device: str = "cpu") -> float:
    """Compare the kernel with the product of dequantized weights; returns the relative distance."""
    random = torch.Generator().manual_seed(0)
    format_ = FORMATS[name]
    assert isinstance(format_, Quantized)
    stack = torch.stack([
        format_.pack({n: torch.randn(s, generator=random) for n, s in LAYOUT.shapes.items()}, LAYOUT) for _ in range(4)
    ])  # fmt: skip
    x_ND = torch.randn(ENDS[-1], LAYOUT.shapes[matrix][1], generator=random).to(dtype)
    expected = [
        x_ND[start:end].float() @ dequantized(format_, stack[slot], matrix).T
        for slot, start, end in zip(SLOTS, (0, *ENDS[:-1]), ENDS, strict=True)
    ]
    assert can_multiply(x_ND, format_)
    packed = operand(format_, format_.parts(format_.views(stack.to(device), LAYOUT), matrix, LAYOUT))
    actual = grouped_product(x_ND.to(device), packed, SLOTS, ENDS).cpu().float()
    error = float((actual - torch.cat(expected)).norm() / torch.cat(expected).norm())
    assert error < TOLERANCE[dtype], (name, matrix, dtype, error)
    return error


def dequantized(format_: Quantized, packed: Tensor, matrix: str) -> Tensor:
    return format_.dequantize(format_.views(packed, LAYOUT), matrix, LAYOUT, torch.float32)


def check_unpacked(name: str, matrix: str, device: str = "cpu") -> None:
    """Compare 4-bit codes as the GPU unpacks them with those that tensor operations unpack, bit by bit."""
    format_ = FORMATS[name]
    assert isinstance(format_, Int4 | Mxfp4)
    num_out, num_in = LAYOUT.matrix_shape(matrix)
    parts = format_.quantize(torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(0)))
    expected, _ = format_.expand(parts, num_in, torch.float32)
    kind, codes, scale = (
        ("int4", parts["codes"], parts["scale"])
        if isinstance(format_, Int4)
        else ("mxfp4", parts["blocks"], parts["scales"])
    )
    actual = pairs_to_bf16(kind, codes.view(*scale.shape, -1).to(device), scale.to(device))
    assert torch.equal(actual.cpu(), expected.bfloat16()), (name, matrix)


if __name__ == "__main__":
    for name, format_ in FORMATS.items():
        if not format_.is_native:
            for matrix in LAYOUT.matrices:
                print(name, matrix, f"{check(name, matrix, torch.float16):.1e}")
                if isinstance(format_, Int4 | Mxfp4):
                    check_unpacked(name, matrix)
