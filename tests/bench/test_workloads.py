"""The workloads are what they say, and follow from name, seed and step alone."""

from pathlib import Path

import numpy as np
import pytest

from bench.layer.published import PUBLISHED, SHAPES, Shape, published, shape_name
from bench.layer.recorded import RecordedRoutes
from bench.layer.workloads import PAPER_SCENARIOS, Workload, parse
from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.stats import ExpertStats
from rq_ep.sim.traces import RoutingTrace

SHAPE = Shape(32, 16, 8, 2)


def ids_of(text: str, tokens: int = 4000, *, shape: Shape = SHAPE, step: int = 0) -> IntArray:
    return parse(text, shape, tokens).ids(0, "measure", step, 0, 4)


def has_repeats(ids_TK: IntArray) -> bool:
    return bool((np.diff(np.sort(ids_TK, axis=1), axis=1) == 0).any())


def test_published_scenario_puts_the_share_on_the_hot_experts() -> None:
    ids_TK = ids_of("80:2", 1000)
    assert ids_TK.shape == (1000, 2)
    assert np.mean(ids_TK < 2) == pytest.approx(0.8)
    assert set(ids_TK.ravel().tolist()) == set(range(8))
    assert np.mean(ids_TK[:, 0] == ids_TK[:, 1]) > 0.2, "repeats within a token are part of this kind"
    assert parse("80:2", SHAPE, 1).repeats_experts


@pytest.mark.parametrize(("text", "share"), [("distinct:80:4", 0.8), ("distinct:25:1", 0.25), ("balanced", 0.5)])
def test_distinct_scenarios_never_repeat_an_expert(text: str, share: float) -> None:
    num_hot = int(text.rpartition(":")[2]) if ":" in text else 4
    ids_TK = ids_of(text)
    assert not has_repeats(ids_TK)
    assert np.mean(ids_TK < num_hot) == pytest.approx(share, abs=0.02)


def test_popularity_falls_as_zipf_says() -> None:
    ids_TK = ids_of("zipf:1.5", 20000, shape=Shape(32, 16, 8, 1))
    shares_E = np.bincount(ids_TK.ravel(), minlength=8) / ids_TK.size
    expected_E = np.arange(1, 9) ** -1.5
    np.testing.assert_allclose(shares_E, expected_E / expected_E.sum(), atol=0.015)
    assert not has_repeats(ids_of("zipf:3"))


def test_idle_experts_are_never_drawn() -> None:
    assert set(ids_of("idle:6").ravel().tolist()) == {0, 1}


def test_spread_hot_experts_lie_on_different_ranks() -> None:
    counts_E = np.bincount(ids_of("95:4+spread").ravel(), minlength=8)
    assert set(np.argsort(counts_E)[-4:].tolist()) == {0, 2, 4, 6}
    assert counts_E.min() > 0


def test_moving_hotspot_is_elsewhere_in_another_step_but_the_same_on_every_rank() -> None:
    workload = parse("95:1+moving", SHAPE, 500)

    def hottest(step: int, rank: int) -> int:
        return int(np.bincount(workload.ids(0, "measure", step, rank, 4).ravel()).argmax())

    assert len({hottest(step, 0) for step in range(12)}) > 3
    assert all(len({hottest(step, rank) for rank in range(4)}) == 1 for step in range(12))


def test_ragged_ranks_share_the_same_sum() -> None:
    workload = parse("80:2+ragged", SHAPE, 300)
    sizes = [sorted(len(workload.ids(0, "measure", step, rank, 4)) for rank in range(4)) for step in range(4)]
    assert sizes == [[0, 200, 400, 600]] * 4
    first = [next(rank for rank in range(4) if not len(workload.ids(0, "measure", step, rank, 4))) for step in range(9)]
    assert len(set(first)) > 1, "another rank is empty in another step"
    assert len(workload.ids(0, "measure", 0, 0, 1)) == 300


@pytest.mark.parametrize("text", ["80:2", "distinct:50:2", "zipf:1", "80:2+moving+ragged"])
def test_ids_follow_from_name_seed_and_step(text: str) -> None:
    workload = parse(text, SHAPE, 50)

    def ids(seed: int = 0, stage: str = "measure", step: int = 0, rank: int = 1) -> list[list[int]]:
        return workload.ids(seed, stage, step, rank, 4).tolist()  # type: ignore[no-any-return]

    assert ids() == ids()
    others = [ids(seed=1), ids(stage="calibrate"), ids(step=1), ids(rank=2)]
    assert all(other != ids() for other in others)


def test_one_token_of_the_largest_shape() -> None:
    for text in PAPER_SCENARIOS:
        assert ids_of(text, 1, shape=SHAPES["kimi-k2"]).shape == (1, 8)


@pytest.mark.parametrize(
    "text",
    [
        "80", "80:8", "101:2", "120:4", "95:0", "0:4", "near:80:2", "80:2:1", "distinct:80:1", "distinct:1:7", "zipf:x",
        "zipf:-1", "zipf:nan", "idle:7", "idle:0", "80:2+fast", "zipf:1+spread", "", "balanced:2",
    ],
)  # fmt: skip
def test_impossible_scenarios_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--scenarios ") as caught:
        parse(text, SHAPE, 16)
    assert text in str(caught.value)


def write_stats(path: Path, counts_SE: list[list[int]], top_k: int | None = 2) -> str:
    counts = np.array(counts_SE, np.int64)[:, None]
    ExpertStats(counts, ("bf16",), "bf16", {"bf16": 100}, layers=(3,), top_k=top_k).save(path)
    return f"trace:{path}"


