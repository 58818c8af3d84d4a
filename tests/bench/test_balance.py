"""What `python -m bench balance` makes of its runs."""

import numpy as np
import pytest

from bench.serving.balance import allowed_speed_up, cells, summary
from bench.serving.served_loads import ServedLoads


def test_seconds_in_experts_follow_from_those_of_rank_zero() -> None:
    before = ServedLoads(np.array([[10, 10], [10, 10]]), np.array([1, 1]), np.array([1.0, 1.0]), 5.0)
    after = ServedLoads(np.array([[40, 20], [30, 30]]), np.array([3, 3]), np.array([4.0, 3.0]), 10.0)
    figures = after.since(before)  # 0.1 s a pair of rank 0; means of 20 pairs in both layers, at max/mean 1.5 and 1
    assert figures["mean_compute_s"] == pytest.approx(4.0)
    assert figures["slowest_compute_s"] == pytest.approx(5.0)
    assert figures["imbalance"] == pytest.approx(1.25)


def test_what_balance_allows_leaves_the_rest_of_a_run_as_it_was() -> None:
    assert allowed_speed_up({"duration": 10.0, "slowest_compute_s": 6.0, "mean_compute_s": 4.0}) == 1.25

    def row(name: str, run: int, duration: float, **loads: float) -> dict[str, object]:
        latencies = {"median_ttft_ms": 10 * duration, "p99_ttft_ms": 20 * duration}
        return {"contestant": name, "run": run, "duration": duration, "total_input": 1000, **latencies, **loads}

    loads = {"imbalance": 1.5, "slowest_compute_s": 6.0, "mean_compute_s": 4.0}
    even = {"imbalance": 1.0, "slowest_compute_s": 4.0, "mean_compute_s": 4.0}
    rows = [row("standard", run, 10.0, **loads) for run in (1, 2, 3)] + [row("rq", run, 8.0, **even) for run in (1, 2)]
    rows += [row("rq", 3, 10.0, **even), row("transformers", 1, 20.0)]
    result = {"contestants": ["standard", "rq", "transformers"], "rows": rows}
    standard, rq, peer, ideal = summary(result)
    assert (standard["speed_up"], standard["imbalance"], standard["of_allowed"]) == (1.0, 1.5, 0.8)
    assert (rq["speed_up"], rq["of_allowed"], rq["median_ttft_ms_ratio"]) == (1.25, 1.0, 0.8)
    assert "imbalance" not in peer, "it does not say"
    assert cells(ideal) == ["perfect balance", "1.00", "", "1.25", "", "", ""]
