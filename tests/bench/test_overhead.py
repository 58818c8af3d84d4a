"""`python -m bench overhead` runs, and its parts add up."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def ranks_of(out: Path, *launcher: str) -> list[dict[str, Any]]:
    options = ["--shape", "tiny", "--tokens-per-rank", "64", "--steps", "1", "--dtype", "float32", "--json", str(out)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    run = [sys.executable, *launcher, "-m", "bench", "overhead", *options, "--keep-freed"]
    subprocess.run(run, check=True, timeout=120, capture_output=True, env=environment)
    ranks: list[dict[str, Any]] = json.loads(out.read_text())["ranks"]
    return ranks


def test_the_parts_of_a_layer_add_up(tmp_path: Path) -> None:
    (rank,) = ranks_of(tmp_path / "overhead.json")
    layer = rank["layer"]
    assert layer["products_s"] > 0
    assert layer["around_s"] > 0
    parts_s = layer["products_s"] + layer["collectives_s"] + layer["around_s"]
    assert parts_s == pytest.approx(layer["layer_s"])
    assert 0 < layer["telemetry_s"] < layer["layer_s"]
    assert rank["transfer"] == {}, "one rank has nobody to borrow from"


@pytest.mark.dist
def test_an_expert_is_moved_by_both_ways(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    first, second = (rank["transfer"] for rank in ranks_of(tmp_path / "overhead.json", *launcher))
    assert first == second, "every rank knows both"
    for clock in ("wall", "cpu"):
        assert 0 < first[f"borrow_{clock}_s"] <= first[f"verified_{clock}_s"]
        assert first[f"borrow_{clock}_ratio"] > 0 < first[f"plain_{clock}_s"]