def test_trace_deals_the_recorded_counts_to_ranks(tmp_path: Path) -> None:
    steps = [[5, 5, 0, 0, 0, 0, 0, 0], [0] * 8, [0, 3, 1, 2, 0, 0, 4, 0], [1] * 8]
    workload = parse(write_stats(tmp_path / "stats.safetensors", steps), SHAPE, 16)

    def counts(stage: str, step: int) -> list[int]:
        parts = [workload.ids(0, stage, step, rank, 3) for rank in range(3)]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        ids_TK = np.concatenate(parts)
        assert not has_repeats(ids_TK)
        return np.bincount(ids_TK.ravel(), minlength=8).tolist()  # type: ignore[no-any-return]

    assert counts("calibrate", 0) == counts("calibrate", 1) == steps[0]
    assert [counts("measure", 0), counts("measure", 1), counts("measure", 2)] == [steps[2], steps[3], steps[2]]


def write_routes(path: Path, top_k: int = 2, num_experts: int = 8) -> tuple[str, RoutingTrace]:
    """Two prefill steps of 4 sequences of 3 tokens, and after each a decode step."""
    random = np.random.default_rng(0)
    ids_NLK = random.random((32, 2, num_experts)).argsort(axis=2)[..., :top_k].astype(np.int32)
    weights_NLK = random.random(ids_NLK.shape).astype(np.float32)
    sequence_N = np.concatenate([np.repeat(np.arange(4), 3), np.arange(4)] * 2)
    tokens_S, phase_S = np.array([12, 4, 12, 4]), np.array([0, 1, 0, 1])
    trace = RoutingTrace(ids_NLK, weights_NLK, tokens_S, num_experts, (1, 3), sequence_N=sequence_N, phase_S=phase_S)
    trace.save(path)
    return f"trace:{path}", trace


@pytest.mark.parametrize(
    ("suffix", "tokens", "at"),
    [("", slice(16, 28), 0), (":3", slice(16, 28), 1), (":3+prefill", slice(16, 28), 1), ("+decode", slice(28, 32), 0)],
)
def test_a_routing_trace_is_replayed_token_by_token(tmp_path: Path, suffix: str, tokens: slice, at: int) -> None:
    text, trace = write_routes(tmp_path / "trace.safetensors")
    workload = parse(text + suffix, SHAPE, 16)
    assert isinstance(workload, RecordedRoutes)
    for rank in range(3):
        mine_N = np.flatnonzero(trace.sequence_N[tokens] % 3 == rank)
        ids_TK, weights_TK = workload.ids(5, "measure", 0, rank, 3), workload.weights("measure", 0, rank, 3)
        assert np.array_equal(ids_TK, trace.ids_NLK[tokens][mine_N, at])
        assert np.array_equal(weights_TK, trace.weights_NLK[tokens][mine_N, at])
    assert len(workload.ids(0, "calibrate", 0, 0, 1)) == tokens.stop - tokens.start
    assert not np.array_equal(workload.ids(0, "calibrate", 0, 0, 1), workload.ids(0, "measure", 0, 0, 1))


def test_foreign_routing_traces_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    for changes, suffix, message in (
        ({"top_k": 3}, "", "it has 8 experts, 3 a token, the shape 8 and 2"),
        ({"num_experts": 9}, "", "it has 9 experts"),
        ({}, ":2", "holds layers 1, 3"),
    ):
        with pytest.raises(UserError, match=message):
            parse(write_routes(path, **changes)[0] + suffix, SHAPE, 16)
    text, _ = write_routes(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=str(path)):
        parse(text, SHAPE, 16)
    with pytest.raises(UserError, match="phases were not recorded"):
        parse(write_stats(path, [[1] * 8] * 2) + "+decode", SHAPE, 16)


@pytest.mark.parametrize(
    ("counts_SE", "top_k", "suffix", "message"),
    [
        ([[1] * 4] * 2, 2, "", "it has 4 experts, 2 a token, the shape 8 and 2"),
        ([[1] * 8] * 2, 4, "", "it has 8 experts, 4 a token"),
        ([[1] * 8] * 2, 2, ":4", "holds layers 3"),
        ([[1] * 8] * 2, 2, ":x", "holds layers 3"),
        ([[1] * 8, [0] * 8], 2, "", "1 steps with routed pairs"),
        ([[1] * 8, [1] * 7 + [2]], 2, ":3", "counts of step 1 are not 2 distinct experts"),
        ([[1] * 8, [7] + [0] * 6 + [1]], None, "", "counts of step 1 are not 2 distinct experts"),
    ],
)
def test_foreign_traces_are_refused(
    tmp_path: Path, counts_SE: list[list[int]], top_k: int | None, suffix: str, message: str
) -> None:
    text = write_stats(tmp_path / "stats.safetensors", counts_SE, top_k) + suffix
    with pytest.raises(UserError, match=message):
        parse(text, SHAPE, 16)


def test_damaged_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    text = write_stats(path, [[1] * 8] * 2)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="not a readable statistics file"):
        parse(text, SHAPE, 16)


def test_shapes_and_published_figures() -> None:
    assert shape_name("qwen3_moe") == "qwen3-moe"
    assert {"tiny", "olmoe", "mixtral", "gpt-oss-120b", "deepseek-v3", "kimi-k2", "qwen3-moe"} == SHAPES.keys()
    assert published("gpt-oss-120b", "95:1")["speed_up"] == 6.11
    assert published("kimi-k2", "balanced")["peak_gb_llep"] == 42.8
    assert published("tiny", "95:1") == published("kimi-k2", "95:1+spread") == {}
    for figures in PUBLISHED["shapes"].values():
        assert all(len(values) == len(PAPER_SCENARIOS) for values in figures.values() if isinstance(values, list))
    assert isinstance(parse("80:2", SHAPE, 1), Workload)
    with pytest.raises(UserError, match="did you mean 'mixtral'"):
        shape_name("mixtrl")
