"""`rq-ep convert` from one end to the other: recorded by an engine, placed by us, served by an engine, judged by us."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from rq_ep.__main__ import main
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.core.stats import ExpertStats, ModelIdentity
from rq_ep.core.topology import Topology
from rq_ep.solver.search.slots.equal_slots import place_slots
from rq_ep.strategies.eplb import Eplb

SIZES = "--expert-bytes=bf16=1000,int8=504"


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A dump of SGLang's recorder: layer 0 is dense, the ring is half full."""
    counts = np.random.default_rng(0).integers(1, 90, size=(12, 3, 8)).astype(np.int32)
    counts[:, 0] = counts[8:] = 0
    path = tmp_path / "expert_distribution_recorder_1.pt"
    torch.save({"rank": 0, "logical_count": torch.from_numpy(counts)}, path)
    return path


@pytest.fixture
def stats(tmp_path: Path, record: Path) -> Path:
    path = tmp_path / "stats.safetensors"
    assert main(["convert", str(record), "--from", "sglang", "--to", "stats", SIZES, "--top-k=2", f"--out={path}"]) == 0
    return path


@pytest.fixture
def placement(tmp_path: Path, stats: Path) -> Path:
    """What engines of equal slots can serve."""
    problem = PlacementProblem(ExpertStats.load(stats), Topology(4), num_redundant_experts=4)
    path = tmp_path / "placement.json"
    place_slots(problem, Eplb(), Eplb().place(problem).layers, max_moves=200).save(path)
    return path


