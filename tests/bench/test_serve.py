"""What the serving benchmark makes of its runs."""

import re
from pathlib import Path
from typing import Any

import pytest

from bench.serving.serve import main, medians
from bench.serving.serve_figure import draw
from rq_ep.core.errors import UserError

RATE = float("inf")


def row(contestant: str, run: int, throughput: float, p99: float | None) -> dict[str, Any]:
    tails = {} if p99 is None else {"p99_itl_ms": p99, "p99_ttft_ms": p99}
    load = {"request_rate": RATE, "max_concurrency": 8}
    return {"contestant": contestant, "run": run, **load, "output_throughput": throughput, **tails}


RESULT = {
    "contestants": ["standard", "rq", "transformers"],
    "options": {"runs": 3},
    "rows": [
        *(row("standard", run, throughput, 10.0) for run, throughput in enumerate([100.0, 200.0, 50.0], 1)),
        *(row("rq", run, throughput, 5.0) for run, throughput in enumerate([110.0, 240.0, 50.0], 1)),
        *(row("transformers", run, 10.0, None) for run in (1, 2, 3)),
    ],
}


def test_ratios_are_medians_of_the_ratios_of_a_run() -> None:
    standard, rq, peer = medians(RESULT)
    assert (standard["output_throughput"], standard["output_throughput_ratio"]) == (100, 1)
    assert (rq["output_throughput"], rq["output_throughput_ratio"]) == (110, pytest.approx(1.1))
    assert rq["p99_itl_ms_ratio"] == 0.5
    assert "p99_itl_ms" not in peer, "a peer without streams has no tails"


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    draw(RESULT, tmp_path / "serve.png")
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--strategies", "rqq"], "did you mean 'rq'?"),
        (["--request-rate", "fast"], "--request-rate: expected numbers"),
        (["--placement", "eplb=x"], "strategy of --placement"),
        (["--num-prompts", "0"], "--num-prompts"),
        (["--cache", "paged,padde"], "did you mean 'padded'?"),
    ],
)
def test_mistakes_are_told_before_a_server_starts(option: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        main(["--model", "/nowhere", *option])
