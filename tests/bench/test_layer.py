"""The layer benchmark: what it counts is right, its result holds what the protocol promises."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.layer import layer, tables
from bench.layer.case import Case
from bench.layer.peers.comm_log import NUM_CALLS
from bench.layer.plan_figures import Planned, rows_sent
from rq_ep.__main__ import main
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.replicas import Replica
from rq_ep.core.topology import Topology
from rq_ep.parallel import RankFailure
from rq_ep.parallel.reference import assign
from tests.bench.test_workloads import write_routes
from tests.parallel.processes import exit_codes

pytestmark = pytest.mark.slow

STRATEGIES = ("standard", "eplb", "llep", "rq")
SMALL = ["--hidden-size", "32", "--intermediate-size", "16", "--dtype", "float32", "--device", "cpu"]


def case_of(*options: str) -> Case:
    return layer.cases_of(layer.parse_options([*SMALL, *options]))[0]


def test_calibration_never_sees_what_is_measured() -> None:
    case = case_of("--tokens-per-rank", "16")
    assert not np.array_equal(case.calibration.ids(0, "calibrate", 0, 0, 2), case.ids(0, 0, 2))
    assert np.array_equal(case.ids(0, 0, 2), case.ids(0, 0, 2))
    assert case.stats(2).counts.sum() == 16 * 2 * 16 * 2


def test_calibration_can_see_another_workload() -> None:
    loads_E = case_of("--scenario", "95:1", "--calibrate-on", "idle:4").stats(2).counts.sum(axis=(0, 1))
    assert loads_E[4:].sum() == 0
    assert loads_E[0] < 0.3 * loads_E.sum()


def test_rows_are_counted_once_for_each_rank_they_go_to() -> None:
    case = case_of("--scenario", "80:2", "--tokens-per-rank", "40", "--set", "llep.min_tokens_per_gemm=1")
    topology = Topology(3)
    placement = case.place("llep", case.stats(3), topology)
    plan = case.planner("llep", placement, topology)(case.counts(case.all_ids(3)[0]))
    assert plan.transfers
    for rank in range(3):
        ids_TK = case.ids(0, rank, 3)
        pairs = assign(ids_TK.tolist(), plan, rank)
        wanted = {(int(plan.replicas.ranks_P[pair.replica]), pair.token) for pair in pairs}
        rows_R = [sum(destination == other for destination, _ in wanted) for other in range(3)]
        assert rows_sent(ids_TK, plan, rank).tolist() == rows_R


def test_rows_cross_nodes_only_where_there_are_several() -> None:
    case = case_of("--tokens-per-rank", "64")
    shares = []
    for topology in (Topology(4), Topology(4, 2)):
        placement = case.place("standard", case.stats(4), topology)
        facts = Planned.of(case, "standard", placement, topology, case.all_ids(4)).facts()
        assert facts["rows_staying_share"] == pytest.approx(0.25, abs=0.05)
        shares.append(facts["rows_between_nodes_share"])
    assert shares == [0, pytest.approx(0.5, abs=0.05)]


def test_result_of_local_ranks(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    options = ["--local-ranks", "2", *SMALL, "--tokens-per-rank", "64", "--steps", "3", "--local-rank", "0"]
    options += ["--strategies", "standard,eplb,llep,rq,eplb+2", "--set", "llep.min_tokens_per_gemm=1"]
    result = layer.main([*options, "--machine", "h200", "--json", str(out)])
    assert json.loads(out.read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    assert {"commit", "versions", "hardware", "seed", "command"} <= result.keys()
    assert result["num_ranks"] == 2
    rows = {row["strategy"]: row for row in result["rows"]}
    assert tuple(rows) == (*STRATEGIES, "eplb+2")
    standard_bytes = max(rows["standard"]["resident_bytes_by_rank"])
    for name, row in rows.items():
        assert row["output_error"] < 1e-5
        assert (max(row["resident_bytes_by_rank"]) <= standard_bytes) == (name != "eplb+2")
        assert sum(row["pairs_by_rank"]) == 2 * 64 * 2
        assert 0 < row["compute_s"]["p50"] <= row["compute_s"]["p99"]
        assert len(row["compute_s_by_rank"]["p99"]) == 2
        assert row["total_s"]["p50"] > max(row["plan_s"]["p50"], row["compute_s"]["p50"])
        assert row["modelled_exchange_s"] > 0
        assert row["received_bytes_peak"] == row["received_rows_peak"] * 32 * 4
        assert 0 < row["held_rows_peak"] <= row["received_rows_peak"]
        assert row["of_ideal"] == pytest.approx(rows["standard"]["steady_s"] / row["steady_s"] / 1.6, rel=0.01)
        assert row["wall_s"] is None, "ranks that take turns have no wall clock"
        assert row["repeats_experts"]
    assert rows["standard"]["imbalance_mean"] == pytest.approx(1.6, abs=0.01)
    assert rows["rq"]["imbalance_mean"] < 1.3
    assert rows["llep"]["transfer_bytes_per_step"] > 0 < rows["llep"]["modelled_transfer_s"]
    assert rows["rq"]["modelled_transfer_s"] == 0
    assert rows["llep"]["settings"]["min_tokens_per_gemm"] == 1
    assert rows["llep"]["received_rows_peak"] < rows["standard"]["received_rows_peak"]


def test_all_published_scenarios_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "figure.png"
    options = ["--local-ranks", "2", *SMALL, "--tokens-per-rank", "8", "--steps", "1", "--shape", "gpt-oss-120b"]
    options += ["--strategies", "standard,llep", "--scenarios", "llep", "--machine", "h200", "--png", str(png)]
    result = layer.main(options)
    assert len(result["rows"]) == 2 * 13
    assert png.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "speed-up over standard, gpt-oss-120b" in printed
    assert {"llep: all modelled, full size", "llep: of ideal", "llep: rows held, to balanced"} <= {
        line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│")
    }
    published = next(line for line in printed.splitlines() if "published (8 H200)" in line)
    assert [cell.strip() for cell in published.split("│")[2:5]] == ["1.07", "1.73", "2.85"]


def test_a_profile_predicts_what_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "profile.json")
    sizes = ["--hidden-size", "32", "--intermediate-size", "16"]
    assert (
        main(["profile", "--out", path, "--device", "cpu", "--formats", "fp32", "--repeat-seconds", "0", *sizes]) == 0
    )
    options = ["--local-ranks", "2", *SMALL, "--steps", "1", "--strategies", "standard,rq", "--machine", path]
    rows = layer.main([*options, "--tokens-per-rank", "64"])["rows"]
    assert all(row["predicted_compute_s"] > 0 and row["modelled_full_size"] is None for row in rows)
    assert "predicted*" in capsys.readouterr().out
    with pytest.raises(UserError, match="hidden size 32 and intermediate size 16, not 32 and 24"):
        layer.main([*options, "--intermediate-size", "24"])
    with pytest.raises(UserError, match="timed in float32; add --dtype float32"):
        layer.main([*options, "--dtype", "bfloat16"])


def test_large_experts_shrink_on_a_cpu_unless_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    case = layer.cases_of(layer.parse_options(["--shape", "gpt-oss-120b", "--device", "cpu", "--scenarios", "llep"]))[0]
    assert (case.shape.hidden_size, case.full_shape.hidden_size, case.workload.tokens_per_rank) == (128, 2880, 4096)
    assert "--hidden-size 2880 --intermediate-size 2880 runs them in full" in caplog.text
    assert case_of("--shape", "gpt-oss-120b").shape.hidden_size == 32
    tiny = layer.cases_of(layer.parse_options(["--device", "cpu"]))[0]
    assert tiny.shape == tiny.full_shape


def test_speed_ups_are_over_the_first_row_of_the_same_scenario() -> None:
    first = {"total_s_ratio": 1.0, "modelled_full_size": {"layer_s": 3.0}}
    row = {"total_s_ratio": 0.25, "modelled_full_size": {"layer_s": 2.0}}
    assert tables.speed_up(row, "total_s", first) == 4
    assert tables.speed_up(row, "full_size", first) == 1.5
    assert tables.speed_up({"total_s_ratio": None}, "full_size", first) is None


@pytest.mark.dist
@pytest.mark.slow
def test_peers_run_beside_ours(tmp_path: Path) -> None:
    """On two ranks that count as two nodes."""
    out = tmp_path / "result.json"
    command = ["bench", "layer", *SMALL, "--tokens-per-rank", "24", "--steps", "2", "--scenario", "distinct:80:4"]
    command += ["--ranks-per-node", "1", "--peers", "transformers,deepspeed,autoep", "--comm-log"]
    command += ["--strategies", "standard,rq", "--json", str(out)]
    codes, printed = exit_codes(2, command, tmp_path, timeout_s=150)
    assert codes == [0, 0], printed
    result = json.loads(out.read_text())
    rows = {row["strategy"]: row for row in result["rows"]}
    assert result["ranks_per_node"] == 1
    assert list(rows) == ["standard", "rq", "transformers", "deepspeed", "autoep"]
    assert rows["deepspeed"]["label"] == "DeepSpeed MoE (capacity-padded EP)"
    for name in ("deepspeed", "autoep"):
        messages = rows[name]["communication"]["all_to_all_single"].values()
        assert sum(message["count"] for message in messages) >= 2 * NUM_CALLS  # rows there and back
    assert rows["rq"]["communication"] is None
    for name in ("transformers", "deepspeed", "autoep"):
        assert rows[name]["resident_bytes_by_rank"] == [4 * (32 * 32 + 16 * 32) * 4] * 2
    for row in rows.values():
        assert row["output_error"] < 1e-5
        assert row["wall_s"]["p50"] > 0
    assert rows["standard"]["rows_between_nodes_share"] > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategies", "standart"], "did you mean 'standard'"),
        (["--strategies", "eplb+x"], "--strategies eplb[+]x: write NAME[+]N"),
        (["--set", "llep.m=1"], "setting of strategy 'llep' 'm'"),
        (["--set", "m=1"], "expected NAME.SETTING=VALUE"),
        (["--set", "llep.fallback_ratio=["], "is not a value"),
        (["--strategies", ""], "--strategies: name at least one"),
        (["--scenario", "95:0"], "experts in 1..7"),
        (["--scenarios", ","], "--scenarios: name at least one"),
        (["--calibrate-on", "120:4"], "--scenarios 120:4: percent in 1..100"),
        (["--top-k", "9"], "--top-k 9: there are 8 experts"),
        (["--num-experts", "0"], "--num-experts 0: must be at least 1"),
        (["--shape", "olmo"], "did you mean 'olmoe'"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--local-ranks", "0"], "--local-ranks 0: must be at least 1"),
        (["--pin"], "--pin: ranks in one process share"),
        (["--json", "/"], "/: is a directory"),
        (["--png", "/"], "/: is a directory"),
        (["--formats", "int8"], "the first must be bf16"),
        (["--tokens-per-rank", "0"], "--tokens-per-rank 0: must be at least 1"),
        (["--tokens-per-rank", "65537"], "--tokens-per-rank 65537: must be at most 65536"),
        (["--machine", "h201"], "did you mean 'h200'"),
        (["--peers", "deepsped"], "did you mean 'deepspeed'"),
        (["--peers", "deepspeed", "--scenario", "balanced"], "deepspeed: needs processes"),
        (["--peers", "transformers"], "transformers: needs processes"),
        (["--peers", "autoep"], "autoep: needs processes"),
        (["--peers", "transformers", "--comm-log"], "--comm-log: sees only what DeepSpeed sends"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        layer.main(["--local-ranks", "1", *options])


def test_peer_needs_distinct_experts() -> None:
    """DeepSpeed's gate cannot name an expert twice in a token."""
    from bench.layer.peers.deepspeed_moe import deepspeed_moe

    class Processes:
        backend, size, device = "gloo", 2, torch.device("cpu")

    with pytest.raises(UserError, match="use a scenario that does"):
        deepspeed_moe(case_of("--scenario", "80:4"), Processes())  # type: ignore[arg-type]