def test_what_was_recorded_can_be_placed(capsys: pytest.CaptureFixture[str], tmp_path: Path, stats: Path) -> None:
    assert "8 steps of 8 experts in layers 1-2" in capsys.readouterr().out
    assert ExpertStats.load(stats).layers == (1, 2)
    out = tmp_path / "placed.json"
    assert main(["place", "--stats", str(stats), "--num-ranks=4", "--no-plot", f"--out={out}"]) == 0
    assert Placement.load(out).topology.num_ranks == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "file"),
    [("sglang", "init.json"), ("trtllm", "moe.yaml"), ("ascend", "map.json"), ("eplb", "three.npz")],
)
def test_there_and_back_and_judged(
    tmp_path: Path, stats: Path, placement: Path, engine: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there, back = tmp_path / file, tmp_path / "back.json"
    assert main(["convert", str(placement), "--from", "placement", "--to", engine, f"--out={there}"]) == 0
    assert f"layers 1-2 for {engine}, 12 slots on 4 ranks" in capsys.readouterr().out
    returning = ["convert", str(there), "--from", engine, "--to", "placement", "--num-ranks=4"]
    assert main([*returning, f"--stats={stats}", f"--out={back}"]) == 0
    before, after = Placement.load(placement), Placement.load(back)
    for one, other in zip(before.layers, after.layers, strict=True):
        assert list(one.replicas) == list(other.replicas)
        np.testing.assert_allclose(one.shares_P, other.shares_P)
    assert after.bytes_R == before.bytes_R
    simulate = ["simulate", f"--stats={stats}", f"--placement={back}", "--strategies=eplb", "--num-ranks=4"]
    assert main([*simulate, f"--json={tmp_path / 'rows.json'}"]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["placement"] == "back.json"
    assert row["imbalance_mean"] == pytest.approx(before.certificate["predicted"], rel=0.02)


def test_placed_for_an_engine_it_is_served(tmp_path: Path, stats: Path) -> None:
    placed, out = tmp_path / "placed.json", tmp_path / "moe.yaml"
    options = ["--num-ranks=4", "--for=trtllm", "--num-redundant-experts=4", "--budget=1MB", "--no-plot"]
    assert main(["place", f"--stats={stats}", *options, f"--out={placed}"]) == 0
    assert main(["convert", str(placed), "--to=trtllm", f"--out={out}"]) == 0
    assert yaml.safe_load(out.read_text())["num_slots"] == 12


def test_one_engine_to_another(tmp_path: Path, placement: Path) -> None:
    """SGLang's rows are numbered, vLLM-Ascend's are not."""
    first, second, third = tmp_path / "init.pt", tmp_path / "map.json", tmp_path / "moe.yaml"
    assert main(["convert", str(placement), "--to", "sglang", f"--out={first}"]) == 0
    hop = ["convert", str(first), "--from=sglang", "--to=ascend", "--num-ranks=4", "--layers=1-2", f"--out={second}"]
    assert main(hop) == 0
    assert main(["convert", str(second), "--from=ascend", "--to=trtllm", "--layers=1-2", f"--out={third}"]) == 0
    rows = torch.load(first, weights_only=True)["physical_to_logical_map"]
    assert yaml.safe_load(third.read_text())["initial_global_assignments"] == {1: rows[1].tolist(), 2: rows[2].tolist()}


def test_duplicates_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "init.json", tmp_path / "placement.json"
    path.write_text(json.dumps({"physical_to_logical_map": [[0, 0, 1, 0]]}))
    assert main(["convert", str(path), "--from=sglang", "--to=placement", "--num-ranks=2", SIZES, f"--out={out}"]) == 0
    assert "slots that hold an expert their rank has already, and do nothing: 1" in capsys.readouterr().out
    assert Placement.load(out).layers[0].shares_P.tolist() == pytest.approx([2 / 3, 1 / 3, 1])


def test_a_file_gives_what_flags_leave_out(tmp_path: Path) -> None:
    counts, config, out = tmp_path / "counts.npy", tmp_path / "convert.yaml", tmp_path / "stats.safetensors"
    np.save(counts, np.ones((2, 2, 4), np.int64))
    config.write_text("to: stats\nexpert_bytes: {bf16: 10, int8: 6}\nlayers: [3, 5]\ntop_k: 2\n")
    assert main(["convert", str(counts), "--config", str(config), f"--out={out}", "--top-k=1"]) == 0
    stats = ExpertStats.load(out)
    assert (stats.expert_bytes, stats.layers, stats.top_k) == ({"bf16": 10, "int8": 6}, (3, 5), 1)


def test_the_model_of_the_statistics_is_kept(tmp_path: Path) -> None:
    model = ModelIdentity("tiny", "abc")
    ExpertStats(np.ones((1, 1, 4), np.int64), ("bf16",), "bf16", {"bf16": 10}, model=model).save(
        tmp_path / "s.safetensors"
    )
    path, out = tmp_path / "moe.yaml", tmp_path / "placement.json"
    path.write_text("num_slots: 4\ninitial_global_assignments: {0: [3, 2, 1, 0]}\n")
    arguments = ["--to=placement", "--num-ranks=2", f"--stats={tmp_path / 's.safetensors'}", f"--out={out}"]
    assert main(["convert", str(path), *arguments]) == 0
    assert Placement.load(out).model == model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["counts.npz", "--to=stats", SIZES], "could be from several engines; name it with --from"),
        (["counts.npy", "--to=stats"], "--expert-bytes: say what one expert takes"),
        (["counts.npy", "--to=stats", "--expert-bytes=bf16"], "'bf16': expected NAME=BYTES"),
        (["counts.npy", "--to=stats", SIZES, "--layers=3-1"], "expected numbers and ranges that ascend"),
        (["counts.npy", "--to=stats", SIZES, "--top-k=0"], "--top-k 0: must be at least 1"),
        (["counts.npy", "--to=stats", "--from=eplb", SIZES], "unknown --from for statistics 'eplb'"),
        (["counts.npy", "--to=vllm", "--from=numpy", SIZES], "vLLM reads no placement from a file"),
        (["counts.npy", "--to=sglang", "--from=vllm"], "unknown --from for placements 'vllm'"),
        (["mixed.json", "counts.npy", "--to=sglang"], "counts.npy: a placement is one file"),
        (["mixed.json", "--to=sglang"], "sglang cannot serve this placement: formats bf16, int8"),
        (["mixed.json", "--to=placement", "--from=placement"], "unknown --to for a placement of ours 'placement'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    np.save("counts.npy", np.ones((2, 1, 4), np.int64))
    np.savez("counts.npz", counts=np.ones((2, 1, 4), np.int64))
    layer = LayerPlacement.even(0, 2, [Replica(0, 0, "bf16"), Replica(1, 1, "int8")])
    Placement((layer,), "rq", Topology(2), (1000, 504)).save("mixed.json")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["convert", *arguments, "--out=out.json"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before
