"""Bounds on the rows that travel, and how rarely the host waits for a device."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.overrides import TorchFunctionMode

from rq_ep.core.plan import DispatchPlan
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.parallel import EPGroup, RoutingCounts, SoleHolders, receive_buffers, run_local
from rq_ep.parallel.reference import assign
from tests.parallel.test_exchange import computed, exchange, plans, tripled_where_routed

CPU = torch.device("cpu")


class Reads(TorchFunctionMode):
    """Counts what makes the host wait for a device: reading a tensor's values, or sizes that depend on them."""

    # `numpy` is not among them: it refuses what lies on a GPU.
    WAITING = frozenset(
        [
            "cpu", "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "bincount", "nonzero",
            "masked_select", "unique",
        ]
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.WAITING:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


def visits(plan: DispatchPlan, tokens_R: list[list[list[int]]]) -> np.ndarray:
    """[source, destination] tokens that have a pair there."""
    rows_RR = np.zeros((len(tokens_R),) * 2, np.int64)
    for source, tokens in enumerate(tokens_R):
        seen = {(pair.token, int(plan.replicas.ranks_P[pair.replica])) for pair in assign(tokens, plan, source)}
        for _, rank in seen:
            rows_RR[source, rank] += 1
    return rows_RR


@settings(max_examples=60, deadline=None)
@given(plans())
def test_no_more_rows_travel_than_the_routing_counts_allow(case: tuple[DispatchPlan, list[list[list[int]]]]) -> None:
    plan, tokens_R = case
    top_k = max((len(token) for tokens in tokens_R for token in tokens), default=1)
    num_experts = int(plan.replicas.experts_P.max()) + 1
    holders = SoleHolders.of(plan.replicas, num_experts, len(tokens_R), CPU)
    ids_R = [torch.tensor(tokens, dtype=torch.int64).reshape(-1, top_k) for tokens in tokens_R]
    for routing in run_local(len(tokens_R), lambda group: RoutingCounts.gather(ids_R[group.rank], holders, group)):
        counts = [np.bincount(ids_TK.flatten().numpy(), minlength=num_experts) for ids_TK in ids_R]
        assert np.array_equal(routing.counts_RE, np.stack(counts))
        if len(tokens_R) > 1:
            rows_RR, max_RR = visits(plan, tokens_R), routing.max_rows_RR(plan)
            assert (rows_RR <= max_RR).all()
            assert (max_RR <= plan.pairs_RR).all()
            if len(plan.replicas) == num_experts:
                assert np.array_equal(rows_RR, max_RR), "no expert is split: the numbers are exact"


def test_an_expert_that_is_lent_is_bounded_by_its_pairs() -> None:
    """Expert 0 of rank 0 is lent to rank 1 for all but one of its pairs."""
    resident = Replicas.of([Replica(0, 0, "fp32"), Replica(1, 1, "fp32")])
    holders = SoleHolders.of(resident, 2, 2, CPU)
    ids_R = [torch.tensor([[0, 1], [0, 1], [0, 0]]), torch.tensor([[0, 1]])]
    replicas, _ = resident.joined([Replica(1, 0, "fp32")], ())
    plan = DispatchPlan(replicas, np.array([[1, 3, 2], [0, 1, 1]]))
    routing = run_local(2, lambda group: RoutingCounts.gather(ids_R[group.rank], holders, group))[0]
    assert routing.tokens_RR.tolist() == [[3, 2], [1, 1]]
    assert routing.max_rows_RR(plan).tolist() == [[1, 5], [0, 2]]


def test_memory_for_rows_at_95_to_1_is_that_of_a_balanced_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, under standard EP: nearly all tokens go to rank 0, and it holds hardly more than when it is idle."""
    monkeypatch.setitem(receive_buffers.MIN_DISPATCH_BYTES, "cpu", 0)
    num_ranks, num_tokens, top_k, num_experts, size = 8, 400, 4, 32, 16
    replicas = Replicas.of([Replica(e * num_ranks // num_experts, e, "fp32") for e in range(num_experts)])
    holders = SoleHolders.of(replicas, num_experts, num_ranks, CPU)
    random = np.random.default_rng(0)
    hidden_RTD = torch.randn(num_ranks, num_tokens, size)
    weights_TK = torch.ones(num_tokens, top_k)

    def peak(ids_RTK: np.ndarray) -> int:
        def main(group: EPGroup) -> int:
            ids_TK = torch.from_numpy(ids_RTK[group.rank])
            routing = RoutingCounts.gather(ids_TK, holders, group)
            plan = DispatchPlan(replicas, routing.counts_RE[:, replicas.experts_P])
            handle = exchange(group, max_padded_bytes=0).dispatch(
                hidden_RTD[group.rank], ids_TK, weights_TK, plan, routing
            )
            computed(handle, tripled_where_routed)
            return group.receive_buffers.nbytes

        return max(run_local(num_ranks, main))

    balanced_RTK = random.random((num_ranks, num_tokens, num_experts)).argsort(-1)[..., :top_k]
    skewed_RTK = np.where(random.random(balanced_RTK.shape) < 0.95, 0, balanced_RTK)
    assert peak(balanced_RTK) > (1 + 2) * num_tokens * size * 4, "a balanced step comes whole"
    assert peak(skewed_RTK) <= 1.15 * peak(balanced_RTK)


@pytest.mark.parametrize(
    ("changes", "reads"),
    [
        ({}, 0),  # one message
        ({"max_padded_bytes": 0, "counts_rows": False}, 0),
        ({"max_padded_bytes": 0, "counts_rows": False, "overlaps": True}, 0),
        ({"max_padded_bytes": 0, "counts_rows": False, "max_dispatch_bytes": 64}, 1),
        ({"max_padded_bytes": 0, "counts_rows": True}, 1),
    ],
    ids=str,
)
def test_the_host_reads_what_the_device_has_once(changes: dict[str, Any], reads: int) -> None:
    """The routing counts are one reading; the exchange adds one where rows come in parts, or where it counts them."""
    replicas = Replicas.of([Replica(e % 2, e, "fp32") for e in range(4)] + [Replica(1, 0, "fp32")])
    holders = SoleHolders.of(replicas, 4, 2, CPU)
    ids_TK = torch.tensor([[0, 1], [1, 2], [3, 0], [0, 2]])

    def main(group: EPGroup) -> Counter[str]:
        with Reads() as device:
            routing = RoutingCounts.gather(ids_TK, holders, group)
            pairs_RP = routing.counts_RE[:, replicas.experts_P]
            pairs_RP[:, (replicas.experts_P == 0) & (replicas.ranks_P == 0)] = 0
            plan = DispatchPlan(replicas, pairs_RP)
            handle = exchange(group, **changes).dispatch(torch.ones(4, 8), ids_TK, torch.ones(4, 2), plan, routing)
            computed(handle, tripled_where_routed)
        return device.reads

    for counted in run_local(2, main):
        assert counted == {"cpu": 1 + reads}
