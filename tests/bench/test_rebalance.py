"""What the bench of re-placement makes of its records, and the peers' way of moving that it compares with."""

import re
import threading
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.serving.load_generator import Answer, Job
from bench.serving.rebalance import main, value_after_change, way_from_nothing
from bench.serving.rebalance_figure import draw
from bench.serving.rebalance_figures import (
    LoadSample,
    first_within,
    goals,
    imbalance_between,
    intervals,
    latency,
    pairs_at,
    ratio_by_round,
    series,
    share_of_gain,
    spread,
)
from bench.serving.rebalance_workload import Served, Workload
from bench.serving.stop_the_world import StopTheWorldMover
from rq_ep.core.errors import UserError
from rq_ep.core.stats import ExpertStats
from tests.moe import test_expert_mover as mover_tests

SAMPLES = [
    LoadSample(10.0, (2, 2), (2.0, 1.5), ((30, 10), (20, 20))),
    LoadSample(12.0, (6, 6), (1.5, 1.25), ((60, 60), (80, 40))),
    LoadSample(13.0, (7, 6), (1.5, 1.25), ((70, 70), (80, 40))),  # in the middle of a step
    LoadSample(14.0, (8, 8), (1.5, 1.25), ((90, 70), (90, 70))),
]


def test_an_interval_has_the_steps_between_two_samples() -> None:
    first, last = intervals(SAMPLES)
    # Layer 0: (6 * 1.5 - 2 * 2.0) / 4 = 1.25; layer 1: (6 * 1.25 - 2 * 1.5) / 4 = 1.125.
    assert (first.time_s, first.steps, first.pairs) == (12.0, 4, 160)
    assert first.imbalance == pytest.approx(1.1875)
    # 30 and 50 pairs, of 40 each: 1.25; 60 and 20: 1.5.
    assert first.load == pytest.approx(1.375)
    # From 12 s on, as layer 1 has no call until 13 s: (8 * 1.5 - 6 * 1.5) / 2 = 1.5, and 1.25; 30 of 20 pairs each.
    assert (last.time_s, last.steps, last.pairs) == (14.0, 2, 80)
    assert (last.imbalance, last.load) == (pytest.approx(1.375), pytest.approx(1.5))
    assert [one.pairs for one in intervals(SAMPLES, 200)] == [240]


def test_the_series_counts_from_the_first_sample() -> None:
    rows = series(SAMPLES[:2])
    assert rows == [{"pairs": 160, "steps": 4.0, "imbalance": pytest.approx(1.1875), "load": pytest.approx(1.375)}]
    assert pairs_at(SAMPLES, 11.0) == 80
    # Layer 0: (8 * 1.5 - 2 * 2) / 6 = 4 / 3; layer 1: (8 * 1.25 - 3) / 6 = 7 / 6.
    assert imbalance_between(SAMPLES) == pytest.approx(1.25)
    assert imbalance_between(SAMPLES[:1]) == 1.0


def test_latency_counts_lost_requests_and_finds_the_longest_gap() -> None:
    job = Job((1, 2), 3)
    whole = Answer(job, 0.0, [1.0, 1.1, 1.4], 1.4, 3, "abc", "length")
    lost = Answer(job, 0.0, [0.5, 1.5], 1.5, error="the server has died")
    found = latency([whole, lost])
    assert (found["num_requests"], found["num_lost"], found["errors"]) == (2, 1, ["the server has died"])
    assert found["longest_gap_ms"] == pytest.approx(1000), "a stream that ends in an error has waited as well"
    assert found["median_itl_ms"] == pytest.approx(200)
    assert found["output_throughput"] == pytest.approx(3 / 1.5)


def test_ratios_are_taken_within_a_round() -> None:
    values = {"off": [10, 20, 40], "moving": [11, 24, 40]}
    rows = [{"server": name, "round": at, "x": x} for name, row in values.items() for at, x in enumerate(row)]
    assert ratio_by_round(rows, "x", "moving", "off") == pytest.approx(1.1)


def test_the_noise_floor_is_how_much_successive_runs_differ() -> None:
    assert spread([10, 11, 10, 8]) == pytest.approx(1.1)  # of 1.1, 1.1 and 1.25
    assert spread([10]) == 1


def test_the_share_of_a_gain() -> None:
    assert share_of_gain(1.4, 1.1, 1.0) == pytest.approx(0.75)
    assert share_of_gain(1.4, 1.5, 1.0) == pytest.approx(-0.25)
    assert share_of_gain(1.0, 1.0, 1.0) == 1.0


def test_what_comes_near_and_goes_away_again_has_not_arrived() -> None:
    points = [(0.0, 1.5), (10.0, 1.01), (20.0, 1.3), (30.0, 1.02), (40.0, 1.0)]
    assert first_within(points, 1.0, 0.02) == 30
    assert first_within(points[:3], 1.0, 0.02) is None


