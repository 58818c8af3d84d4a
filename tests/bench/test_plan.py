"""`python -m bench plan` runs, and its figures are those of the strategies."""

import json
from pathlib import Path

import pytest

from bench.layer.plan import main
from rq_ep.core.errors import UserError
from rq_ep.strategies import STRATEGIES

pytestmark = pytest.mark.slow


def test_times_every_strategy(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    options = ["--sizes", "16x4", "--steps", "3", "--rounds", "4", "--min-tokens-per-gemm", "16", "--json", str(out)]
    main(options)
    rows = {row["strategy"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == list(STRATEGIES)
    assert rows["rq"]["imbalance"] < rows["eplb"]["imbalance"] < rows["standard"]["imbalance"]
    assert rows["llep"]["transfers"] > 0
    assert all(0 < row["plan_p50_s"] <= row["plan_p99_s"] for row in rows.values())


def test_an_uncalibrated_placement_makes_rq_llep_lend(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    options = ["--sizes", "16x4", "--steps", "3", "--rounds", "1", "--min-tokens-per-gemm", "16", "--uncalibrated"]
    options += ["--strategies", "rq", "rq_llep", "--json", str(out)]
    main(options)
    rq, rq_llep = json.loads(out.read_text())["rows"]
    assert rq_llep["transfers"] > rq["transfers"] == 0
    assert rq_llep["imbalance"] < rq["imbalance"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "16"], "--sizes 16: write EXPERTSxRANKS"),
        (["--sizes", "0x4"], "experts 0: must be at least 1"),
        (["--sizes", "16x0"], "--num-ranks 0: must be at least 1"),
        (["--strategies", "rqq"], "did you mean 'rq'"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--pairs-per-rank", "-4"], "--pairs-per-rank -4: must be at least 0"),
        (["--skew", "nan"], "--skew nan: must be a number"),
        (["--json", "/"], "/: is a directory"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(options)
