"""Predictions of the recorded plans, beside the seconds measured."""

import numpy as np

from rq_ep.core.cost import LayerCost
from rq_ep.core.plan import DispatchPlan
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.moe import Telemetry
from rq_ep.moe.telemetry import LayerCall
from rq_ep.parallel import single_group

COST = LayerCost(pair_s={"bf16": 0.5}, stream_s={"bf16": 3.0}, transfer_s={"bf16": 0.0}, row_s=0.0)


def test_every_step_and_rank_is_priced_by_its_own_plan() -> None:
    telemetry = Telemetry()
    assert telemetry.predicted_seconds(COST).size == 0
    replicas = Replicas.of([Replica(0, 0, "bf16"), Replica(1, 1, "bf16")])
    for counts in ([9, 0], [1, 8]):
        plan = DispatchPlan(replicas, np.array([counts, [0, 0]]))
        for rank in range(2):
            timer = telemetry.timer(single_group())
            telemetry.record(LayerCall(4, rank, plan.pairs_RP, plan, timer, {}, lambda: np.zeros(2, np.int64)))
    np.testing.assert_allclose(telemetry.predicted_seconds(COST), [[[4.5, 0.0]], [[3.0, 4.0]]])
    assert telemetry.loads().dtype == np.int64