def parts() -> dict[str, Any]:
    rows = [
        {"pairs": 1e6, "steps": 10, "imbalance": 1.5, "load": 1.4},
        {"pairs": 2e6, "steps": 20, "imbalance": 1.0, "load": 1.0},
    ]
    return {
        "armed": {
            "rows": [{"round": 0}, {"round": 1}],
            "ratios": {"output_throughput": {"armed": 0.995, "off again": 1.004}},
        },
        "cost": {
            "num_committed": {"moving": 21, "stop-the-world": 20},
            "ratios": {"p99_itl_ms": {"planning": 1.1, "moving": 1.21}},
            "noise": {"p99_itl_ms": 1.04},
            "longest_gap_ms": {"off": 40.0, "moving": 50.0, "stop-the-world": 500.0},
            "planner_share": {"moving": 0.05},
            "peak_bytes": {"planning": 900 << 20, "moving": 905 << 20},
            "room_bytes": 12 << 20,
        },
        "answers": {"num_requests": 2000, "num_committed": 25, "num_lost": 0, "num_wrong": 1},
        "domains": {
            "domains": ["code", "table"],
            "series": {"rq live": rows},
            "commits": {"rq live": [{"pairs": 1.5e6}]},
            "phase_ends": [1e6, 2e6],
            "sent_by_planned": 1.0,
            "value": {"from": "code", "to": "table", "share_of_gain": 0.95, "share_of_bytes": 0.3},
            "from_nothing": {"calibrated": 1.01, "steps_of_4096": None, "last": 1.05},
        },
    }


def test_the_table_says_what_was_reached_and_what_was_not() -> None:
    reached = {goal.name.split(":")[0]: goal.reached for goal in goals(parts())}
    tokens = reached["R1 tokens/s, armed and idle / off, median of 2 turns"]
    assert tokens == "0.995; another server that is off / off 1.004"
    itl = reached["R1 p99 ITL while 21 re-placements happen / without moves"]
    assert itl == "1.21; planning alone 1.10, so moves 1.10; two runs of the same server differ by 1.04"
    gap = reached["R1 longest gap / stop-the-world's"]
    assert gap == "0.10 (50 / 500 ms), and 0.08 without moves (40 ms): moves add 0.02"
    assert reached["R2 answers in fp32, 2,000 requests across 25 re-placements"] == "0 lost, 1 wrong"
    assert reached["R4 after code -> table"] == "95% for 30%"
    assert reached["from nothing to within 0.02 of the calibrated placement (1.010)"] == "not reached (1.050)"
    assert len(goals({"answers": parts()["answers"]})) == 1


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw({"parts": parts()}, tmp_path / "rebalance.png")
    assert (tmp_path / "rebalance.png").read_bytes().startswith(b"\x89PNG")


def test_value_and_the_way_from_nothing_are_taken_on_steps_that_were_not_placed_for() -> None:
    loads = {"code": [400, 100, 200, 300], "table": [400, 200, 100, 300]}  # halves: 0 and 1; 0 and 2
    bench = object.__new__(Workload)  # without a checkpoint
    bench.options = Namespace(num_ranks=2)
    bench.domains, bench.formats, bench.native = list(loads), ("bf16",), "bf16"
    bench._stats = {
        name: ExpertStats(
            np.array([[row]] * 4 + [[[1, 0, 0, 0]]]), ("bf16",), "bf16", {"bf16": 100}, top_k=2,
            phase=np.array([0, 0, 0, 0, 1]),
        )
        for name, row in loads.items()
    }  # fmt: skip
    before, after = (bench.place("rq", bench.halves(name)[0]) for name in loads)
    served = Served("rq live", "", None, (), None)  # type: ignore[arg-type]  # no process
    served.samples = [LoadSample(0.0, (1,), (1.0,), ((0, 0),)), LoadSample(10.0, (9,), (1.0,), ((8192, 8192),))]
    served.placements = [(0.0, before), (7.5, after)]
    value = value_after_change(bench, served, [{"server": "rq live", "moved_bytes": 100}], 8192)
    assert (value["after"], value["share_of_gain"]) == (value["best"], 1.0)
    assert value["before"] > value["after"]
    assert value["share_of_bytes"] == 100 / value["eplb_bytes"]
    # The first placement is the calibrated one: reached at once. The other comes too late for the first phase.
    nothing = way_from_nothing(bench, served, 8192)
    assert (nothing["points"], nothing["steps_of_4096"]) == ([(0.0, nothing["calibrated"])], 0)
    served.placements = [(0.0, after), (5.0, before)]
    # 8,192 pairs of one layer with two experts a token are 4,096 tokens.
    assert way_from_nothing(bench, served, 16384)["steps_of_4096"] == 1.0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--parts", "price"], "part"),
        (["--domains", "code,poems"], "--domains poems"),
        (["--domains", "code"], "--domains code: name two or more"),
        (["--num-ranks", "0"], "--num-ranks"),
    ],
)
def test_mistakes_are_refused_before_a_server_starts(option: list[str], message: str, tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        main(["--model", str(tiny_checkpoint), *option])


def test_stop_the_world_makes_all_moves_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover_tests, "ExpertMover", StopTheWorldMover)
    before, after = mover_tests.drawn(1), mover_tests.drawn(101)
    group = mover_tests.Group(before)
    plan = mover_tests.migration(before, after)
    group.begin(plan, ranks=[0])

    def step() -> list[list[Any]]:
        staged = min(mover.flags.staged for mover in group.movers)
        ranks = [threading.Thread(target=mover.between_steps, args=(staged, 0)) for mover in group.movers]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        return [[layer.placement.replicas for layer in layers] for layers in group.layers]

    assert step() == [[layer.replicas for layer in before.layers]] * mover_tests.NUM_RANKS, "a rank knows of no moves"
    group.begin(plan, ranks=range(1, mover_tests.NUM_RANKS))
    assert step() == [[layer.replicas for layer in after.layers]] * mover_tests.NUM_RANKS
    assert [end for *_, end in group.ends] == [mover_tests.MigrationEnd.COMMITTED] * mover_tests.NUM_RANKS
    group.close()
