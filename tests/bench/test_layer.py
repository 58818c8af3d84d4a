"""The layer benchmark: its workloads are what they say, its result holds what the protocol promises."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rq_ep.core.errors import UserError
from rq_ep.strategies import STRATEGIES


def load_bench() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "bench" / "layer.py"
    spec = importlib.util.spec_from_file_location("bench_layer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


bench = load_bench()
SHAPE = bench.Shape(32, 16, 8, 2)


def test_published_scenario_puts_the_share_on_the_hot_experts() -> None:
    ids_TK = bench.Scenario.parse("80:2", SHAPE).ids(np.random.default_rng(0), 1000, SHAPE)
    assert ids_TK.shape == (1000, 2)
    assert np.mean(ids_TK < 2) == pytest.approx(0.8)
    assert set(ids_TK.ravel().tolist()) == set(range(8))
    assert np.mean(ids_TK[:, 0] == ids_TK[:, 1]) > 0.2, "repeats within a token are part of this kind"


@pytest.mark.parametrize(("text", "share"), [("distinct:80:4", 0.8), ("distinct:25:1", 0.25), ("balanced", 0.5)])
def test_distinct_scenarios_never_repeat_an_expert(text: str, share: float) -> None:
    scenario = bench.Scenario.parse(text, SHAPE)
    ids_TK = scenario.ids(np.random.default_rng(1), 4000, SHAPE)
    assert (ids_TK[:, 0] != ids_TK[:, 1]).all()
    assert np.mean(ids_TK < (scenario.num_hot or 4)) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("text", ["80", "80:8", "101:2", "near:80:2", "80:2:1", "distinct:80:1", "distinct:0:7"])
def test_impossible_scenarios_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--scenario {text}: "):
        bench.Scenario.parse(text, SHAPE)


def test_calibration_never_sees_what_is_measured() -> None:
    options = bench.parse(["--tokens-per-rank", "16"])
    made = bench.bench_of(options)
    assert not np.array_equal(made.ids("calibrate", 0, 0), made.ids("measure", 0, 0))
    assert np.array_equal(made.ids("measure", 0, 0), made.ids("measure", 0, 0))
    assert made.stats(2).counts.sum() == 16 * 2 * 16 * 2


def test_result_of_local_ranks(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    options = ["--local-ranks", "2", "--hidden-size", "32", "--intermediate-size", "16", "--tokens-per-rank", "64"]
    options += ["--steps", "3", "--dtype", "float32", "--device", "cpu", "--local-rank", "0", "--json", str(out)]
    options += ["--strategies", ",".join(STRATEGIES), "--set", "llep.min_tokens_per_gemm=1"]
    result = bench.main(options)
    assert json.loads(out.read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    assert {"commit", "versions", "hardware", "seed", "command"} <= result.keys()
    assert result["num_ranks"] == 2
    rows = {row["strategy"]: row for row in result["rows"]}
    assert set(rows) == set(STRATEGIES)
    for row in rows.values():
        assert row["output_error"] < 1e-5
        assert max(row["resident_bytes_by_rank"]) <= max(rows["standard"]["resident_bytes_by_rank"])
        assert sum(row["pairs_by_rank"]) == 2 * 64 * 2
        assert 0 < row["compute_s"]["p50"] <= row["compute_s"]["p99"]
        assert row["wall_s"] is None, "ranks that take turns have no wall clock"
    assert rows["standard"]["imbalance_mean"] == pytest.approx(1.6, abs=0.01)
    assert rows["rq"]["imbalance_mean"] < 1.3
    assert rows["llep"]["transfer_bytes_per_step"] > 0
    assert rows["llep"]["settings"]["min_tokens_per_gemm"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategies", "standart"], "did you mean 'standard'"),
        (["--set", "llep.m=1"], "setting of strategy 'llep' 'm'"),
        (["--set", "m=1"], "expected NAME.SETTING=VALUE"),
        (["--set", "llep.fallback_ratio=["], "is not a value"),
        (["--strategies", ""], "--strategies: name at least one"),
        (["--scenario", "95:0"], "experts in 1..7"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--local-ranks", "0"], "--local-ranks 0: must be at least 1"),
        (["--pin"], "--pin: ranks in one process share"),
        (["--json", "/"], "/: is a directory"),
        (["--formats", "int8"], "the first must be bf16"),
        (["--tokens-per-rank", "0"], "--tokens-per-rank 0: must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.main(["--local-ranks", "1", *options])
