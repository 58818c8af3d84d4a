"""`python -m bench breakeven`: lending breaks even sooner than LLEP, and comes near perfect balance."""

import json
from pathlib import Path

import pytest

from bench.lending.breakeven import main
from rq_ep.core.errors import UserError

pytestmark = pytest.mark.slow


def test_breaks_even_at_half_the_excess_of_llep(tmp_path: Path) -> None:
    out = tmp_path / "breakeven.json"
    main(["--tokens-per-rank", "8192", "--scenarios", "95:1", "balanced", "--json", str(out)])
    document = json.loads(out.read_text())
    excess = {row["row"]: row["excess"] for row in document["break_even"]}
    assert 0 < excess["rq_llep"] <= excess["llep"] / 2
    assert excess["rq_llep int8"] < excess["rq_llep"]
    assert excess["llep auto"] < excess["llep"]
    rows = {(row["row"], row["scenario"]): row for row in document["rows"]}
    lent = rows["rq_llep uncalibrated", "95:1"]
    assert lent["transfers"] > 0
    assert lent["speed_up"] >= 0.92 * lent["ideal_speed_up"]
    assert rows["rq_llep uncalibrated", "balanced"]["speed_up"] >= 0.98
    assert rows["rq calibrated", "95:1"]["transfers"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-ranks", "1"], "--num-ranks 1: must be at least 2"),
        (["--num-ranks", "64"], "--num-ranks 64: 128 experts do not give rank 0 the 4 hot ones"),
        (["--tokens-per-rank", "0"], "--tokens-per-rank 0: must be at least 1"),
        (["--scenarios", "95:0"], "--scenarios 95:0: percent in 1..100, experts in 1..127"),
        (["--hidden-size", "0"], "--hidden-size 0: must be at least 1"),
        (["--json", "/"], "/: is a directory"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(options)
