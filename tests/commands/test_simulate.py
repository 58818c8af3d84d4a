"""`rq-ep simulate` from files to rows."""

import json
from pathlib import Path

import numpy as np
import pytest

from rq_ep.__main__ import main
from rq_ep.core.stats import ExpertStats, ModelIdentity

SIZES = {"bf16": 1000, "int8": 504}


def write_stats(file: Path, model: str = "abc", num_experts: int = 16, seed: int = 0, **sizes: int) -> str:
    popularity = 1 / np.arange(1, num_experts + 1)
    counts_SLE = np.random.default_rng(seed).multinomial(2000, popularity / popularity.sum(), size=(12, 2))
    identity, phase_S = ModelIdentity("tiny", model), np.arange(12) % 2
    ExpertStats(counts_SLE, ("bf16", "int8"), "bf16", SIZES, phase=phase_S, top_k=2, model=identity, **sizes).save(file)
    return str(file)


@pytest.fixture
def placements(tmp_path: Path) -> list[str]:
    stats = write_stats(tmp_path / "calibration.safetensors")
    files = []
    for name in ("eplb", "rq"):
        files.append(str(tmp_path / f"{name}.json"))
        options = ["--num-ranks", "4", "--strategy", name, "--no-plot", "--out", files[-1]]
        assert main(["place", "--stats", stats, *options]) == 0
    return files


