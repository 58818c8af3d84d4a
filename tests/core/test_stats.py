"""Statistics: what is refused, and what a file gives back."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rq_ep.core.errors import UserError
from rq_ep.core.stats import ExpertStats, ModelIdentity

SIZES = {"bf16": 100, "int8": 52}


@pytest.fixture
def stats() -> ExpertStats:
    generator = np.random.default_rng(0)
    return ExpertStats(
        counts=generator.integers(0, 9, (5, 2, 4)),
        formats=("bf16", "int8"),
        native_format="bf16",
        expert_bytes=SIZES,
        tokens=np.arange(5),
        importance=generator.random((2, 4)),
        error=generator.random((2, 4, 2)),
        model=ModelIdentity("tiny", "abc"),
        layers=(1, 3),
        hidden_size=64,
        top_k=2,
        importance_definition="norms",
        domains=("code", "prose"),
    )


def test_a_file_gives_back_what_was_saved(stats: ExpertStats, tmp_path: Path) -> None:
    stats.save(tmp_path / "stats.safetensors")
    again = ExpertStats.load(tmp_path / "stats.safetensors")
    for name in ("counts", "tokens", "importance", "error"):
        np.testing.assert_array_equal(getattr(again, name), getattr(stats, name))
    for name in ("formats", "native_format", "model", "layers", "hidden_size", "top_k", "domains", "visits"):
        assert getattr(again, name) == getattr(stats, name), name
    assert dict(again.expert_bytes) == SIZES
    assert again.importance_definition == "norms"
    assert again.source.endswith("stats.safetensors")


def test_truncated_and_foreign_files_are_user_errors(stats: ExpertStats, tmp_path: Path) -> None:
    file = tmp_path / "stats.safetensors"
    stats.save(file)
    whole = file.read_bytes()
    for length in (0, 4, 60, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a readable statistics file"):
            ExpertStats.load(file)
    save_file({"weight": np.zeros(1)}, file, {"format": "pt"})  # somebody's model
    with pytest.raises(UserError, match="format is pt, expected"):
        ExpertStats.load(file)
    save_file({"counts": np.zeros((1, 1, 1), np.int64)}, file)
    with pytest.raises(UserError, match="format is None"):
        ExpertStats.load(file)
    save_file({"counts": np.zeros((1, 1, 1), np.int64)}, file, {"format": '"rq_ep.stats/1"'})
    with pytest.raises(UserError, match="incomplete statistics file"):
        ExpertStats.load(file)
    with pytest.raises(UserError, match=r"not a readable statistics file .*directory"):
        ExpertStats.load(tmp_path)
    with pytest.raises(UserError, match="rq-ep calibrate --out"):
        ExpertStats.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"counts": np.zeros((2, 3), np.int64)}, r"counts must be int64 \[any, any, any\]"),
        ({"counts": np.zeros((2, 3, 4))}, "not float64"),
        ({"counts": np.full((1, 2, 4), -3)}, "one is -3"),
        ({"native_format": "fp16"}, "native format 'fp16' is not among"),
        ({"expert_bytes": {"bf16": 100}}, "expert_bytes lacks int8"),
        ({"expert_bytes": {"bf16": 100, "int8": 0}}, "expert_bytes of int8 0: must be at least 1"),
        ({"layers": (1, 2, 3)}, "3 layer indices for 2 layers"),
        ({"importance": np.zeros((4, 2))}, r"importance must be float64 \[2, 4\], not float64 \[4, 2\]"),
        ({"error": np.zeros((2, 4))}, r"error must be float64 \[2, 4, 2\]"),
        ({"tokens": np.zeros(4, np.int64)}, r"tokens must be int64 \[5\]"),
        ({"counts": np.full((1, 2, 4), 2**62)}, "counts add up to"),
        ({"importance": np.full((2, 4), np.nan)}, "importance must be finite and not negative, but one is nan"),
        ({"importance": np.full((2, 4), np.inf)}, "one is inf"),
        ({"importance": np.ones((2, 4), np.int64)}, "must be float64"),
        ({"error": np.full((2, 4, 2), -1.0)}, "error must be finite and not negative"),
        ({"visits": np.full((2, 4), -1)}, "visits must be finite and not negative"),
        ({"phase": np.full(5, 2)}, "phase 2 of a step: there are 2"),
        ({"domain": np.full(5, 7)}, "domain 7 of a step: there are 2"),
        ({"expert_bytes": {"bf16": "a", "int8": 1}}, "expert_bytes of bf16 'a': must be a whole number"),
        ({"expert_bytes": {"bf16": 1e30, "int8": 1}}, "must be a whole number"),
        ({"expert_bytes": {"bf16": 10**30, "int8": 1}}, "must be at most"),
        ({"formats": ("bf16", "bf16"), "error": None}, "a format is named twice"),
        ({"layers": (3, 1)}, r"layers \[3, 1\] must come once each"),
        ({"layers": (1, 1)}, "must come once each"),
        ({"layers": ("a", "b")}, "layer 'a': must be a whole number"),
        ({"top_k": "two"}, "top_k 'two': must be a whole number"),
        ({"expert_groups": 0}, "expert_groups 0: must be at least 1"),
        ({"source": "x.safetensors", "hidden_size": 0}, "x.safetensors: hidden_size 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(stats: ExpertStats, wrong: dict, message: str) -> None:
    from dataclasses import replace

    with pytest.raises(UserError, match=message):
        replace(stats, **wrong)


def test_models_are_told_apart_by_their_hash() -> None:
    ModelIdentity("a", "1").check(ModelIdentity("b", "1"), "stats")
    with pytest.raises(UserError, match="stats was made for model 'b'"):
        ModelIdentity("a", "1").check(ModelIdentity("b", "2"), "stats")
