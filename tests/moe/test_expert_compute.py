"""Grouped kernel, loop and parts of bounded size compute the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rq_ep.formats import FORMATS, get_format
from rq_ep.formats.native import Native
from rq_ep.moe import ExpertFamily
from rq_ep.moe.expert_compute import GroupedExperts, add_outputs
from rq_ep.moe.grouped_gemm import Stack, can_group
from rq_ep.parallel import Received
from tests.moe.cases import families

NUM_EXPERTS, D, F_ = 5, 64, 32
FAMILIES = {name: family for name, family in families(D, F_).items() if name != "ungated"}


CPU = torch.device("cpu")


def stack_of(family: ExpertFamily, name: str, device: torch.device = CPU) -> Stack:
    random = torch.Generator().manual_seed(0)
    stack = Stack.empty(get_format(name), family.layout, NUM_EXPERTS, device)
    for packed in stack.packed:
        weights = {n: torch.randn(s, generator=random) * 0.2 for n, s in family.layout.shapes.items()}
        packed.copy_(stack.format.pack(weights, family.layout))
    return stack


def received_of(pairs_J: list[int], num_rows: int, dtype: torch.dtype, device: torch.device = CPU) -> Received:
    random = torch.Generator().manual_seed(1)
    num_pairs = sum(pairs_J)
    return Received(
        rows_MD=torch.randn(num_rows, D, generator=random).to(device, dtype),
        row_N=torch.randint(num_rows, (num_pairs,), generator=random).to(device),
        weight_N=torch.rand(num_pairs, generator=random).to(device),
        experts=tuple(range(len(pairs_J))),
        offsets=(0, *np.cumsum(pairs_J).tolist()),
    )


def outputs(stack: Stack, family: ExpertFamily, received: Received, max_bytes: int | None = None) -> torch.Tensor:
    partial_MD = torch.zeros(received.rows_MD.shape, device=received.rows_MD.device)
    active = [j for j in range(NUM_EXPERTS) if received.offsets[j] < received.offsets[j + 1]]
    add_outputs(partial_MD, received, GroupedExperts(stack, active, active), family, max_bytes)
    return partial_MD


def use_native_products(monkeypatch: pytest.MonkeyPatch, are_fast: bool = True) -> None:
    """Whatever this CPU is, it shall have (or lack) arithmetic in bf16."""
    monkeypatch.setattr("rq_ep.moe.grouped_gemm.has_fast_products", lambda dtype: are_fast)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("pairs_J", [[3, 0, 17, 1, 4], [0, 0, 9, 0, 0], [1, 1, 1, 1, 1]], ids=str)
def test_grouped_kernel_equals_the_loop(
    family: ExpertFamily, pairs_J: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = stack_of(family, "bf16")
    received = received_of(pairs_J, 10, torch.bfloat16)
    use_native_products(monkeypatch)
    calls = []
    kernel = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs))
    grouped_MD = outputs(stack, family, received)
    assert bool(calls) == (sum(pairs > 0 for pairs in pairs_J) > 1)
    monkeypatch.setattr("rq_ep.moe.grouped_gemm.can_group", lambda *_: False)
    loop_MD = outputs(stack, family, received)
    assert (grouped_MD - loop_MD).norm() < 2e-2 * loop_MD.norm()


@pytest.mark.parametrize("name", FORMATS)
def test_bounded_workspace_gives_the_same_sums(name: str) -> None:
    family = FAMILIES["gated"]
    stack = stack_of(family, name)
    received = received_of([9, 0, 13, 2, 6], 11, torch.float32)
    torch.testing.assert_close(outputs(stack, family, received, max_bytes=4000), outputs(stack, family, received))


def test_kernel_is_only_chosen_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    use_native_products(monkeypatch)
    stack = stack_of(FAMILIES["gated"], "bf16")
    x_ND = torch.zeros(2, D, dtype=torch.bfloat16)
    assert can_group(x_ND, stack, "gate_up_proj")
    assert not can_group(x_ND.float(), stack, "gate_up_proj")
    assert not can_group(x_ND, stack_of(FAMILIES["gated"], "int8"), "gate_up_proj")
    odd = families(D, 33)["gated"]
    assert not can_group(x_ND, stack_of(odd, "bf16"), "gate_up_proj")
    use_native_products(monkeypatch, False)
    assert not can_group(x_ND, stack, "gate_up_proj")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("pairs_J", [[3, 0, 17, 1, 4], [40, 30, 0, 0, 50]], ids=str)
@pytest.mark.parametrize("name", [name for name, format_ in FORMATS.items() if not format_.is_native])
def test_low_bits_in_bf16_equal_the_dequantized_experts(name: str, family: ExpertFamily, pairs_J: list[int]) -> None:
    stack = stack_of(family, name)
    dequantized = Stack.empty(get_format("fp32"), family.layout, NUM_EXPERTS, CPU)
    for expert, packed in zip(stack.experts, dequantized.packed, strict=True):
        weights = {n: stack.format.dequantize(expert, n, family.layout, torch.float32) for n in family.layout.shapes}
        packed.copy_(dequantized.format.pack(weights, family.layout))
    received = received_of(pairs_J, 30, torch.bfloat16)
    expected_MD = outputs(dequantized, family, replace(received, rows_MD=received.rows_MD.float()))
    assert (outputs(stack, family, received) - expected_MD).norm() < 1e-2 * expected_MD.norm()


def test_rows_that_repeat_are_added_in_a_fixed_order() -> None:
    family = FAMILIES["gated"]
    stack = stack_of(family, "bf16")
    received = received_of([200, 200, 100, 50, 50], 3, torch.bfloat16)
    first = outputs(stack, family, received)
    assert all(torch.equal(first, outputs(stack, family, received)) for _ in range(5))


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("num_rows", [3, 40])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_row_that_is_not_finite_changes_no_other(name: str, num_rows: int, value: str) -> None:
    family = families(128, 128)["gated"]
    dtype = FORMATS[name].dtype if isinstance(FORMATS[name], Native) else torch.bfloat16
    stack = stack_of(family, name)
    received = replace(
        received_of([num_rows, 0, num_rows, 1, 2], num_rows, dtype), rows_MD=torch.randn(num_rows, 128).to(dtype)
    )
    damaged_MD = received.rows_MD.clone()
    damaged_MD[1] = float(value)
    well = outputs(stack, family, received)
    damaged = outputs(stack, family, replace(received, rows_MD=damaged_MD))
    others = torch.arange(num_rows) != 1
    assert torch.equal(damaged[others], well[others])
    assert not damaged[1].isfinite().any()
