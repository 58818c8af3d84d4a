"""`python -m bench step`: both ways take turns, and the parts of a step add up."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.serving.decode_step import WAYS, main, rows_of
from rq_ep.core.cost import LAYER_PHASES
from tests.engine.cases import CONFIGS
from tests.model.families import random_model, save


def test_ratios_are_those_of_neighbouring_steps() -> None:
    seconds = [(WAYS[0], 1.0), (WAYS[1], 0.5), (WAYS[0], 8.0), (WAYS[1], 4.0), (WAYS[0], 3.0)]
    steps = [{"way": way, "step": step, "cpu": step / 2} for way, step in seconds]
    first, second = rows_of(steps, 8)
    assert (first["step_ms"], first["step_ratio"], first["num_steps"]) == (3e3, 1.0, 3)
    assert (second["step_ms"], second["step_ratio"], second["cpu_ratio"]) == (2250.0, 0.5, 0.5)


@pytest.mark.slow
def test_the_parts_of_a_step_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.serving.decode_step.torch.set_num_threads", lambda number: None)
    monkeypatch.setattr("bench.serving.decode_step.keep_freed_memory", lambda: None)
    steps: list[dict[str, Any]] = []

    def rows_of_steps(timed: list[dict[str, Any]], at_once: int) -> list[dict[str, Any]]:
        steps.extend(timed)
        return rows_of(timed, at_once)

    monkeypatch.setattr("bench.serving.decode_step.rows_of", rows_of_steps)
    save(random_model(CONFIGS["mixtral"]), tmp_path / "model")
    out = tmp_path / "step.json"
    main(["--model", str(tmp_path / "model"), "--at-once", "2", "--steps", "24", "--json", str(out)])
    document = json.loads(out.read_text())
    assert [(row["way"], row["num_steps"] >= 10) for row in document["rows"]] == [(way, True) for way in WAYS]
    parts = ("agreement", *LAYER_PHASES, "attention, router, ...", "rest")
    for step in steps:
        assert min(step[part] for part in parts) >= 0
        assert sum(step[part] for part in parts) == pytest.approx(step["step"])
