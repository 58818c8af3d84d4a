"""The rows that each rank receives: hand-made cases, and the list-based reference on random plans."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_ep.core.plan import DispatchPlan
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.parallel import Combine, DispatchHandle, EPGroup, Exchange, ExchangeSettings, Received, run_local
from rq_ep.parallel.permute import Route, SentRows, block_order, pairs_by_replica
from rq_ep.parallel.reference import assign
from rq_ep.parallel.row_parts import Part, PartLimit, split_part


def test_pairs_fill_replicas_in_the_order_of_ranks() -> None:
    """Expert 5 on ranks 0 and 1, expert 2 on rank 1: of rank 0's three pairs of 5, the first goes to rank 0."""
    replicas = Replicas.of([Replica(0, 5, "fp32"), Replica(1, 2, "fp32"), Replica(1, 5, "fp32")])
    plan = DispatchPlan(replicas, np.array([[1, 1, 2], [0, 0, 0]]))
    ids_TK = torch.tensor([[5, 2], [5, 5]])
    assert pairs_by_replica(ids_TK, torch.rand(2, 2), plan, 0).tolist() == [0, 1, 2, 3]
    assert assign(ids_TK.tolist(), plan, 0) == [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 2)]


def test_the_lowest_gates_go_to_the_fewest_bits() -> None:
    """Expert 0 in fp32 on rank 0 and in int8 on rank 1; expert 1 shares one format and keeps the order of its pairs."""
    held = [Replica(0, 0, "fp32"), Replica(0, 1, "fp32"), Replica(1, 0, "int8"), Replica(1, 1, "fp32")]
    plan = DispatchPlan(Replicas.of(held, ("int8", "fp32")), np.array([[1, 1, 2, 1], [0, 0, 0, 0]]))
    ids_TK = torch.tensor([[0], [1], [0], [1], [0]])
    weights_TK = torch.tensor([[0.5], [0.9], [0.1], [0.2], [0.3]])
    assert pairs_by_replica(ids_TK, weights_TK, plan, 0).tolist() == [0, 1, 2, 4, 3]
    assignments = assign(ids_TK.tolist(), plan, 0, weights_TK.tolist())
    assert assignments == [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 0, 3), (4, 0, 2)]


@pytest.mark.parametrize("seed", range(8))
def test_mixed_formats_follow_the_reference(seed: int) -> None:
    random = np.random.default_rng(seed)
    num_experts, num_ranks = 4, 3
    held = [
        Replica(rank, expert, str(random.choice(["int8", "bf16", "fp32"])))
        for expert in range(num_experts)
        for rank in random.permutation(num_ranks)[: random.integers(1, num_ranks + 1)].tolist()
    ]
    replicas = Replicas.of(held, ("int8", "bf16", "fp32"))
    ids_TK = torch.from_numpy(random.integers(num_experts, size=(9, 3)))
    weights_TK = torch.from_numpy(random.integers(4, size=(9, 3)) / 8).bfloat16()  # with ties
    pairs_RP = np.zeros((num_ranks, len(replicas)), np.int64)
    for expert in ids_TK.flatten().tolist():
        pairs_RP[1, random.choice(np.flatnonzero(replicas.experts_P == expert))] += 1
    plan = DispatchPlan(replicas, pairs_RP)
    replica_N = np.repeat(np.arange(len(replicas)), pairs_RP[1])
    pairs = zip(pairs_by_replica(ids_TK, weights_TK, plan, 1).tolist(), replica_N.tolist(), strict=True)
    expected = assign(ids_TK.tolist(), plan, 1, weights_TK.tolist())
    assert sorted(pairs) == [(pair.token * 3 + pair.k, pair.replica) for pair in expected]


def test_blocks_change_their_order() -> None:
    index = block_order(np.array([2, 0, 3]), np.array([2, 1, 0]), torch.device("cpu"))
    assert index.tolist() == [2, 3, 4, 0, 1]


# Ways to move the rows; the bound on parts is a row or two of these tests.
MODES: dict[str, dict[str, Any]] = {
    "one message": {},
    "rows": {"max_padded_bytes": 0},
    "bounded rows": {"max_padded_bytes": 0, "counts_rows": False},
    "parts": {"max_padded_bytes": 0, "max_dispatch_bytes": 16},
    "overlapping": {"max_padded_bytes": 0, "overlaps": True},
    "overlapping parts": {"max_padded_bytes": 0, "max_dispatch_bytes": 16, "overlaps": True},
    "bounded parts": {"max_padded_bytes": 0, "max_dispatch_bytes": 16, "overlaps": True, "counts_rows": False},
}


def exchange(group: EPGroup, **changes: Any) -> Exchange:
    """An exchange with other settings than suit the group's device."""
    return Exchange(group, replace(ExchangeSettings.for_device(group.device.type), **changes))


