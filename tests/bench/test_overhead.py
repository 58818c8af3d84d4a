"""`python -m bench overhead` runs, and its parts add up."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.processes import exit_codes

pytestmark = pytest.mark.slow


def ranks_of(num_ranks: int, directory: Path) -> list[dict[str, Any]]:
    out = directory / "overhead.json"
    options = ["--shape", "tiny", "--tokens-per-rank", "64", "--steps", "1", "--dtype", "float32", "--json", str(out)]
    codes, printed = exit_codes(num_ranks, ["bench", "overhead", *options, "--keep-freed"], directory, timeout_s=120)
    assert codes == [0] * num_ranks, printed
    ranks: list[dict[str, Any]] = json.loads(out.read_text())["ranks"]
    return ranks


def test_the_parts_of_a_layer_add_up(tmp_path: Path) -> None:
    (rank,) = ranks_of(1, tmp_path)
    layer = rank["layer"]
    assert layer["products_s"] > 0
    assert layer["around_s"] > 0
    parts_s = layer["products_s"] + layer["collectives_s"] + layer["around_s"]
    assert parts_s == pytest.approx(layer["layer_s"])
    assert 0 < layer["telemetry_s"] < layer["layer_s"]
    assert rank["transfer"] == {}, "one rank has nobody to borrow from"


@pytest.mark.dist
def test_an_expert_is_moved_by_both_ways(tmp_path: Path) -> None:
    first, second = (rank["transfer"] for rank in ranks_of(2, tmp_path))
    assert first == second, "every rank knows both"
    for clock in ("wall", "cpu"):
        assert 0 < first[f"borrow_{clock}_s"] <= first[f"verified_{clock}_s"]
        assert first[f"borrow_{clock}_ratio"] > 0 < first[f"plain_{clock}_s"]
