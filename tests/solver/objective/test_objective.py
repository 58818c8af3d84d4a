"""Certificates are in units of the objective: seconds of pairs, or the reading of activated experts."""

from dataclasses import replace

import numpy as np
import pytest

from rq_ep.core.cost import LayerCost
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.replicas import Replica
from rq_ep.core.stats import ExpertStats
from rq_ep.solver.certificate.certify import certify
from rq_ep.solver.objective.calibration_steps import LayerSteps, calibration_steps
from rq_ep.solver.objective.objective import least_ratio_S, step_balance
from rq_ep.solver.objective.step_balance import EvenSplit, ExactSplit
from rq_ep.strategies import make_strategy
from tests.solver.instances import problem, skewed

COST = LayerCost({"bf16": 1.0, "int8": 1.5}, {"bf16": 8.0, "int8": 4.0}, {"bf16": 1.0, "int8": 1.0}, 0.0)


def instance(pairs: int = 12, num_steps: int = 20, **options: object) -> PlacementProblem:
    counts = np.stack([skewed(8, pairs, layer, num_steps) for layer in range(2)], axis=1)
    phase = (np.arange(num_steps) % 2).astype(np.int64)
    return problem(counts, 4, notes={"phase": phase}, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", ["prefill", "decode", "mixed"])
@pytest.mark.parametrize("name", ["standard", "eplb", "rq"])
@pytest.mark.parametrize("cost", [None, COST])
def test_bound_and_prediction_are_in_the_units_asked_for(objective: str, name: str, cost: LayerCost | None) -> None:
    placement = make_strategy(name).place(instance(objective=objective, cost=cost))
    certificate = placement.certificate
    assert 1 <= certificate["bound"] <= certificate["predicted"] + 1e-5
    assert ("reading" in certificate["objective"]) == (objective != "prefill")
    assert ("seconds" in certificate["objective"]) == (cost is not None)
    assert ("the same formats" in certificate["bound_holds_for"]) == (objective != "prefill" or cost is not None)
    if name == "standard":
        assert certificate["predicted"] == pytest.approx(certificate["standard"])


def test_decode_counts_the_bytes_that_a_plan_reads() -> None:
    layer = LayerPlacement.even(
        0, 3, [Replica(0, 0, "bf16"), Replica(1, 0, "bf16"), Replica(0, 1, "int8"), Replica(1, 2, "bf16")]
    )
    counts_SE = np.array([[5, 1, 0], [5, 1, 2], [0, 0, 7]])
    decode = problem(counts_SE[:, None], 2, None, objective="decode")
    steps = LayerSteps(counts_SE, 2)
    exact = step_balance(decode, layer, steps, ExactSplit(2)).ratio_S
    # 1000 | 504; 1504 | 1000 (expert 0 beside the smaller one); one expert alone
    np.testing.assert_allclose(exact, [2 * 1000 / 1504, 2 * 1504 / 2504, 2.0])
    even = step_balance(decode, layer, steps, EvenSplit(2)).ratio_S
    np.testing.assert_allclose(even, [2 * 1504 / 1504, 2 * 2000 / 2504, 2.0])
    np.testing.assert_allclose(least_ratio_S(decode, layer, steps), [2 * 1000 / 1504, 2 * 1504 / 2504, 2.0])


def test_pairs_weigh_the_seconds_of_their_format() -> None:
    layer = LayerPlacement.even(0, 2, [Replica(0, 0, "bf16"), Replica(1, 1, "int8")])
    counts_SE = np.array([[30, 20], [10, 20]])
    seconds = replace(problem(counts_SE[:, None], 2, None), cost=COST)
    ratio_S = step_balance(seconds, layer, LayerSteps(counts_SE, 2), EvenSplit(2)).ratio_S
    planned = [
        COST.compute_s_R(DispatchPlan(layer.replicas, np.array([counts_E, [0, 0]]))) for counts_E in counts_SE * 1000
    ]
    np.testing.assert_allclose(ratio_S, [seconds_R.max() / seconds_R.mean() for seconds_R in planned], rtol=1e-5)


def test_mixed_steps_are_evaluated_by_their_phase() -> None:
    mixed = instance(objective="mixed")
    layer = make_strategy("eplb").place(mixed).layers[0]
    steps = calibration_steps(mixed, 20)[0]
    assert steps.phase_S is not None
    ratio_S = step_balance(mixed, layer, steps, EvenSplit(4)).ratio_S
    for phase, objective in enumerate(("prefill", "decode")):
        alone = step_balance(replace(mixed, objective=objective), layer, steps, EvenSplit(4)).ratio_S
        np.testing.assert_allclose(ratio_S[steps.phase_S == phase], alone[steps.phase_S == phase], rtol=1e-5)


def test_steps_of_no_pairs_at_all() -> None:
    stats = ExpertStats(np.zeros((3, 1, 8), np.int64), ("bf16",), "bf16", {"bf16": 10})
    idle = PlacementProblem(stats, problem(np.ones((1, 1, 8)), 4).topology, objective="decode")
    assert make_strategy("standard").place(idle).certificate["predicted"] == 1.0


def test_few_bits_are_seen_beside_standard_ep_though_the_mean_falls_with_them() -> None:
    every = np.full((4, 1, 8), 50)
    decode = problem(every, 4, objective="decode", max_low_precision_share=1.0)
    halves = [LayerPlacement.even(0, 8, [Replica(expert // 2, expert, "int8") for expert in range(8)])]
    certificate = certify(decode, make_strategy("rq"), halves).certificate
    assert certificate["predicted"] == pytest.approx(certificate["standard"]) == pytest.approx(1.0)
    assert certificate["of_standard"] == pytest.approx(504 / 1000)
    assert make_strategy("standard").place(decode).certificate["of_standard"] == 1.0