def computed(
    handle: DispatchHandle, compute: Callable[[Received], torch.Tensor]
) -> tuple[list[Received], torch.Tensor]:
    """What was received, part by part, copied out of its buffers; and the combined output."""
    parts = []
    combine = Combine(handle)
    for received in handle:
        parts.append(replace(received, rows_MD=received.rows_MD.clone()))
        combine.send_back(compute(received))
    return parts, combine.output()


def ones_where_routed(received: Received) -> torch.Tensor:
    """1 for every row that has a pair, in the place of weighted sums."""
    return torch.zeros_like(received.rows_MD).index_fill_(0, received.row_N, 1)


def tripled_where_routed(received: Received) -> torch.Tensor:
    return received.rows_MD * 3 * ones_where_routed(received)


def test_a_route_and_its_rows_follow_from_ids_and_plan() -> None:
    """Rank 0 holds expert 0, rank 1 experts 1 and 2. Both pairs of rank 0's first token share a row."""
    replicas = Replicas.of([Replica(0, 0, "fp32"), Replica(1, 1, "fp32"), Replica(1, 2, "fp32")])
    plan = DispatchPlan(replicas, np.array([[2, 3, 1], [1, 0, 1]]))
    ids_TK, weights_TK = torch.tensor([[1, 2], [0, 0], [1, 1]]), torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    route = Route.of(ids_TK, weights_TK, plan, 0)
    assert route.experts == (0,)
    assert route.own.pairs_J.tolist() == [2]
    assert route.own.metadata_N2[:, 0].tolist() == [1, 1]
    assert route.token_N.tolist() == [0, 2, 2, 0]  # expert 1, then expert 2
    assert torch.equal(route.weight_bits_N.view(torch.float32), torch.tensor([0.1, 0.5, 0.6, 0.2]))
    assert (route.pairs_out_R.tolist(), route.pairs_in_R.tolist()) == ([0, 4], [0, 1])
    assert route.pairs_RJ.tolist() == [[0], [1]]
    rows = SentRows.of(route, len(ids_TK))
    assert rows.row_N.tolist() == [0, 1, 1, 0]
    assert rows.counts_R.tolist() == [0, 2]
    assert rows.tokens(np.array([0, 2])).tolist() == [0, 2]
    assert rows.tokens(np.array([0, 4])).tolist() == [0, 2, 0, 0], "a slot without a row says 0"


@pytest.mark.parametrize("num_tokens", [0, 1, 2])
def test_rows_of_an_odd_size_travel_in_one_message(num_tokens: int) -> None:
    """Three 16-bit numbers a row: behind one, metadata begins where no int32 may."""
    replicas = Replicas.of([Replica(0, 0, "bf16"), Replica(1, 1, "bf16")])
    plan = DispatchPlan(replicas, np.array([[0, num_tokens], [0, 0]]))

    def main(group: EPGroup) -> torch.Tensor:
        ids_TK = torch.ones(num_tokens if group.rank == 0 else 0, 1, dtype=torch.int64)
        hidden_TD = torch.arange(3 * len(ids_TK)).reshape(-1, 3).bfloat16()
        handle = exchange(group).dispatch(hidden_TD, ids_TK, torch.ones(ids_TK.shape), plan)
        return computed(handle, lambda received: tripled_where_routed(received).float())[1]

    assert run_local(2, main)[0].tolist() == (3 * torch.arange(3 * num_tokens)).reshape(-1, 3).tolist()


def test_a_token_travels_once_to_a_rank_with_several_of_its_experts() -> None:
    replicas = Replicas.of([Replica(0, 0, "fp32"), Replica(1, 1, "fp32"), Replica(1, 2, "fp32")])
    ids_RTK = [torch.tensor([[1, 2], [0, 1], [1, 1]]), torch.tensor([[0, 2]])]
    counts_RE = np.stack([np.bincount(ids_TK.flatten(), minlength=3) for ids_TK in ids_RTK])
    plan = DispatchPlan(replicas, counts_RE)

    def main(group: EPGroup) -> tuple[Any, torch.Tensor, dict[str, int]]:
        ids_TK = ids_RTK[group.rank]
        hidden_TD = torch.arange(len(ids_TK)).float()[:, None] + 10 * group.rank
        weights_TK = torch.ones(ids_TK.shape) * torch.tensor([1.0, 2.0])
        handle = exchange(group, max_padded_bytes=0).dispatch(hidden_TD, ids_TK, weights_TK, plan)
        (received,), out_TD = computed(handle, lambda received: received.rows_MD.clone())
        return received, out_TD, handle.received_bytes

    (first, first_out, first_bytes), (second, second_out, second_bytes) = run_local(2, main)
    assert first.rows_MD.flatten().tolist() == [0, 1, 2, 10]  # its own tokens, then rank 1's
    assert first.experts == (0,)
    assert first.row_N.tolist() == [1, 3]
    assert first.weight_N.tolist() == [1, 1]
    assert second.rows_MD.flatten().tolist() == [10, 0, 1, 2]  # its own, then three of rank 0's, each once
    assert second.experts == (1, 2)
    assert second.offsets == (0, 4, 6)
    assert second.row_N.tolist() == [1, 2, 3, 3, 1, 0]  # expert 1: tokens 0, 1, 2, 2 of rank 0; expert 2: source 0, 1
    assert second.weight_N.tolist() == [1, 2, 1, 2, 2, 2]
    assert first_out.flatten().tolist() == [0, 2, 4]  # its own row, and what every visited rank returned
    assert second_out.flatten().tolist() == [20]
    assert first_bytes == {"dispatch": 4 + 8, "combine": 3 * 4}
    assert second_bytes == {"dispatch": 3 * 4 + 5 * 8, "combine": 4}


