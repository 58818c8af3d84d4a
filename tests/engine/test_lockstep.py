"""The override of transformers' private loop: that it is where we think it is, and what a batch is made of."""

import inspect
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from transformers.generation.continuous_batching.continuous_api import BackgroundThreadStatus, ContinuousBatchingManager
from transformers.generation.continuous_batching.model_runner import ModelRunner

from rq_ep.engine.lockstep import LockstepManager, batch_of
from rq_ep.engine.requests import Batch

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def test_the_overridden_methods_are_those_of_the_pinned_transformers() -> None:
    requirements = map(Requirement, tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"])
    pinned = next(requirement for requirement in requirements if requirement.name == "transformers")
    assert transformers.__version__ in pinned.specifier, "the engine was tested with another transformers"
    assert {spec.operator for spec in pinned.specifier} >= {"<"}, "a private method is overridden: pin the range"

    for manager in (ContinuousBatchingManager, LockstepManager):
        body = inspect.signature(manager._generation_loop_body)
        assert list(body.parameters) == ["self", "batch_processor", "bootstrapping"]
    loop = inspect.getsource(ContinuousBatchingManager._run_generation_loop)
    assert "self._generation_loop_body(batch_processor, bootstrapping=False)" in loop
    assert "self._create_batch_processor()" in loop
    assert list(inspect.signature(ModelRunner._sample).parameters) == ["self", "scores", "output_ids"]
    assert "self._sample(scores, output_ids)" in inspect.getsource(ModelRunner._forward_process_and_sample)
    assert "self._wake_up_loop.set()" in inspect.getsource(ContinuousBatchingManager.add_request)


def test_an_error_of_the_thread_before_its_first_step_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers logs it and ends the thread."""

    def fail(_: object) -> None:
        raise KeyError("cache")

    errors: list[BaseException] = []
    manager: Any = object.__new__(LockstepManager)
    manager.model = SimpleNamespace(device=torch.device("cpu"))
    manager.background_thread_status = BackgroundThreadStatus()
    manager._on_failure, manager._has_failed = errors.append, False
    monkeypatch.setattr(LockstepManager, "_create_batch_processor", fail)
    monkeypatch.setattr(ContinuousBatchingManager, "_handle_critical_error", lambda *_: None)
    manager._run_generation_loop()
    assert [str(error) for error in errors] == ["'cache'"]


def test_a_batch_with_a_prompt_is_prefill_and_one_of_answers_alone_is_not() -> None:
    answer, prompt = (
        SimpleNamespace(
            state=SimpleNamespace(request_id=name, generated_tokens=tokens, position_offset=end), query_length=length
        )
        for name, tokens, end, length in (("old", [1], 8, 1), ("new", [], 3, 3))
    )
    assert batch_of([answer, prompt]) == Batch([("old", 1), ("new", 3)], True, starts=[7, 0])
    assert batch_of([answer]) == Batch([("old", 1)], False, starts=[7])
