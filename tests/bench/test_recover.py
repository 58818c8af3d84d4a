"""`python -m bench recover`: how fast members go on without a rank, and how well balanced."""

import json
from pathlib import Path

import pytest

from bench.solver.recover import main


def test_members_are_balanced_at_once_and_then_as_well_as_placed_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "recover.json"
    options = ["--layers", "2", "--lost", "1", "--calibration-steps", "8", "--held-out-steps", "4"]
    main(["--cases", "16x4:0.5", *options, "--json", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert 0.1 < row["moved"] < 0.5
    assert row["first"] < 1.2 * row["fresh"]
    assert row["settled"] < 1.1 * row["fresh"]
    assert f"{row['settled']:.3f}" in capsys.readouterr().out
