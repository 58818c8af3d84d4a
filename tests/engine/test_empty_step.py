"""The steps of a model before its first request."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rq_ep.core.errors import UserError
from rq_ep.engine import lockstep
from rq_ep.engine.empty_step import empty_step, first_steps
from rq_ep.engine.engine import Engine, EngineConfig
from rq_ep.engine.servable import set_attention
from rq_ep.model.load.load_model import load
from rq_ep.model.load.load_report import report_of
from rq_ep.moe.output_norms import OutputNorms
from rq_ep.moe.telemetry import Telemetry
from rq_ep.parallel import TorchGroup
from tests.engine.cases import CONFIG
from tests.model.families import FAMILIES, random_model, save


class BrokenModel(nn.Module):
    """As a model of which a setting is null."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        return torch.topk(self.weight, None)[0]  # type: ignore[arg-type]


def test_a_model_that_fails_in_its_first_step_is_refused_at_start_in_one_line() -> None:
    refusal = r"the model fails in its first step \(TypeError: .*: see its config\.json"
    with pytest.raises(UserError, match=refusal), first_steps([]):
        empty_step(BrokenModel(), [])


@pytest.mark.slow
def test_a_model_that_its_cache_does_not_fit_is_refused_at_start(
    gloo_of_one: TorchGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lockstep, "pad_cache", lambda cache, config: None)
    with pytest.raises(UserError, match=r"the model fails in its first step \(RuntimeError: .*same slice shapes"):
        engine_of("deepseek_v3", gloo_of_one, tmp_path)


@pytest.mark.slow
def test_a_cache_that_does_not_fit_is_refused_at_start(gloo_of_one: TorchGroup, tmp_path: Path) -> None:
    config = replace(CONFIG, kv_cache_tokens=10**12)
    with pytest.raises(UserError, match=r"the KV cache does not fit \(.*\): lower --kv-cache-tokens"):
        engine_of("mixtral", gloo_of_one, tmp_path, config=config)


@pytest.mark.slow
def test_first_steps_leave_no_trace(gloo_of_one: TorchGroup, tmp_path: Path) -> None:
    delivered: list[Any] = []
    telemetry, norms = Telemetry(max_records=100), OutputNorms()
    norms.between_steps()
    engine = engine_of("mixtral", gloo_of_one, tmp_path, telemetry, norms, delivered)
    norms.between_steps()
    assert len(telemetry) == 0
    assert not list(norms.take())
    assert not delivered
    assert (engine.kv_cache_usage, engine.num_running, engine.num_waiting, engine.steps) == (0, 0, 0, (0, 0.0))
    assert engine.warmup_s > 0
    layers = report_of(engine._manager.model).layers
    for layer in layers:
        layer(torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert len(telemetry) == len(layers), "they record again"


def engine_of(
    family: str,
    group: TorchGroup,
    path: Path,
    telemetry: Telemetry | None = None,
    norms: OutputNorms | None = None,
    delivered: list[Any] | None = None,
    config: EngineConfig = CONFIG,
) -> Engine:
    model = load(save(random_model(FAMILIES[family]), path), strategy="standard", group=group, telemetry=telemetry)
    set_attention(model, None)
    layers = report_of(model).layers
    if norms is not None:
        for layer in layers:
            layer.sample_norms(norms)
    return Engine(model, layers, group, config, on_outputs=(delivered or []).append, on_failure=pytest.fail)
