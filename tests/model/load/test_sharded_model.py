"""A model spread over ranks, played in one process, is collected as it is in one piece."""

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


def assert_same(found: ExpertStats, expected: ExpertStats) -> None:
    for name in ("counts", "tokens", "phase", "domain", "visits"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    for name in ("importance", "gate_mass", "error"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-9, err_msg=name)
    for name in ("formats", "native_format", "expert_bytes", "model", "layers", "hidden_size", "top_k", "domains"):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize(("num_ranks", "importance"), [(2, "output"), (3, "wanda"), (9, "gate-mass"), (2, "drop")])
def test_ranks_hear_what_one_process_hears(tiny_checkpoint: Path, num_ranks: int, importance: str) -> None:
    arguments = (tiny_checkpoint, tiny_checkpoint / "text" / "train")
    settings = {**SAMPLE, "importance": importance, "sensitivity_tokens": 256}
    expected = calibrate(*arguments, **settings)
    for found in on_ranks(num_ranks, *arguments, **settings):  # nine ranks are more than the experts
        assert_same(found, expected)


def test_the_trace_is_written_once_and_the_same(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = (tiny_checkpoint, tiny_checkpoint / "text" / "train")
    calibrate(*arguments, trace_path=tmp_path / "one", **SAMPLE)
    on_ranks(2, *arguments, trace_path=tmp_path / "two", **SAMPLE)
    one, two = (RoutingTrace.load(tmp_path / name) for name in ("one", "two"))
    assert np.array_equal(one.ids_NLK, two.ids_NLK)
    np.testing.assert_allclose(one.weights_NLK, two.weights_NLK, rtol=1e-4)


def test_experts_written_in_advance_are_measured_where_they_lie(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tiny_checkpoint / "text" / "train"
    settings = {**SAMPLE, "packed_experts": tmp_path / "experts"}
    quantize(tiny_checkpoint, tmp_path / "experts", formats=["int4_g32"], texts=text, sequence_length=32)
    expected = calibrate(tiny_checkpoint, text, **settings)
    assert not np.allclose(expected.error, calibrate(tiny_checkpoint, text, **SAMPLE).error)
    for found in on_ranks(2, tiny_checkpoint, text, **settings):
        assert_same(found, expected)
    (tmp_path / "experts" / "layer-00001.safetensors").write_bytes(b"nonsense" * 9)
    with pytest.raises(UserError, match="cut short, damaged or foreign"):
        on_ranks(2, tiny_checkpoint, text, **settings)


def test_what_takes_one_process_is_refused_on_several(tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match="--measure-kl"):
        on_ranks(2, tiny_checkpoint, tiny_checkpoint / "text" / "train", measure_kl=True, **SAMPLE)