def test_rows_are_split_into_equal_runs_with_their_pairs() -> None:
    """Three rows go to rank 1 and four come from it, in two parts: runs of two rows, with their pairs."""
    metadata_N2 = torch.tensor([[0, 10], [2, 11], [3, 12], [1, 13], [2, 14]], dtype=torch.int32)
    whole = Part(
        tokens=torch.tensor([7, 8, 9]), rows_out=[0, 3], rows_in=[0, 4], metadata_N2=metadata_N2,
        pairs_RJ=np.array([[0, 0], [3, 2]]),
    )  # fmt: skip
    first, second = split_part(whole, 2)
    assert (first.tokens.tolist(), second.tokens.tolist()) == ([7, 8], [9])
    assert (first.rows_out, first.rows_in) == ([0, 2], [0, 2])
    assert (second.rows_out, second.rows_in) == ([0, 1], [0, 2])
    assert (first.metadata_N2.tolist(), first.pairs_RJ.tolist()) == ([[0, 10], [1, 13]], [[0, 0], [1, 1]])
    assert (second.metadata_N2.tolist(), second.pairs_RJ.tolist()) == ([[0, 11], [1, 12], [0, 14]], [[0, 0], [2, 1]])


@pytest.mark.parametrize(("overlaps", "num_parts"), [(False, 3), (True, 5)])
def test_parts_are_as_many_as_the_fullest_rank_needs(overlaps: bool, num_parts: int) -> None:
    limit = PartLimit(max_bytes=80, row_bytes=8, overlaps=overlaps)
    assert limit.num_parts(np.array([[0, 5], [10, 0]])) == 1
    assert limit.num_parts(np.array([[0, 5, 0], [10, 0, 0], [15, 0, 0]])) == num_parts


@st.composite
def plans(draw: st.DrawFn) -> tuple[DispatchPlan, list[list[list[int]]]]:
    num_ranks, num_experts, top_k = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    ids = st.lists(st.integers(0, num_experts - 1), min_size=top_k, max_size=top_k)
    tokens_R = [draw(st.lists(ids, max_size=6)) for _ in range(num_ranks)]
    holders = st.sets(st.integers(0, num_ranks - 1), min_size=1)
    replicas = Replicas.of(Replica(rank, e, "fp32") for e in range(num_experts) for rank in draw(holders))
    pairs_RP = np.zeros((num_ranks, len(replicas)), np.int64)
    for rank, tokens in enumerate(tokens_R):
        for expert in (expert for token in tokens for expert in token):
            pairs_RP[rank, draw(st.sampled_from(np.flatnonzero(replicas.experts_P == expert).tolist()))] += 1
    return DispatchPlan(replicas, pairs_RP), tokens_R


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=40, deadline=None)
@given(plans())
def test_every_pair_arrives_once_where_the_reference_sends_it(
    mode: str, case: tuple[DispatchPlan, list[list[list[int]]]]
) -> None:
    plan, tokens_R = case
    top_k = max((len(token) for tokens in tokens_R for token in tokens), default=1)

    def main(group: EPGroup) -> tuple[list[Any], torch.Tensor]:
        ids_TK = torch.tensor(tokens_R[group.rank], dtype=torch.int64).reshape(-1, top_k)
        token_T = torch.arange(len(ids_TK))
        hidden_TD = torch.stack([torch.full_like(token_T, group.rank), token_T], 1).float()
        weights_TK = torch.arange(ids_TK.numel()).reshape(ids_TK.shape).float()  # says which pair it is
        handle = exchange(group, **MODES[mode]).dispatch(hidden_TD, ids_TK, weights_TK, plan)
        return computed(handle, ones_where_routed)

    arrived, expected = [], []
    for rank, (parts, out_TD) in enumerate(run_local(len(tokens_R), main)):
        computed_rows = []
        for received in parts:
            in_part = []
            for j, replica in enumerate(plan.replicas.on_rank(rank)):
                for n in range(received.offsets[j], received.offsets[j + 1]):
                    source, token = received.rows_MD[received.row_N[n]].int().tolist()
                    in_part.append((replica, source, token, int(received.weight_N[n])))
            by_weight = [(replica, source, weight) for replica, source, _, weight in in_part]
            assert by_weight == sorted(by_weight), "pairs are not in the order of replica, source, (token, k)"
            arrived += in_part
            computed_rows += [tuple(received.rows_MD[row].tolist()) for row in set(received.row_N.tolist())]
        assert len(set(computed_rows)) == len(computed_rows), "a row was summed twice"
        assignments = assign(tokens_R[rank], plan, rank)
        expected += [(pair.replica, rank, pair.token, pair.token * top_k + pair.k) for pair in assignments]
        visited = [
            {int(plan.replicas.ranks_P[p]) for token, _, p in assignments if token == t} for t in range(len(out_TD))
        ]
        assert out_TD[:, 0].tolist() == [len(ranks) for ranks in visited]
    assert sorted(arrived) == sorted(expected)


