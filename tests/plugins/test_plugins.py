"""The plug-ins with stand-ins for the engines: when they take part, and what they do where something is amiss."""

import logging
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rq_ep.core.errors import UserError
from rq_ep.plugins import sglang_algorithm, vllm_policy
from rq_ep.plugins.engine_calls import SECONDS_VARIABLE, Fallback, seconds_allowed
from rq_ep.plugins.slot_rebalance import SECONDS

EXPERTS, RANKS, SLOTS = 8, 4, 12
OWN_LP = torch.arange(SLOTS)[None] % EXPERTS
LOADS_LE = torch.tensor([[90, 5, 5, 5, 60, 5, 5, 1]])


class OwnPolicy:
    """As vLLM's policy class."""

    @classmethod
    def rebalance_experts(
        cls,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return OWN_LP


class State:
    """As vLLM's EPLB state, of a group of one rank."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.expert_load_window_step = 1
        window = torch.stack([LOADS_LE[:, OWN_LP[0]] * step for step in (2, 1)]).int()
        model = SimpleNamespace(num_logical_experts=EXPERTS)
        self.model_states = {
            "one": SimpleNamespace(expert_load_window=window, physical_to_logical_map=OWN_LP, model=model)
        }

    def rearrange(self, is_profile: bool = False, rank_mapping: Any = None, use_last_expert_load: bool = False) -> Any:
        return is_profile, rank_mapping, use_last_expert_load

    def _allreduce_list(self, tensor_list: list[torch.Tensor]) -> list[torch.Tensor]:
        return tensor_list


def fake_vllm(monkeypatch: pytest.MonkeyPatch, policy: Any = OwnPolicy, plugins: str = "other, rq_ep") -> Any:
    """The policies and the state class after registration."""
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    state = type("EplbState", (State,), {"rearrange": State.rearrange})
    modules = {
        vllm_policy.POLICY: SimpleNamespace(EPLB_POLICIES={"default": policy}),
        vllm_policy.STATE: SimpleNamespace(EplbState=state, gpu_sync_allowed=torch.no_grad),
    }
    monkeypatch.setattr(vllm_policy, "import_module", modules.__getitem__)
    vllm_policy.register()
    return modules[vllm_policy.POLICY].EPLB_POLICIES["default"], state


def test_vllm_must_be_told_to_take_the_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fake_vllm(monkeypatch, plugins="")[0] is OwnPolicy
    assert isinstance(fake_vllm(monkeypatch)[0], vllm_policy.StepPolicy)


def test_vllm_that_calls_otherwise_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Later:
        @classmethod
        def rebalance_experts(cls, weight: torch.Tensor, topology: object) -> torch.Tensor:
            return OWN_LP

    assert fake_vllm(monkeypatch, policy=Later)[0] is Later
    assert "rebalance_experts(weight, topology), not (weight, num_replicas" in caplog.text
    assert "vllm 0.33.0, which were tested" in caplog.text


def test_vllm_keeps_the_steps_of_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, state_class = fake_vllm(monkeypatch)
    state = state_class(policy)
    assert state.rearrange() == (False, None, False)
    (recorded,) = state.policy.recorded
    by_expert_E = LOADS_LE[0].numpy() * np.bincount(OWN_LP[0])
    np.testing.assert_array_equal(recorded.steps_SLE[:, 0], np.array([[1], [2]]) * by_expert_E)
    np.testing.assert_array_equal(recorded.total_LE, [3 * by_expert_E])
    assert state.rearrange(rank_mapping={0: 0}) == (False, {0: 0}, False)
    assert not state.policy.recorded, "slots that are about to change keep no steps"


@pytest.mark.parametrize("weight", [LOADS_LE, LOADS_LE.double(), torch.zeros(1, EXPERTS)])
def test_vllm_places_from_sums(monkeypatch: pytest.MonkeyPatch, weight: torch.Tensor) -> None:
    policy, _ = fake_vllm(monkeypatch)
    new_LP = policy.rebalance_experts(weight, SLOTS, 1, 1, RANKS, OWN_LP)
    assert new_LP.dtype == torch.int64
    assert torch.equal(new_LP, OWN_LP) != bool(weight.any())
    assert policy.rebalance_experts(weight, SLOTS, 3, 2, RANKS).shape == (1, SLOTS), "3 groups are on no 2 nodes"


@pytest.mark.parametrize(
    "wrong", [{"weight": LOADS_LE / 0}, {"num_ranks": 5}, {"old_global_expert_indices": OWN_LP + 9}]
)
def test_vllm_falls_back_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong: dict[str, Any]
) -> None:
    policy, _ = fake_vllm(monkeypatch)
    call = dict(weight=LOADS_LE, num_replicas=SLOTS, num_groups=1, num_nodes=1, num_ranks=RANKS) | wrong
    assert all(policy.rebalance_experts(**call) is OWN_LP for _ in range(2))
    assert caplog.text.count("vLLM places as without rq_ep") == 1
    assert "Traceback" not in caplog.text


def test_a_rank_without_memory_does_not_place_alone(caplog: pytest.LogCaptureFixture) -> None:
    def fail(error: Exception) -> Callable[[], str]:
        def ours() -> str:
            raise error

        return ours

    fallback = Fallback("SGLang")
    with pytest.raises(MemoryError):
        fallback(fail(MemoryError()), "own")
    assert fallback(fail(ZeroDivisionError("chance")), "own") == "own"
    assert "Traceback" in caplog.text, "a fault of ours is shown in full"


class Registry:
    """As SGLang's registry of hooks."""

    def __init__(self) -> None:
        self.hooks: dict[str, Callable[..., Any]] = {}

    def register(self, target: str, hook: Callable[..., Any], kind: str) -> None:
        assert kind == "around"
        self.hooks[target.rpartition(".")[2]] = hook


def rebalance_experts(
    tokens_per_expert: torch.Tensor,
    num_physical_experts: int,
    num_local_physical_experts: int,
    num_groups: int | None,
    num_nodes: int,
    algorithm: Any,
) -> tuple[torch.Tensor, str, str]:
    """As SGLang's."""
    return OWN_LP, "log2phy", algorithm


def fake_sglang(monkeypatch: pytest.MonkeyPatch, rebalance: Callable[..., Any] = rebalance_experts) -> Any:
    """The hooks after registration."""
    registry = Registry()
    algorithms = SimpleNamespace(
        rebalance_experts=rebalance, compute_algorithm=lambda raw_algorithm, num_groups, num_nodes: raw_algorithm
    )
    modules = {
        sglang_algorithm.HOOKS: SimpleNamespace(HookRegistry=registry, HookType=SimpleNamespace(AROUND="around")),
        sglang_algorithm.ALGORITHMS: algorithms,
        sglang_algorithm.LOCATIONS: ModuleType("of another layout"),
    }
    monkeypatch.setattr(sglang_algorithm, "import_module", modules.__getitem__)
    sglang_algorithm.register()
    return SimpleNamespace(**registry.hooks), algorithms


def test_sglang_places_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks, algorithms = fake_sglang(monkeypatch)
    compute = algorithms.compute_algorithm
    assert hooks.compute_algorithm(compute, "deepseek", None, 1) == "deepseek"
    ours = hooks.compute_algorithm(compute, raw_algorithm="rq_ep", num_groups=None, num_nodes=1)
    call = (LOADS_LE.repeat(10, 1, 1), SLOTS, SLOTS // RANKS, None, 1)
    assert hooks.rebalance_experts(rebalance_experts, *call, "deepseek")[2] == "deepseek"
    phy2log, log2phy, logcnt = hooks.rebalance_experts(rebalance_experts, *call, algorithm=ours)
    assert logcnt.tolist() == [np.bincount(phy2log[0]).tolist()]
    assert all((phy2log[0][slots[slots >= 0]] == expert).all() for expert, slots in enumerate(log2phy[0]))
    assert hooks.rebalance_experts(rebalance_experts, call[0] * -1, *call[1:], ours)[2] == "auto"


def test_sglang_that_calls_otherwise_places_as_auto(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hooks, algorithms = fake_sglang(monkeypatch, rebalance=lambda tokens, algorithm: None)
    assert "(tokens, algorithm), not (tokens_per_expert, " in caplog.text
    assert not hasattr(hooks, "rebalance_experts")
    assert hooks.compute_algorithm(algorithms.compute_algorithm, "rq_ep", None, 1) == "auto"


def test_seconds_are_a_number_in_range(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seconds_allowed() == SECONDS
    monkeypatch.setenv(SECONDS_VARIABLE, "0.5")
    assert seconds_allowed() == 0.5
    for text in ("soon", "-1", "nan"):
        monkeypatch.setenv(SECONDS_VARIABLE, text)
        with pytest.raises(UserError, match=SECONDS_VARIABLE):
            seconds_allowed()


def test_registration_without_the_compiler_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rq_ep.solver.compiled.numba", None)
    assert fake_vllm(monkeypatch)[0] is OwnPolicy
    assert "numba is missing" in caplog.text


@pytest.fixture(autouse=True)
def logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
