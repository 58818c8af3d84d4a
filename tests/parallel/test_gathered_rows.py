"""Small steps whose rows go to all ranks: pairs and order of the usual dispatch, and the list-based reference."""

from typing import Any

import numpy as np
import pytest
import torch

from rq_ep.core.plan import DispatchPlan
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.parallel import Combine, EPGroup, Exchange, GatheredRows, Received, run_local
from rq_ep.parallel.reference import assign

NUM_RANKS, NUM_EXPERTS, TOP_K, SIZE = 3, 5, 3, 6


def random_plan(random: np.random.Generator, ids_RTK: list[torch.Tensor], mixes: bool) -> DispatchPlan:
    """Experts on one to three ranks; each pair goes to any of its expert's replicas."""
    formats = ("int8", "bf16") if mixes else ("bf16",)
    held = [
        Replica(rank, expert, str(random.choice(formats)))
        for expert in range(NUM_EXPERTS)
        for rank in random.permutation(NUM_RANKS)[: random.integers(1, NUM_RANKS + 1)].tolist()
    ]
    replicas = Replicas.of(held, formats if mixes else ())
    pairs_RP = np.zeros((NUM_RANKS, len(replicas)), np.int64)
    for source, ids_TK in enumerate(ids_RTK):
        for expert in ids_TK.flatten().tolist():
            pairs_RP[source, random.choice(np.flatnonzero(replicas.experts_P == expert))] += 1
    return DispatchPlan(replicas, pairs_RP)


def summed(received: Received) -> torch.Tensor:
    """The sum of each row's weights times the row."""
    partial_MD = torch.zeros(received.rows_MD.shape)
    values_ND = received.rows_MD[received.row_N].float() * received.weight_N[:, None]
    return partial_MD.index_add_(0, received.row_N, values_ND)


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("rows_R", [(4, 0, 6), (1, 1, 1), (0, 0, 0), (0, 9, 0)], ids=str)
def test_pairs_are_those_of_the_reference_in_the_order_of_the_usual_dispatch(
    rows_R: tuple[int, ...], mixes: bool
) -> None:
    random = np.random.default_rng(sum(rows_R))
    for _ in range(4):
        ids_RTK = [torch.from_numpy(random.integers(NUM_EXPERTS, size=(rows, TOP_K))) for rows in rows_R]
        weights_RTK = [torch.from_numpy(random.integers(1, 5, size=(rows, TOP_K)) / 8).bfloat16() for rows in rows_R]
        hidden_RTD = [torch.from_numpy(random.standard_normal((rows, SIZE))).bfloat16() for rows in rows_R]
        plan = random_plan(random, ids_RTK, mixes)

        def main(
            group: EPGroup, ids_RTK: Any = ids_RTK, weights_RTK: Any = weights_RTK, hidden_RTD: Any = hidden_RTD,
            plan: DispatchPlan = plan,
        ) -> tuple[np.ndarray, list[Received], list[torch.Tensor]]:  # fmt: skip
            step = hidden_RTD[group.rank], ids_RTK[group.rank], weights_RTK[group.rank]
            gathered = GatheredRows.gather(*step, np.array(rows_R), group)
            received = gathered.received(plan)
            out_TD = gathered.combine(summed(received))
            handle = Exchange(group).dispatch(*step, plan)
            combine = Combine(handle)
            (usual,) = handle
            combine.send_back(summed(usual))
            return gathered.counts_RE(NUM_EXPERTS), [received, usual], [out_TD, combine.output()]

        computed = []
        for rank, (counts_RE, (received, usual), (out_TD, usual_TD)) in enumerate(run_local(NUM_RANKS, main)):
            assert np.array_equal(
                counts_RE, [np.bincount(ids_TK.flatten(), minlength=NUM_EXPERTS) for ids_TK in ids_RTK]
            )
            assert (received.experts, received.offsets) == (usual.experts, usual.offsets)
            assert torch.equal(received.rows_MD[received.row_N], usual.rows_MD[usual.row_N])
            assert torch.equal(received.weight_N, usual.weight_N)
            assert torch.equal(out_TD, usual_TD), "the sums have the same bits"
            first_p = plan.replicas.on_rank(rank).start
            for j, (start, end) in enumerate(zip(received.offsets, received.offsets[1:], strict=False)):
                computed += [(first_p + j, row) for row in received.row_N[start:end].tolist()]
        first_row_R = np.cumsum(rows_R) - rows_R
        expected = [
            (pair.replica, int(first_row_R[source]) + pair.token)
            for source in range(NUM_RANKS)
            for pair in assign(ids_RTK[source].tolist(), plan, source, weights_RTK[source].tolist())
        ]
        assert sorted(computed) == sorted(expected)


def test_ranks_that_are_no_members_are_left_out() -> None:
    """Rank 1 of three is a hole. Expert 0 is on rank 0, expert 1 on rank 2; each row chooses both."""
    plan = DispatchPlan(Replicas.of([Replica(0, 0, "fp32"), Replica(2, 1, "fp32")]), np.array([[2, 2], [0, 0], [1, 1]]))
    rows_R = np.array([2, 0, 1])

    def main(group: EPGroup) -> tuple[list[int], list[float]]:
        hidden_TD = torch.full((int(rows_R[group.rank]), 4), 1.0 + group.rank)
        ids_TK, weights_TK = torch.tensor([[0, 1]] * len(hidden_TD)), torch.tensor([[1.0, 10.0]] * len(hidden_TD))
        gathered = GatheredRows.gather(hidden_TD, ids_TK, weights_TK, rows_R, group)
        received = gathered.received(plan)
        return received.row_N.tolist(), gathered.combine(summed(received))[:, 0].tolist()

    assert run_local(3, main, members=(0, 2)) == [([0, 1, 2], [11.0, 11.0]), ([0, 1, 2], [33.0])]


def test_a_plan_for_other_counts_is_caught() -> None:
    plan = DispatchPlan(Replicas.of([Replica(0, 0, "fp32"), Replica(0, 1, "fp32")]), np.array([[2, 0]]))
    ids_TK = torch.tensor([[0], [1]])

    def main(group: EPGroup) -> None:
        GatheredRows.gather(torch.ones(2, 4), ids_TK, torch.ones(2, 1), np.array([2]), group).received(plan)

    with pytest.raises(AssertionError, match="fewer pairs of an expert"):
        run_local(1, main)


def test_a_rank_with_other_rows_than_it_announced_is_caught_before_anything_is_sent() -> None:
    def main(group: EPGroup) -> None:
        GatheredRows.gather(
            torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), np.array([1, 2]), group
        )

    with pytest.raises(AssertionError, match="2 rows: rank 0 announced"):
        run_local(2, main)