@pytest.mark.parametrize("overlaps", [False, True])
def test_memory_for_rows_stays_within_its_bound_at_one_hot_expert(overlaps: bool) -> None:
    """Every token of four ranks goes to rank 0: it computes them all, and holds no more than it is allowed to."""
    num_ranks, num_tokens, size = 4, 200, 8
    replicas = Replicas.of([Replica(rank, rank, "fp32") for rank in range(num_ranks)])
    hidden_RTD = torch.randn(num_ranks, num_tokens, size)
    ids_TK = torch.zeros(num_tokens, 1, dtype=torch.int64)
    plan = DispatchPlan(replicas, np.array([[num_tokens, 0, 0, 0]] * num_ranks))
    max_rows = 90

    def main(group: EPGroup) -> tuple[list[int], int, torch.Tensor]:
        limit = max_rows * size * 4
        for _ in range(2):
            handle = exchange(group, max_padded_bytes=0, max_dispatch_bytes=limit, overlaps=overlaps).dispatch(
                hidden_RTD[group.rank], ids_TK, torch.ones(num_tokens, 1), plan
            )
            parts, out_TD = computed(handle, tripled_where_routed)
        assert handle.max_rows_held <= max_rows
        return [len(received.rows_MD) for received in parts], group.receive_buffers.nbytes, out_TD

    for rank, (num_rows, nbytes, out_TD) in enumerate(run_local(num_ranks, main)):
        own = num_tokens
        if rank == 0:
            assert sum(num_rows) == num_ranks * num_tokens
            assert len(num_rows) == (15 if overlaps else 7)
            assert max(num_rows[1:]) <= max_rows
            assert num_rows[0] <= own + max_rows
        assert nbytes <= (max_rows if overlaps else own + max_rows) * size * 4
        assert torch.equal(out_TD, hidden_RTD[rank] * 3)


@pytest.mark.parametrize(("counts_rows", "num_parts"), [(True, 1), (False, 2)])
def test_rows_that_repeat_are_not_split_for_their_pairs(counts_rows: bool, num_parts: int) -> None:
    """Two ranks hold all of four experts. Four pairs go to rank 1, which are two rows, as many as it may hold."""
    replicas = Replicas.of([Replica(rank, expert, "fp32") for rank in range(2) for expert in range(4)])
    plan = DispatchPlan(replicas, np.array([[0, 0, 2, 2, 2, 2, 0, 0], [0] * 8]))
    ids_RTK = [torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]]), torch.zeros(0, 2, dtype=torch.int64)]

    def main(group: EPGroup) -> tuple[int, torch.Tensor]:
        ids_TK = ids_RTK[group.rank]
        handle = exchange(group, max_padded_bytes=0, max_dispatch_bytes=2 * 4, counts_rows=counts_rows).dispatch(
            torch.ones(len(ids_TK), 1), ids_TK, torch.ones(ids_TK.shape), plan
        )
        parts, out_TD = computed(handle, tripled_where_routed)
        return len(parts), out_TD

    (parts, out_TD), (other_parts, _) = run_local(2, main)
    assert parts == other_parts == num_parts
    assert out_TD.flatten().tolist() == [3, 3, 3, 3]


def test_a_plan_for_other_counts_is_caught_before_anything_is_sent() -> None:
    plan = DispatchPlan(Replicas.of([Replica(0, 0, "fp32")]), np.array([[3]]))
    with pytest.raises(AssertionError, match="plan for 3 of 2 pairs"):
        pairs_by_replica(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), plan, 0)
