"""Requests with tokens that are not finite: they end by the named error, and nobody else's answer changes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rq_ep.engine.nonfinite import NonFiniteTokens
from rq_ep.parallel import TorchGroup
from tests.engine.cases import CONFIGS, SCORED_FAMILIES, check_only_broken_end
from tests.engine.worker import broken_among_others
from tests.model.families import random_model, save


@pytest.mark.slow
@pytest.mark.parametrize("family", SCORED_FAMILIES)
def test_only_requests_with_a_broken_token_end_by_it_on_one_rank(
    gloo_of_one: TorchGroup, tmp_path: Path, family: str
) -> None:
    path = save(random_model(CONFIGS[family]), tmp_path)
    check_only_broken_end(broken_among_others(path, gloo_of_one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cache_takes_zeros_for_what_is_not_finite(dtype: torch.dtype) -> None:
    cached: list[torch.Tensor] = []
    cache: Any = SimpleNamespace(update=lambda keys, values, layer, kwargs: cached.extend((keys, values)))
    tokens = NonFiniteTokens()
    tokens.watch(cache)
    keys_1HTD, values_1HTD = torch.full((1, 2, 4, 3), 60000.0, dtype=dtype), torch.ones(1, 2, 4, 3, dtype=dtype)
    cache.update(keys_1HTD, values_1HTD, 0, {})
    assert cached[0] is keys_1HTD, "a healthy step copies nothing"
    assert tokens.take() is None

    cached.clear()
    keys_1HTD[0, 1, 2, 0], values_1HTD[0, 0, 3, 1] = float("nan"), -float("inf")
    cache.update(keys_1HTD, torch.ones_like(values_1HTD), 0, {})
    cache.update(torch.ones_like(keys_1HTD), values_1HTD, 1, {})
    assert all(states.isfinite().all() and states.dtype == dtype for states in cached)
    assert not cached[1][0, :, 2].any(), "neither part of the token is left"
    is_finite_T = tokens.take()
    assert is_finite_T is not None
    assert is_finite_T.tolist() == [True, True, False, False]
    assert tokens.take() is None, "the next step begins"
