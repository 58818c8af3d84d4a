"""`python -m bench drift`: lending pays in large steps of a load that was not calibrated, and only there."""

import json
from pathlib import Path

import pytest

from bench.__main__ import main

pytestmark = pytest.mark.slow


def test_lends_where_it_pays(tmp_path: Path) -> None:
    out = tmp_path / "drift.json"
    options = ["--tokens-per-rank", "16", "8192", "--drifts", "0", "1", "--steps", "4", "--json", str(out)]
    main(["drift", *options])
    rows = {(row["row"], row["tokens_per_rank"], row["drift"]): row for row in json.loads(out.read_text())["rows"]}
    for tokens, drift in ((16, 0), (16, 1), (8192, 0), (8192, 1)):
        assert rows["rq_llep", tokens, drift]["layer_s"] <= rows["rq", tokens, drift]["layer_s"]
    small, large = rows["rq_llep", 16, 1], rows["rq_llep", 8192, 1]
    assert small["transfers"] == 0 < small["bound_by_bytes"]
    assert large["transfers"] > 0 == large["bound_by_bytes"]
    assert large["layer_s"] < min(rows["rq", 8192, 1]["layer_s"], rows["llep", 8192, 1]["layer_s"])
