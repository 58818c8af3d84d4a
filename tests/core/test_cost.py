"""Modelled seconds of hand-made steps."""

import numpy as np
import pytest

from rq_ep.core.cost import LayerCost
from rq_ep.core.plan import DispatchPlan, WeightTransfer
from rq_ep.core.replicas import Replica, Replicas

COST = LayerCost(
    pair_s={"bf16": 1.0}, stream_s={"bf16": 0.0}, transfer_s={"bf16": 10.0, "int8": 5.0}, row_s=0.0, latency_s=2.0
)


@pytest.mark.parametrize(
    ("transfers", "expected_R"),
    [
        ([], [0, 0, 0, 0]),
        ([(0, 0, 1, "bf16")], [12, 12, 0, 0]),
        ([(0, 0, 1, "bf16"), (0, 0, 2, "bf16"), (0, 0, 3, "int8")], [27, 27, 27, 27]),  # all wait for rank 0
        ([(0, 0, 2, "bf16"), (1, 1, 2, "bf16")], [12, 12, 22, 0]),  # rank 2 for its own link
        ([(0, 0, 1, "bf16"), (1, 1, 0, "int8"), (0, 0, 2, "bf16")], [22, 22, 22, 0]),  # both ways at once
    ],
)
def test_a_transfer_lasts_as_long_as_the_busier_of_its_links(
    transfers: list[tuple[int, int, int, str]], expected_R: list[float]
) -> None:
    replicas = Replicas.of([Replica(rank, rank, "bf16") for rank in range(4)])
    plan = DispatchPlan(replicas, np.zeros((4, 4), np.int64), tuple(WeightTransfer(*each) for each in transfers))
    np.testing.assert_array_equal(COST.step(plan).transfer_s_R, expected_R)


def test_a_round_begins_when_the_earlier_ones_of_its_ranks_have_ended() -> None:
    replicas = Replicas.of([Replica(rank, rank, "bf16") for rank in range(4)])
    tree = (WeightTransfer(0, 0, 1, "bf16"), WeightTransfer(0, 0, 2, "bf16", 1), WeightTransfer(0, 1, 3, "int8", 1))
    plan = DispatchPlan(replicas, np.zeros((4, 4), np.int64), tree)
    np.testing.assert_array_equal(COST.step(plan).transfer_s_R, [24, 19, 24, 19])
    late = DispatchPlan(replicas, np.zeros((4, 4), np.int64), (*tree, WeightTransfer(3, 3, 2, "bf16", 2)))
    np.testing.assert_array_equal(COST.step(late).transfer_s_R, [24, 19, 36, 31])
