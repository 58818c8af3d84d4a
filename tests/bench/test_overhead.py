"""`bench/overhead.py` runs, and its parts add up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "overhead.py"


def test_the_parts_of_a_layer_add_up(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    options = ["--shape", "tiny", "--tokens-per-rank", "64", "--steps", "1", "--dtype", "float32", "--json", str(out)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    run = [sys.executable, str(BENCH), *options, "--keep-freed"]
    subprocess.run(run, check=True, timeout=120, capture_output=True, env=environment)
    (rank,) = json.loads(out.read_text())["ranks"]
    layer = rank["layer"]
    assert layer["products_s"] > 0
    assert layer["around_s"] > 0
    parts_s = layer["products_s"] + layer["collectives_s"] + layer["around_s"]
    assert parts_s == pytest.approx(layer["layer_s"])
    assert 0 < layer["telemetry_s"] < layer["layer_s"]
    assert rank["transfer"] == {}, "one rank has nobody to borrow from"
