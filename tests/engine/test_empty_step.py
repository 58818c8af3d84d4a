import pytest
import torch
from torch import nn

from rq_ep.core.errors import UserError
from rq_ep.engine.empty_step import empty_step


class BrokenModel(nn.Module):
    """As a model of which a setting is null."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        return torch.topk(self.weight, None)[0]  # type: ignore[arg-type]


def test_a_model_that_fails_in_its_first_step_is_refused_at_start_in_one_line() -> None:
    with pytest.raises(UserError, match=r"the model fails in its first step \(TypeError: .*: see its config\.json"):
        empty_step(BrokenModel(), [])
