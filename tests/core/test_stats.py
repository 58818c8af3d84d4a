"""Statistics: what is refused, and what a file gives back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
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


def content(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of a file, as they are written."""
    with safe_open(file, framework="numpy") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata()  # noqa: SIM118


def test_truncated_and_foreign_files_are_user_errors(stats: ExpertStats, tmp_path: Path) -> None:
    file = tmp_path / "stats.safetensors"
    stats.save(file)
    whole = file.read_bytes()
    for length in (0, 4, 60, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a readable statistics file"):
            ExpertStats.load(file)
    save_file({"weight": np.zeros(1)}, file, {"format": "pt"})  # a model
    with pytest.raises(UserError, match=r"format is 'pt', expected 'rq_ep\.stats/1'"):
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


@pytest.mark.parametrize("integers", [np.uint8, np.int16, np.int32, np.uint64, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("floats", [np.float16, np.float32, np.int8])
def test_a_file_may_hold_its_numbers_in_any_type(
    stats: ExpertStats, tmp_path: Path, integers: type, floats: type
) -> None:
    file = tmp_path / "stats.safetensors"
    replace(stats, importance=np.ones((2, 4)), error=np.zeros((2, 4, 2))).save(file)
    arrays, metadata = content(file)
    types = {"counts": integers, "tokens": integers, "importance": floats, "error": floats}
    save_file({name: array.astype(types[name]) for name, array in arrays.items()}, file, metadata)
    again = ExpertStats.load(file)
    assert (again.counts.dtype, again.importance.dtype) == (np.int64, np.float64)
    np.testing.assert_array_equal(again.counts, stats.counts)
    np.testing.assert_array_equal(again.importance, 1)


def test_a_file_may_hold_bfloat16(stats: ExpertStats, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    file = tmp_path / "stats.safetensors"
    stats.save(file)
    _, metadata = content(file)
    save_torch({name: tensor.to(torch.bfloat16) for name, tensor in load_torch(file).items()}, file, metadata)
    again = ExpertStats.load(file)
    np.testing.assert_array_equal(again.counts, stats.counts)
    np.testing.assert_allclose(again.error, stats.error, rtol=2**-8)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (
            "counts",
            np.full((5, 2, 4), 0.5, np.float32),
            "must be whole numbers that int64 holds, but one is 0.5",
        ),
        ("counts", np.full((5, 2, 4), np.nan), "must be whole numbers that int64 holds, but one is nan"),
        ("counts", np.full((5, 2, 4), 2.0**63), "but one is 9.2"),
        ("counts", np.full((5, 2, 4), 2**63, np.uint64), "but one is 9223372036854775808"),
        ("counts", np.ones((5, 2, 4), bool), "is bool, not numbers"),
        ("counts", np.full((5, 2, 4), -1.0), "must be finite and not negative, but one is -1"),
        ("error", np.full((2, 4, 2), np.nan, np.float32), "must be finite and not negative, but one is nan"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_by_name(
    stats: ExpertStats, tmp_path: Path, name: str, array: np.ndarray, message: str
) -> None:
    file = tmp_path / "stats.safetensors"
    stats.save(file)
    arrays, metadata = content(file)
    save_file({**arrays, name: array}, file, metadata)
    with pytest.raises(UserError, match=rf"stats\.safetensors: {name} .*{message}"):
        ExpertStats.load(file)


def test_metadata_may_be_plain_text(stats: ExpertStats, tmp_path: Path) -> None:
    file = tmp_path / "stats.safetensors"
    stats.save(file)
    arrays, metadata = content(file)
    plain = {"format": "rq_ep.stats/1", "native_format": "bf16", "formats": "bf16, int8", "importance": "norms"}
    save_file(arrays, file, {**metadata, **plain})
    again = ExpertStats.load(file)
    assert (again.formats, again.native_format, again.importance_definition) == (("bf16", "int8"), "bf16", "norms")


@pytest.mark.parametrize(
    "wrong", ["rq_ep.stats/2", '"rq_ep.stats/2"', "'rq_ep.stats/1'", '"rq_ep.stats/1', " rq_ep.stats/1", "[" * 9999]
)
def test_a_refused_format_never_looks_like_the_expected_one(stats: ExpertStats, tmp_path: Path, wrong: str) -> None:
    file = tmp_path / "stats.safetensors"
    stats.save(file)
    arrays, metadata = content(file)
    save_file(arrays, file, {**metadata, "format": wrong})
    with pytest.raises(UserError, match=r"format is .*, expected") as caught:
        ExpertStats.load(file)
    shown, _, expected = str(caught.value).rpartition("format is ")[2].partition(", expected ")
    assert shown != expected


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
    with pytest.raises(UserError, match=message):
        replace(stats, **wrong)


def test_models_are_identified_by_their_hash() -> None:
    ModelIdentity("a", "1").check(ModelIdentity("b", "1"), "stats")
    with pytest.raises(UserError, match="stats was made for model 'b'"):
        ModelIdentity("a", "1").check(ModelIdentity("b", "2"), "stats")
