"""Calibration of a model whose experts are sharded over ranks, in one process: the same as of the whole model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rq_ep.core.errors import UserError
from rq_ep.core.stats import ExpertStats
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.model.calibration.quantize import quantize
from rq_ep.parallel import run_local
from rq_ep.sim.traces import RoutingTrace

SAMPLE: dict[str, Any] = {
    "sequence_length": 32, "max_tokens": 1024, "dtype": torch.float32, "formats": ["int8", "int4_g32"],
}  # fmt: skip


def on_ranks(num_ranks: int, *arguments: Any, **settings: Any) -> list[ExpertStats]:
    """What each rank has in the end."""
    return run_local(num_ranks, lambda group: calibrate(*arguments, group=group, **settings))


def assert_same(actual: ExpertStats, expected: ExpertStats) -> None:
    for name in ("counts", "tokens", "phase", "domain", "visits"):
        assert np.array_equal(getattr(actual, name), getattr(expected, name)), name
    for name in ("importance", "gate_mass", "error"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=1e-4, atol=1e-9, err_msg=name)
    for name in ("formats", "native_format", "expert_bytes", "model", "layers", "hidden_size", "top_k", "domains"):
        assert getattr(actual, name) == getattr(expected, name), name


@pytest.mark.parametrize(("num_ranks", "importance"), [(2, "output"), (3, "wanda"), (9, "gate-mass"), (2, "drop")])
def test_sharded_calibration_equals_that_of_one_process(tiny_checkpoint: Path, num_ranks: int, importance: str) -> None:
    arguments = (tiny_checkpoint, tiny_checkpoint / "text" / "train")
    settings = {**SAMPLE, "importance": importance, "sensitivity_tokens": 256}
    expected = calibrate(*arguments, **settings)
    for actual in on_ranks(num_ranks, *arguments, **settings):  # nine ranks are more than the experts
        assert_same(actual, expected)


def test_the_trace_is_written_once_and_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = (tiny_checkpoint, tiny_checkpoint / "text" / "train")
    calibrate(*arguments, trace_path=tmp_path / "one", **SAMPLE)
    on_ranks(2, *arguments, trace_path=tmp_path / "two", **SAMPLE)
    one, two = (RoutingTrace.load(tmp_path / name) for name in ("one", "two"))
    assert np.array_equal(one.ids_NLK, two.ids_NLK)
    np.testing.assert_allclose(one.weights_NLK, two.weights_NLK, rtol=1e-4)


def test_packed_experts_are_measured_on_the_rank_that_holds_them(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tiny_checkpoint / "text" / "train"
    settings = {**SAMPLE, "packed_experts": tmp_path / "experts"}
    quantize(tiny_checkpoint, tmp_path / "experts", formats=["int4_g32"], texts=text, sequence_length=32)
    expected = calibrate(tiny_checkpoint, text, **settings)
    assert not np.allclose(expected.error, calibrate(tiny_checkpoint, text, **SAMPLE).error)
    for actual in on_ranks(2, tiny_checkpoint, text, **settings):
        assert_same(actual, expected)
    (tmp_path / "experts" / "layer-00001.safetensors").write_bytes(b"nonsense" * 9)
    with pytest.raises(UserError, match="cut short, damaged or foreign"):
        on_ranks(2, tiny_checkpoint, text, **settings)


def test_measurements_of_one_process_are_refused_on_several(tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match="--measure-kl"):
        on_ranks(2, tiny_checkpoint, tiny_checkpoint / "text" / "train", measure_kl=True, **SAMPLE)
