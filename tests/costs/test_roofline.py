"""The roofline against plans small enough to work out by hand."""

import numpy as np
import pytest

from rq_ep.core.cost import LayerShape
from rq_ep.core.errors import UserError
from rq_ep.core.plan import DispatchPlan, WeightTransfer
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.costs.roofline import MACHINES, Roofline

SHAPE = LayerShape(hidden_size=10, intermediate_size=20, expert_bytes={"bf16": 1200, "int8": 600})
MACHINE = Roofline(flops_per_s=1200.0, memory_bytes_per_s=600.0, link_bytes_per_s=100.0, latency_s=0.5)


def test_a_step_by_hand() -> None:
    replicas = Replicas.of([Replica(0, 0, "bf16"), Replica(0, 1, "int8"), Replica(1, 0, "bf16")])
    pairs_RP = np.array([[4, 0, 2], [3, 0, 1]])
    cost = MACHINE.layer(SHAPE).step(DispatchPlan(replicas, pairs_RP, (WeightTransfer(0, 0, 1, "bf16"),)))
    # 3 matrices of 10 x 20, 2 operations each: 1200 a pair, so a second; expert 1 has no pairs and is not read.
    np.testing.assert_allclose(cost.compute_s_R, [7, 3])
    # Rank 0 sends 2 rows of 20 bytes and receives 3; there and back.
    np.testing.assert_allclose(cost.exchange_s_R, [2 * (0.6 + 0.5)] * 2)
    np.testing.assert_allclose(cost.transfer_s_R, [12.5, 12.5])
    assert cost.layer_s == pytest.approx(7 + 2.2 + 12.5)


def test_few_pairs_wait_for_weights_and_low_bits_halve_that() -> None:
    for name, seconds in (("bf16", 2.0), ("int8", 1.0)):
        plan = DispatchPlan(Replicas.of([Replica(0, 0, name)]), np.array([[1]]))
        cost = Roofline(1e9, 600.0, 100.0, 0.5).layer(SHAPE).step(plan)
        assert cost.layer_s == pytest.approx(seconds)  # alone, a rank exchanges nothing


def test_nothing_to_do_costs_no_compute() -> None:
    plan = DispatchPlan(Replicas.of([Replica(0, 0, "bf16"), Replica(1, 1, "bf16")]), np.zeros((2, 2), np.int64))
    cost = MACHINES["h200"].layer(SHAPE).step(plan)
    assert not cost.compute_s_R.any()
    assert not cost.transfer_s_R.any()


def test_rates_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"link_bytes_per_s 0\.0"):
        Roofline(1.0, 1.0, 0.0, 0.0)