def write_placement(path: Path, strategy: str, replicas: list[Replica], num_ranks: int = 2, index: int = 3) -> str:
    layer = LayerPlacement.even(index, 8, replicas)
    Placement((layer,), strategy, Topology(num_ranks), (1,) * num_ranks).save(path)
    return str(path)


def test_placements_from_files_are_run_on_the_recorded_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, png = tmp_path / "trace.safetensors", tmp_path / "ranks.png"
    text, _ = write_routes(trace)
    blocks = [Replica(expert // 4, expert, "bf16") for expert in range(8)]
    replicated = write_placement(tmp_path / "a.json", "rq", [*blocks, Replica(0, 7, "bf16")])
    low = write_placement(tmp_path / "b.json", "rq", [Replica(expert // 4, expert, "int8") for expert in range(8)])
    options = ["--local-ranks", "2", *SMALL, "--scenarios", f"{text}:3+prefill", "--strategies", "standard,rq"]
    options += ["--placement", replicated, "--placement", f"rq, int8={low}", "--steps", "2", "--batches", "1"]
    rows = {row["label"]: row for row in layer.main([*options, "--brief", "--ranks-png", str(png)])["rows"]}
    assert list(rows) == ["standard", "rq", "rq, int8"]
    standard_bytes = rows["standard"]["resident_bytes_by_rank"]
    expert_bytes = standard_bytes[0] // 4
    assert rows["rq"]["resident_bytes_by_rank"] == [5 * expert_bytes, 4 * expert_bytes]
    assert max(rows["rq, int8"]["resident_bytes_by_rank"]) < standard_bytes[0] / 2
    assert rows["rq"]["output_error"] < 1e-5 < rows["rq, int8"]["output_error"]
    assert rows["rq, int8"]["pairs_by_rank"] == rows["standard"]["pairs_by_rank"]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "layer 3, prefill" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_ranks": 3}, "made for 3 ranks, not for 2"),
        ({"index": 1}, "has layers 1, not 3"),
        ({"strategy": "eplb"}, "strategy of --placement .*eplb"),
    ],
)
def test_placements_of_another_run_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    text, _ = write_routes(tmp_path / "trace.safetensors")
    blocks = [Replica(expert // 4, expert, "bf16") for expert in range(8)]
    path = write_placement(tmp_path / "a.json", **({"strategy": "rq", "replicas": blocks} | change))
    options = ["--local-ranks", "2", *SMALL, "--scenarios", f"{text}:3", "--strategies", "standard,rq", "--steps", "1"]
    with pytest.raises((UserError, RankFailure), match=message):
        layer.main([*options, "--placement", path])


def test_two_placements_of_a_strategy_need_labels(tmp_path: Path) -> None:
    path = write_placement(tmp_path / "a.json", "rq", [Replica(expert // 4, expert, "bf16") for expert in range(8)])
    with pytest.raises(UserError, match="rq is there already; write another LABEL=FILE"):
        layer.main(["--local-ranks", "2", *SMALL, "--strategies", "rq", "--placement", path, "--placement", path])
