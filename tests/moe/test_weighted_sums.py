"""Weighted sums: the bits of one addition after another."""

import pytest
import torch

from rq_ep.moe.weighted_sums import add_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "num_values"), [(3, 200), (50, 20), (4, 0), (0, 0)])
def test_values_are_added_in_the_order_they_come_in(dtype: torch.dtype, num_rows: int, num_values: int) -> None:
    random = torch.Generator().manual_seed(0)
    row_N = torch.randint(max(num_rows, 1), (num_values,), generator=random)
    values_ND = (torch.randn(num_values, 37, generator=random) * 10 ** torch.arange(-2, 3).repeat(8)[:37]).to(dtype)
    weight_N = torch.rand(num_values, generator=random)
    sums_MD = torch.randn(num_rows, 37, generator=random)
    expected_MD, given_ND = sums_MD.clone(), values_ND.clone()
    for row, value_D, weight in zip(row_N.tolist(), values_ND, weight_N, strict=True):
        expected_MD[row] += value_D.float() * weight
    add_rows(sums_MD, row_N, values_ND, weight_N)
    assert torch.equal(sums_MD, expected_MD)
    assert torch.equal(values_ND, given_ND)


def test_the_order_changes_the_result() -> None:
    values_ND, weight_N = torch.tensor([[1e8], [1.0], [-1e8]]), torch.ones(3)
    sums_MD = torch.zeros(2, 1)
    add_rows(sums_MD, torch.zeros(3, dtype=torch.int64), values_ND, weight_N)
    add_rows(sums_MD, torch.ones(3, dtype=torch.int64), values_ND[[0, 2, 1]], weight_N)
    assert sums_MD.tolist() == [[0.0], [1.0]]
