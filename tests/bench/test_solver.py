"""`python -m bench solver` runs, its traces are what they say, and its scores are those of the planner."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench.__main__ import main
from bench.solver.score import score
from bench.solver.solver import Case
from bench.solver.synthetic_traces import LAWS, draw_trace
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.replicas import Replica
from rq_ep.core.topology import Topology
from rq_ep.solver.certificate.layer_bounds import bounds_of
from rq_ep.solver.objective.calibration_steps import calibration_steps

pytestmark = pytest.mark.slow


def test_prints_the_table_with_eplb_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "solver.json"
    main(["solver", "--quick", "--formats", "int8", "--json", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert f"{row['fractional']:.4f}" in capsys.readouterr().out
    assert row["bound"] <= row["calibration"] <= row["eplb_calibration"]
    assert row["fractional"] <= row["integer"]
    assert row["low_share"] <= row["cap"]


def test_says_what_is_wrong() -> None:
    with pytest.raises(UserError, match="--cases 16x4: write EXPERTSxRANKS:CAP, such as 256x64"):
        main(["solver", "--cases", "16x4"])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("tokens", [64, 4096])
def test_traces_have_distinct_experts_and_steps_that_are_held_out(law: str, tokens: int) -> None:
    trace = draw_trace(law, 32, 4, tokens, 2, (8, 16), seed=0)
    again = draw_trace(law, 32, 4, tokens, 2, (8, 16), seed=0)
    assert trace.calibration_SLE.shape == (8, 2, 32)
    assert trace.held_out_SLE.shape == (16, 2, 32)
    for counts_SLE, same_SLE in zip((trace.calibration_SLE, trace.held_out_SLE), vars(again).values(), strict=True):
        np.testing.assert_array_equal(counts_SLE, same_SLE)
        assert counts_SLE.max() <= tokens
        np.testing.assert_allclose(counts_SLE.sum(axis=2), 4 * tokens, rtol=0.1)
    assert not np.array_equal(trace.calibration_SLE[:8], trace.held_out_SLE[:8])


def test_scores() -> None:
    replicas = [Replica(0, 0, "a"), Replica(0, 1, "a"), Replica(1, 1, "a")]
    placement = Placement((LayerPlacement.even(0, 2, replicas),), "test", Topology(2), (2, 1))
    scored = score(placement, np.array([[[1, 4]], [[4, 1]]]))
    assert scored.even == pytest.approx((3 / 2.5 + 4.5 / 2.5) / 2)
    assert scored.fractional == pytest.approx((1 + 4 / 2.5) / 2, abs=1e-3)
    assert scored.integer == pytest.approx((3 / 2.5 + 4 / 2.5) / 2)
    assert scored.cvar90 == pytest.approx(4 / 2.5)


def test_low_formats_together_are_beside_each_alone(tmp_path: Path) -> None:
    out = tmp_path / "low.json"
    steps = ["--calibration-steps", "8", "--held-out-steps", "8", "--tokens", "128"]
    main(["low-formats", "--cases", "8x2:0.25", "--budgets", "0.6", "--layers", "1", *steps, "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert {tuple(row["formats"]) for row in rows} == {("int8:504",), ("int4",), ("int8:504", "int4")}
    for row in rows:
        assert row["max_error"] is None or row["error"] <= row["max_error"] * (1 + 1e-9)


def test_the_bound_is_below_an_overfitted_placement() -> None:
    """`bench/results/solver.md` says what this placement shows: no bound can be above it."""
    found = json.loads((Path(__file__).parents[2] / "bench/results/solver_overfitted_layer.json").read_text())
    case, low, seed = Case.parse(found["case"]), found["low"], found["seed"]
    trace = draw_trace(found["law"], case.num_experts, case.top_k, found["tokens"], 1, (64, 96), seed)
    problem = case.problem(trace, low, seed)
    replicas = [
        Replica(rank, expert, low if expert in found["low_experts"] else "bf16")
        for expert, ranks in enumerate(found["ranks_by_expert"])
        for rank in ranks
    ]
    placement = problem.placement("overfitted", [LayerPlacement.even(0, case.num_experts, replicas)])
    assert placement.budget_bytes_R is not None
    assert (np.array(placement.bytes_R) <= placement.budget_bytes_R).all()
    assert placement.low_precision_planned <= case.cap
    attained = score(placement, trace.calibration_SLE).fractional
    assert attained == pytest.approx(found["max_mean"], abs=1e-3)
    assert score(placement, trace.held_out_SLE).fractional == pytest.approx(found["held_out"], abs=1e-3)
    bound, _ = bounds_of(problem, placement, calibration_steps(problem, len(trace.calibration_SLE)))
    assert 1 <= bound.value <= attained