def test_compares_strategies(tmp_path: Path, placements: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    held_out = write_stats(tmp_path / "held_out.safetensors", seed=1, hidden_size=64, intermediate_size=64)
    out = tmp_path / "rows.json"
    command = [
        "simulate",
        "--stats",
        held_out,
        "--num-ranks",
        "4",
        "--machine",
        "h200",
        "--set",
        "llep.min_tokens_per_gemm=32",
    ]
    assert main([*command, "--json", str(out), "--placement", *placements]) == 0
    printed = capsys.readouterr().out
    assert "modelled" in printed
    assert "on uniform load" in printed
    rows = {row["strategy"]: row for row in json.loads(out.read_text())}
    assert list(rows) == ["standard", "eplb", "llep", "rq"]
    assert [row["placement"] for row in rows.values()] == ["(uniform)", "eplb.json", "(uniform)", "rq.json"]
    balance = {name: row["imbalance_mean"] for name, row in rows.items()}
    assert balance["rq"] < 1.1 < balance["eplb"] < balance["standard"]
    for row in rows.values():
        assert 1 <= row["imbalance_mean"] <= row["imbalance_worst"]
        assert np.mean(list(row["imbalance_mean_by_phase"].values())) == pytest.approx(row["imbalance_mean"])
        assert row["bytes_max"] <= 8000
        assert row["modelled_step_s"] > 0
    assert rows["llep"]["transfers_per_step"] > 0
    assert rows["rq"]["low_precision_share"] > 0


def test_without_placements_everything_is_placed_on_uniform_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = write_stats(tmp_path / "stats.safetensors")
    assert main(["simulate", "--stats", stats, "--num-ranks", "4", "--strategies", "rq,standard"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "(uniform)" in line][:2]
    assert [row[0] for row in rows] == ["rq", "standard"]
    assert rows[0][2:] == rows[1][2:]  # uniform load leaves rq with contiguous blocks


@pytest.mark.parametrize(
    ("model", "num_experts", "ranks", "options", "message"),
    [
        ("other", 16, "4", [], "was made for model"),
        ("abc", 16, "8", [], "is for 4 ranks"),
        ("abc", 8, "4", [], "experts per layer"),
        ("abc", 16, "4", ["--strategies", "llap"], "did you mean 'llep'"),
        ("abc", 16, "4", ["--machine", "h200"], "hidden_size"),
        ("abc", 16, "4", ["--machine", "h300"], "did you mean 'h200'"),
        ("abc", 16, "4", ["--json", "/"], "--json /: is a directory"),
        ("abc", 16, "4", ["--strategies", "rq+1"], "only eplb takes slots beside the budget"),
        ("abc", 16, "4", ["--strategies", "eplb+"], "only eplb takes slots beside the budget"),
        ("abc", 16, "4", ["--strategies", "eplb+0"], "must be at least 1"),
        ("abc", 16, "4", ["--max-steps", "0"], "--max-steps 0: must be at least 1"),
        ("abc", 16, "4", ["--calibration", "none"], "none: no such file"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    placements: list[str],
    capsys: pytest.CaptureFixture[str],
    model: str,
    num_experts: int,
    ranks: str,
    options: list[str],
    message: str,
) -> None:
    stats = write_stats(tmp_path / "held_out.safetensors", model, num_experts)
    capsys.readouterr()
    assert main(["simulate", "--stats", stats, "--num-ranks", ranks, *options, "--placement", *placements]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_two_placements_of_one_strategy(
    tmp_path: Path, placements: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    stats = write_stats(tmp_path / "held_out.safetensors")
    assert main(["simulate", "--stats", stats, "--num-ranks", "4", "--placement", placements[1], placements[1]]) == 2
    assert "a second placement made by 'rq'" in capsys.readouterr().err


def test_a_placement_that_was_given_is_shown_whether_named_or_not(
    tmp_path: Path, placements: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    stats, out = write_stats(tmp_path / "held_out.safetensors"), tmp_path / "rows.json"
    given = ["--placement", placements[0], "--placement", placements[1]]
    command = ["simulate", "--stats", stats, "--num-ranks", "4", "--strategies", "standard", "--json", str(out)]
    assert main([*command, *given]) == 0
    assert [row["strategy"] for row in json.loads(out.read_text())] == ["standard", "eplb", "rq"]


def test_a_placement_that_lies_about_its_bytes_is_refused(
    tmp_path: Path, placements: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(Path(placements[0]).read_text())
    document["bytes"][1] = 5
    Path(placements[0]).write_text(json.dumps(document))
    stats = write_stats(tmp_path / "held_out.safetensors")
    assert main(["simulate", "--stats", stats, "--num-ranks", "4", "--placement", placements[0]]) == 2
    assert "claims 5 expert bytes on rank 1" in capsys.readouterr().err


def test_loads_without_pairs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ExpertStats(np.zeros((3, 1, 4), np.int64), ("bf16",), "bf16", {"bf16": 7}).save(tmp_path / "idle")
    assert main(["simulate", "--stats", str(tmp_path / "idle"), "--num-ranks", "2"]) == 2
    assert "no routed pairs to replay" in capsys.readouterr().err


def test_every_strategy_places_on_calibrated_loads_inside_the_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration = write_stats(tmp_path / "calibration.safetensors")
    held_out, out = write_stats(tmp_path / "held_out.safetensors", seed=1), tmp_path / "rows.json"
    names = "standard,eplb,eplb+1,llep,rq,rq_paper,rq_llep"
    command = ["simulate", "--stats", held_out, "--num-ranks", "4", "--strategies", names, "--max-steps", "5"]
    assert main([*command, "--calibration", calibration, "--json", str(out)]) == 0
    assert "5 steps (3 of prefill, 2 of decode) of 2 layers" in capsys.readouterr().out
    rows = {row["strategy"]: row for row in json.loads(out.read_text())}
    assert list(rows) == names.split(",")
    assert {row["placement"] for row in rows.values()} == {"calibration.safetensors"}
    assert rows["eplb+1"]["bytes_max"] == 10_000
    assert max(row["bytes_max"] for name, row in rows.items() if name != "eplb+1") <= 8000
    assert rows["rq"]["imbalance_mean"] < rows["eplb+1"]["imbalance_mean"] < rows["standard"]["imbalance_mean"]


@pytest.mark.parametrize(
    ("model", "num_experts", "message"), [("abc", 8, "8 experts in 2 layers, but"), ("other", 16, "was made for model")]
)
def test_calibration_of_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, num_experts: int, message: str
) -> None:
    held_out = write_stats(tmp_path / "held_out.safetensors")
    other = write_stats(tmp_path / "other.safetensors", model, num_experts)
    assert main(["simulate", "--stats", held_out, "--num-ranks", "4", "--calibration", other]) == 2
    assert message in capsys.readouterr().err


def test_with_rebalancing_the_placement_follows_the_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    parts = [generator.multinomial(512, np.roll(np.linspace(1, 8, 16), 5 * part) / 72, (160, 2)) for part in range(2)]
    sizes = {"bf16": 1000, "int8": 504}
    for name, counts in (("start", parts[0][:32]), ("load", np.concatenate(parts))):
        ExpertStats(counts.astype(np.int64), tuple(sizes), "bf16", sizes).save(tmp_path / f"{name}.safetensors")
    arguments = ["simulate", "--stats", str(tmp_path / "load.safetensors"), "--num-ranks", "4"]
    arguments += ["--strategies", "standard,eplb,rq", "--json", str(tmp_path / "rows.json")]
    following = ["--rebalance", "auto", "--rebalance-window", "64", "--rebalance-delay", "3"]
    main([*arguments, *following, "--start", str(tmp_path / "start.safetensors")])
    rows = {row["strategy"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["standard"]["rebalances"] == rows["eplb"]["rebalances"] == 0
    rq = rows["rq"]
    assert rq["rebalances"] >= 1
    assert rq["moved_bytes"] > 0
    assert len(rq["series"]) == 320
    assert np.mean(rq["series"][240:]) < np.mean(rq["series"][160:200])
    assert rq["imbalance"]["mean"] == rq["imbalance_mean"]
    assert 0 < rq["low_share"] < 0.3
    assert [one["moves"] for one in rq["decisions"]].count(True) == rq["rebalances"]
    assert "rebalances" in capsys.readouterr().out
    main([*arguments, "--rebalance", "off"])
    assert "rebalances" not in json.loads((tmp_path / "rows.json").read_text())[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start", "FILE"], "--start FILE: needs --rebalance auto"),
        (["--rebalance-window", "32"], "--rebalance-window 32: needs --rebalance auto"),
        (["--rebalance", "auto", "--start", "A", "--calibration", "B"], "say the same: give one"),
        (["--rebalance", "always"], "unknown --rebalance 'always'"),
    ],
)
def test_settings_of_rebalancing_that_would_do_nothing_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--stats", "none.safetensors", "--num-ranks", "4", *arguments]) == 2
    assert message in capsys.readouterr().err
