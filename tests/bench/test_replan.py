"""`python -m bench replan`: what a change of domain costs and gains, planned again and anew."""

import json
from pathlib import Path

import pytest

from bench.solver.replan import main
from rq_ep.core.errors import UserError

SMALL = ["--cases", "16x4:0.25", "--tokens", "1024", "--layers", "2", "--seeds", "1", "--more-steps", "0"]
SHORT = ["--calibration-steps", "16", "--held-out-steps", "8"]


def test_dearer_bytes_move_fewer_and_gain_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "replan.json"
    main([*SMALL, *SHORT, "--prices", "0", "0.45", "1000", "--json", str(out)])
    document = json.loads(out.read_text())
    assert document["command"].startswith("python -m bench replan --cases 16x4:0.25")
    free, priced, dear = document["rows"]
    assert [row["price"] for row in document["rows"]] == [0, 0.45, 1000]
    assert free["stale"] > free["replanned"] > 1
    assert free["moved_of_eplb"] > priced["moved_of_eplb"] >= dear["moved_of_eplb"]
    assert free["replanned"] <= priced["replanned"] <= dear["replanned"]
    assert free["gain_share"] == (free["stale"] - free["replanned"]) / (free["stale"] - free["fresh"])
    assert free["cpu_s"] > 0
    printed = capsys.readouterr().out
    assert f"{priced['replanned']:.3f}" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--domains", "c=C"], "--domains c=C: write NAME=STATS,HELD_OUT_STATS"),
        (["--prices", "-1"], "--prices -1.0: must be at least 0"),
        (["--layers", "0"], "--layers 0: must be at least 1"),
    ],
)
def test_says_what_is_wrong(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(options)
