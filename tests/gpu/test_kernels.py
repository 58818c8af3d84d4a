"""Triton's kernels for low bits on a real device, and where they are chosen."""

import pytest
import torch

from rq_ep.formats import FORMATS, get_format
from rq_ep.moe import ExpertFamily
from rq_ep.moe import grouped_gemm as kernels
from tests.moe.test_expert_compute import CPU, FAMILIES, outputs, received_of, stack_of

DEVICE = torch.device("cuda")
LOW_BIT = [name for name, format_ in FORMATS.items() if not format_.is_native]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOW_BIT)
def test_kernels_multiply_dequantized_weights(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from tests.formats.interpreted import LAYOUT, check, check_unpacked

    for matrix in LAYOUT.matrices:
        check(name, matrix, dtype, "cuda")
        if name.startswith(("int4", "mxfp4")):
            check_unpacked(name, matrix, "cuda")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("pairs_J", [[3, 0, 17, 1, 4], [400, 300, 0, 0, 500]], ids=str)
@pytest.mark.parametrize("name", LOW_BIT)
def test_both_devices_compute_the_same(name: str, pairs_J: list[int], family: ExpertFamily) -> None:
    out_MD = outputs(stack_of(family, name, DEVICE), family, received_of(pairs_J, 30, torch.bfloat16, DEVICE))
    expected_MD = outputs(stack_of(family, name), family, received_of(pairs_J, 30, torch.bfloat16, CPU))
    assert (out_MD.cpu() - expected_MD).norm() < 2e-2 * expected_MD.norm()


def test_the_packed_kernel_is_for_few_rows() -> None:
    pytest.importorskip("triton")
    family = FAMILIES["gated"]
    for name, num_rows, is_chosen in (("int8", 4, True), ("int8", 1000, False), ("bf16", 4, False)):
        grouped = kernels.GroupedRows(torch.zeros(num_rows, 64, dtype=torch.bfloat16, device=DEVICE), (0,), (num_rows,))
        stack = kernels.Stack.empty(get_format(name), family.layout, 1, DEVICE)
        assert kernels._are_few_low_bits_on_gpu(grouped, stack, family.up) == is_chosen
