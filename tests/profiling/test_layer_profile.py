"""What the profile times, with a stopwatch that counts rows instead of seconds; and once with the real one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rq_ep.costs import Profile
from rq_ep.parallel import EPGroup, run_local, single_group
from rq_ep.profiling import layer_profile as module
from rq_ep.profiling.layer_profile import ProfiledLayer, profile_layer
from rq_ep.profiling.link_times import named_link
from rq_ep.profiling.timing import MIN_REPEATS, own_seconds, typical
from tests.moe.cases import F_, FAMILIES, D

pytestmark = pytest.mark.slow


def timed(group: EPGroup, family: str = "gated", num_experts: int = 5, top_k: int = 1) -> Profile:
    layer = ProfiledLayer(FAMILIES[family], num_experts, top_k, ("fp32", "int8"), torch.float32)
    return profile_layer(layer, group, device_name="a CPU", link_machine="cpu", budget_s=0.0)


def test_a_steady_machine_is_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    def microsecond_per_row(run: Callable[[], Tensor], device: torch.device, budget_s: float) -> float:
        return 1e-6 * len(run())

    monkeypatch.setattr(module, "typical", microsecond_per_row)
    profile = timed(single_group())
    assert (profile.hidden_size, profile.intermediate_size, profile.num_experts) == (D, F_, 5)
    for name, fit in profile.fits.items():
        assert fit.pair_s == pytest.approx(1e-6), name
        assert fit.call_s + fit.overhead_s + fit.stream_s == pytest.approx(0, abs=2e-6)
    assert [(check.format, check.num_tokens) for check in profile.checks] == [
        (name, tokens) for name in ("fp32", "int8") for tokens in module.CHECK_TOKENS
    ]
    for check in profile.checks:
        assert check.measured_s == pytest.approx(1e-6 * check.num_tokens)
        assert check.error == pytest.approx(0, abs=1e-6)
    cost = profile.layer(ProfiledLayer(FAMILIES["gated"], 5, 1, ("fp32",), torch.float32).shape)
    assert cost.row_s == pytest.approx(1e-6 + 4 * D * named_link("cpu").row_byte_s)
    assert "not measured" in profile.link.source
    assert profile.plan_ranks == module.PLAN_RANKS


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_agree_and_time_their_link(family: str) -> None:
    first, second = run_local(2, lambda group: timed(group, family, top_k=2))
    assert first == second
    assert first.link.source == "measured between 2 ranks, local"
    assert (first.num_ranks, first.plan_ranks) == (2, 2)
    assert {"standard", "rq"} <= set(first.plan_s)
    assert all(set(calls.experts) == {1, 3} for calls in first.experts.values())


def test_a_call_that_takes_long_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "typical", lambda run, device, budget_s: 0.4 * len(run()))
    sizes = [list(zip(calls.experts, calls.rows)) for calls in timed(single_group(), num_experts=2).experts.values()]
    assert sizes == [[(1, 1), (1, 4), (2, 1), (2, 2)]] * 2  # 0.4 and 1.6 s; 0.8 and 1.6 s


def test_calls_are_repeated_within_the_budget() -> None:
    calls: list[int] = []
    assert typical(lambda: calls.append(1), torch.device("cpu"), budget_s=0.0) >= 0
    assert len(calls) == 1 + MIN_REPEATS  # one to warm up
    assert own_seconds(lambda: sum(range(100_000)), torch.device("cpu")) > 0
