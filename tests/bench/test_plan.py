"""`bench/plan.py` runs, and the planners are far from a millisecond."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "plan.py"


def test_times_every_strategy(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    options = ["--sizes", "16x4", "--steps", "3", "--rounds", "4", "--min-tokens-per-gemm", "16", "--json", str(out)]
    subprocess.run([sys.executable, str(BENCH), *options], check=True, timeout=120, capture_output=True)
    rows = {row["strategy"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["standard", "eplb", "llep", "rq"]
    assert rows["rq"]["imbalance"] < rows["eplb"]["imbalance"] < rows["standard"]["imbalance"]
    assert rows["llep"]["transfers"] > 0
    assert all(0 < row["plan_p50_s"] < 5e-3 for row in rows.values())


def test_a_size_that_is_none_is_refused() -> None:
    done = subprocess.run([sys.executable, str(BENCH), "--sizes", "16"], timeout=120, capture_output=True, text=True)
    assert done.returncode == 1
    assert "bench/plan.py: 16:" in done.stderr
