"""What `bash bench/gpu.sh` runs on a device runs on a CPU in small, so that nothing in it breaks unnoticed."""

import json
import subprocess
from pathlib import Path

import pytest

from bench.__main__ import main as bench
from bench.gpu import device_tests, gpu
from rq_ep.core.errors import UserError

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def figures(name: str, tmp_path: Path) -> list[dict[str, float]]:
    stage = gpu.STAGES[name]
    bench([stage.bench, *stage.quick.split(), "--device", "cpu", "--json", str(tmp_path / "figures.json")])
    rows: list[dict[str, float]] = json.loads((tmp_path / "figures.json").read_text())["rows"]
    return rows


def test_decode_rates_are_compared_with_transformers_own(tmp_path: Path) -> None:
    peer, ours = figures("decode", tmp_path)
    assert (peer["variant"], ours["variant"]) == ("transformers", "int8")
    for figure in ("prefill", "decode", "batching"):
        assert ours["ratios"][figure] == pytest.approx(ours[figure] / peer[figure])
        assert ours[figure] > 0


def test_a_cpu_has_nothing_to_wait_for_and_staging_takes_place(tmp_path: Path) -> None:
    (row,) = figures("waits", tmp_path)
    assert row["waits"] == 0 < row["plan_s"]
    (row,) = figures("staging", tmp_path)
    assert row["staged_bytes_per_s"] > 0 < row["slowdown"]


@pytest.mark.parametrize("stage", gpu.STAGES.values(), ids=gpu.STAGES)
def test_every_stage_has_options_that_its_bench_knows(stage: gpu.Stage, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench([stage.bench, "--help"])
    known = capsys.readouterr().out
    for text in f"{stage.options} {stage.quick}".split():
        assert not text.startswith("--") or text in known


def test_the_command_writes_a_summary_and_stops_at_its_limit(tmp_path: Path) -> None:
    command = ["bash", "bench/gpu.sh", "--device", "cpu", "--quick", "--stages", "waits", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert (row["stage"], row["end"]) == ("waits", "done")
    assert "waits of a rank and call" in done.stdout
    assert (
        gpu.main(["--device", "cpu", "--stages", "waits", "decode", "--minutes", "0.001", "--out", str(tmp_path)]) == 1
    )
    ends = [row["end"] for row in json.loads((tmp_path / "summary.json").read_text())["rows"]]
    assert ends == ["out of time", "no time left"]


def test_a_test_that_spoils_its_process_hides_no_other(tmp_path: Path) -> None:
    (tmp_path / "test_made.py").write_text(
        "import os\n"
        "def test_first(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_second(): os._exit(3)\n"
        "def test_third(): assert 1 == 2\n"
        "def test_fourth(): pass\n"
    )
    out = tmp_path / "outcomes.json"
    options = ["--tests", str(tmp_path), "--marker", "not gpu", "--json", str(out)]
    assert device_tests.main(options) == 1
    document = json.loads(out.read_text())
    outcomes = {name.rpartition("::")[2]: outcome["outcome"] for name, outcome in document["outcomes"].items()}
    assert outcomes == {
        "test_first": "failed", "test_second": "died", "test_third": "failed", "test_fourth": "passed"
    }  # fmt: skip
    assert document["counts"] == {"failed": 2, "died": 1, "passed": 1}


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'decode'"):
        gpu.main(["--stages", "decoded"])
