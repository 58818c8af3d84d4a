"""Routing traces: written, read, divided among any number of ranks, and refused when incomplete."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rq_ep.__main__ import main
from rq_ep.core.errors import UserError
from rq_ep.core.stats import ExpertStats, ModelIdentity
from rq_ep.sim.traces import RoutingTrace, is_trace
from tests.commands.test_simulate import write_stats


def trace_of(tokens: list[int], num_layers: int = 2, num_experts: int = 16, top_k: int = 2) -> RoutingTrace:
    random = np.random.default_rng(0)
    shape = (sum(tokens), num_layers, top_k)
    ids_NLK = random.integers(num_experts, size=shape).astype(np.int32)
    weights_NLK = random.random(shape).astype(np.float32)
    return RoutingTrace(ids_NLK, weights_NLK, np.array(tokens), num_experts, tuple(range(num_layers)))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_every_step_is_divided_into_equal_runs(tmp_path: Path, num_ranks: int) -> None:
    tokens = [7, 0, 2, 12]
    trace_of(tokens).save(tmp_path / "trace.safetensors")
    trace = RoutingTrace.load(tmp_path / "trace.safetensors")
    counts_SLRE = trace.counts(num_ranks)
    assert counts_SLRE.shape == (4, 2, num_ranks, 16)
    for step, ids_NLK in enumerate(np.split(trace.ids_NLK, np.cumsum(tokens)[:-1])):
        for rank, run_NLK in enumerate(np.array_split(ids_NLK, num_ranks)):
            for layer in range(2):
                expected_E = np.bincount(run_NLK[:, layer].ravel(), minlength=16)
                assert counts_SLRE[step, layer, rank].tolist() == expected_E.tolist()


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_recorded_sequences_stay_whole_and_on_their_rank(tmp_path: Path, num_ranks: int) -> None:
    sequence_N = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 1, 2])
    recorded = replace(trace_of([9, 3]), sequence_N=sequence_N, phase_S=np.array([0, 1]), model=ModelIdentity("m", "1"))
    recorded.save(tmp_path / "trace.safetensors")
    trace = RoutingTrace.load(tmp_path / "trace.safetensors")
    assert (trace.phase_S.tolist(), trace.model) == ([0, 1], recorded.model)
    assert trace.ranks_N(num_ranks).tolist() == (sequence_N % num_ranks).tolist()
    counts_SLRE = trace.counts(num_ranks)
    for rank in range(num_ranks):
        ids_NLK = trace.ids_NLK[9:][np.arange(3) % num_ranks == rank]
        assert counts_SLRE[1, 1, rank].tolist() == np.bincount(ids_NLK[:, 1].ravel(), minlength=16).tolist()


def test_joined_sequences_are_assigned_to_the_ranks_that_recorded_them() -> None:
    ranks = [replace(trace_of([4]), sequence_N=np.array([0, 0, 1, 1])) for _ in range(3)]
    assert RoutingTrace.joined(ranks).ranks_N(3).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert RoutingTrace.joined([*ranks[:2], trace_of([4])]).sequence_N is None


def test_traces_of_ranks_are_joined_step_by_step() -> None:
    whole = trace_of([3, 4])
    cuts = [np.r_[0:1, 3:7], np.r_[1:3]]
    ranks = [
        RoutingTrace(whole.ids_NLK[cut], whole.weights_NLK[cut], np.array(tokens), 16, whole.layers)
        for cut, tokens in zip(cuts, ([1, 4], [2, 0]), strict=True)
    ]
    joined = RoutingTrace.joined(ranks)
    assert np.array_equal(joined.ids_NLK, whole.ids_NLK)
    assert np.array_equal(joined.weights_NLK, whole.weights_NLK)
    assert joined.tokens_S.tolist() == [3, 4]


def test_a_joined_step_is_prefill_where_it_was_on_any_rank() -> None:
    ranks = [replace(trace_of([1, 2, 0]), phase_S=np.array(phases)) for phases in ([1, 0, 1], [0, 1, 1])]
    phase_S = RoutingTrace.joined(ranks).phase_S
    assert phase_S is not None
    assert phase_S.tolist() == [0, 0, 1]
    assert RoutingTrace.joined([ranks[0], trace_of([1, 2, 0])]).phase_S is None


def test_the_head_of_a_trace() -> None:
    trace = replace(trace_of([3, 4, 2]), sequence_N=np.arange(9), phase_S=np.array([0, 1, 1]))
    head = trace.head(2)
    assert np.array_equal(head.ids_NLK, trace.ids_NLK[:7])
    assert (head.tokens_S.tolist(), head.sequence_N.tolist(), head.phase_S.tolist()) == ([3, 4], [*range(7)], [0, 1])


def test_what_is_cut_short_or_foreign_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    trace = trace_of([5, 6])
    trace.save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    with pytest.raises(UserError, match="not a readable trace"):
        RoutingTrace.load(path)
    save_file({"ids_NLK": trace.ids_NLK}, path)
    with pytest.raises(UserError, match=r"expected 'rq_ep\.trace/1'"):
        RoutingTrace.load(path)
    with pytest.raises(UserError, match="no such file"):
        RoutingTrace.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="12 tokens of 2 steps do not have"):
        RoutingTrace(trace.ids_NLK, trace.weights_NLK, np.array([5, 7]), 16, trace.layers)
    with pytest.raises(UserError, match=r"sequence_N is int64 \[12\], which 2 layers and 11 tokens"):
        replace(trace, sequence_N=np.arange(12))
    with pytest.raises(UserError, match=r"phases \[0, 2\]"):
        replace(trace, phase_S=np.array([0, 2]))
    with pytest.raises(UserError, match="a step of 4611686018427387904 tokens"):  # whose sum is 11, in 64 bits
        RoutingTrace(trace.ids_NLK, trace.weights_NLK, np.array([2**62, 2**62, 2**62, 2**62 + 11]), 16, trace.layers)
    with pytest.raises(UserError, match="of 3: record it again"):
        RoutingTrace(trace.ids_NLK, trace.weights_NLK, trace.tokens_S, 3, trace.layers)


def test_a_file_may_hold_its_numbers_in_any_type_and_its_metadata_as_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    trace = trace_of([5, 6])
    arrays = {"ids_NLK": np.int64, "weights_NLK": np.float64, "tokens_S": np.float32}
    metadata = {"format": "rq_ep.trace/1", "num_experts": "16", "layers": "[0, 1]"}
    save_file({name: getattr(trace, name).astype(dtype) for name, dtype in arrays.items()}, path, metadata)
    assert is_trace(path)
    again = RoutingTrace.load(path)
    for name, dtype in {"ids_NLK": np.int32, "weights_NLK": np.float32, "tokens_S": np.int64}.items():
        assert getattr(again, name).dtype == dtype
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name))
    wide = {
        "ids_NLK": trace.ids_NLK.astype(np.int64) + 2**40,
        "weights_NLK": trace.weights_NLK,
        "tokens_S": trace.tokens_S,
    }
    save_file(wide, path, metadata)
    with pytest.raises(UserError, match=r"ids_NLK must be whole numbers that int32 holds, but one is 1099511627"):
        RoutingTrace.load(path)


def test_a_trace_of_another_model_is_refused() -> None:
    stats = ExpertStats.uniform((0, 1), 16, {"bf16": 1}, "bf16")
    trace = replace(trace_of([3]), model=ModelIdentity("a", "1"))
    trace.check(stats)
    trace.check(replace(stats, model=ModelIdentity("elsewhere/a", "1")))
    with pytest.raises(UserError, match="trace trace was made for model 'a'"):
        trace.check(replace(stats, model=ModelIdentity("b", "2")))
    with pytest.raises(UserError, match="record the model that was calibrated"):
        trace.check(replace(stats, layers=(0, 2)))


def test_a_trace_is_distinguished_from_other_files(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    trace_of([3]).save(path)
    assert is_trace(path)
    assert not is_trace(Path(write_stats(tmp_path / "stats.safetensors")))
    assert not is_trace(tmp_path / "nothing")


def test_simulate_replays_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats = write_stats(tmp_path / "stats.safetensors")
    path = tmp_path / "trace.safetensors"
    command = ["simulate", "--stats", stats, "--num-ranks", "4", "--strategies", "standard", "--trace", str(path)]
    trace_of([40, 50, 60]).save(path)
    assert main(command) == 0
    assert "3 steps of 2 layers" in capsys.readouterr().out
    trace_of([40], num_layers=3).save(path)
    assert main(command) == 2
    assert "record the model that was calibrated" in capsys.readouterr().err
