"""How many rows travel at most, and how rarely the host waits to learn it."""

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
from rq_ep.parallel import Exchange, Homes, run_local
from rq_ep.parallel import receive_buffers as room
from rq_ep.parallel.reference import assign
from tests.parallel.test_exchange import computed, plans, tripled_where_asked

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
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.WAITING:
            self.found[name] += 1
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
def test_no_more_rows_travel_than_the_census_allows(case: tuple[DispatchPlan, list[list[list[int]]]]) -> None:
    plan, tokens_R = case
    top_k = max((len(token) for tokens in tokens_R for token in tokens), default=1)
    num_experts = int(plan.replicas.experts_P.max()) + 1
    homes = Homes.of(plan.replicas, num_experts, len(tokens_R), CPU)
    ids_R = [torch.tensor(tokens, dtype=torch.int64).reshape(-1, top_k) for tokens in tokens_R]
    for census in run_local(len(tokens_R), lambda group: homes.census(ids_R[group.rank], group)):
        counts = [np.bincount(ids_TK.flatten().numpy(), minlength=num_experts) for ids_TK in ids_R]
        assert np.array_equal(census.counts_RE, np.stack(counts))
        if len(tokens_R) > 1:
            rows_RR, most_RR = visits(plan, tokens_R), census.most_rows_RR(plan)
            assert (rows_RR <= most_RR).all()
            assert (most_RR <= plan.pairs_RR).all()
            if len(plan.replicas) == num_experts:
                assert np.array_equal(rows_RR, most_RR), "no expert is split: the numbers are exact"


def test_an_expert_that_is_lent_is_bounded_by_its_pairs() -> None:
    """Expert 0 of rank 0 is lent to rank 1 for all but one of its pairs."""
    resident = Replicas.of([Replica(0, 0, "fp32"), Replica(1, 1, "fp32")])
    homes = Homes.of(resident, 2, 2, CPU)
    ids_R = [torch.tensor([[0, 1], [0, 1], [0, 0]]), torch.tensor([[0, 1]])]
    replicas, _ = resident.joined([Replica(1, 0, "fp32")], ())
    plan = DispatchPlan(replicas, np.array([[1, 3, 2], [0, 1, 1]]))
    census = run_local(2, lambda group: homes.census(ids_R[group.rank], group))[0]
    assert census.tokens_RR.tolist() == [[3, 2], [1, 1]]
    assert census.most_rows_RR(plan).tolist() == [[1, 5], [0, 2]]


def test_memory_for_rows_at_95_to_1_is_that_of_a_balanced_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, under standard EP: nearly all tokens go to rank 0, and it holds hardly more than when it is idle."""
    monkeypatch.setitem(room.MIN_DISPATCH_BYTES, "cpu", 0)
    num_ranks, num_tokens, top_k, num_experts, size = 8, 400, 4, 32, 16
    replicas = Replicas.of([Replica(e * num_ranks // num_experts, e, "fp32") for e in range(num_experts)])
    homes = Homes.of(replicas, num_experts, num_ranks, CPU)
    random = np.random.default_rng(0)
    hidden_RTD = torch.randn(num_ranks, num_tokens, size)
    weights_TK = torch.ones(num_tokens, top_k)

    def peak(ids_RTK: np.ndarray) -> int:
        def main(group: Any) -> int:
            ids_TK = torch.from_numpy(ids_RTK[group.rank])
            census = homes.census(ids_TK, group)
            plan = DispatchPlan(replicas, census.counts_RE[:, replicas.experts_P])
            trip = Exchange(group, max_padded_bytes=0).dispatch(
                hidden_RTD[group.rank], ids_TK, weights_TK, plan, census
            )
            computed(trip, tripled_where_asked)
            trip.combine()
            return group.room.nbytes

        return max(run_local(num_ranks, main))

    balanced_RTK = random.random((num_ranks, num_tokens, num_experts)).argsort(-1)[..., :top_k]
    skewed_RTK = np.where(random.random(balanced_RTK.shape) < 0.95, 0, balanced_RTK)
    assert peak(balanced_RTK) > (1 + 2) * num_tokens * size * 4, "a balanced step comes whole"
    assert peak(skewed_RTK) <= 1.15 * peak(balanced_RTK)


@pytest.mark.parametrize(
    ("settings_", "reads"),
    [
        ({}, 0),  # one message
        ({"max_padded_bytes": 0, "learns_rows": False}, 0),
        ({"max_padded_bytes": 0, "learns_rows": False, "overlaps": True}, 0),
        ({"max_padded_bytes": 0, "learns_rows": False, "max_dispatch_bytes": 64}, 1),
        ({"max_padded_bytes": 0, "learns_rows": True}, 1),
    ],
    ids=str,
)
def test_the_host_reads_what_the_device_has_once(settings_: dict[str, Any], reads: int) -> None:
    """The census is one reading; the exchange adds one where rows come in parts, or where it is asked to learn them."""
    replicas = Replicas.of([Replica(e % 2, e, "fp32") for e in range(4)] + [Replica(1, 0, "fp32")])
    homes = Homes.of(replicas, 4, 2, CPU)
    ids_TK = torch.tensor([[0, 1], [1, 2], [3, 0], [0, 2]])

    def main(group: Any) -> Counter[str]:
        ways = Exchange(group, **settings_)
        with Reads() as device:
            census = homes.census(ids_TK, group)
            pairs_RP = census.counts_RE[:, replicas.experts_P]
            pairs_RP[:, (replicas.experts_P == 0) & (replicas.ranks_P == 0)] = 0
            trip = ways.dispatch(torch.ones(4, 8), ids_TK, torch.ones(4, 2), DispatchPlan(replicas, pairs_RP), census)
            computed(trip, tripled_where_asked)
            trip.combine()
        return device.found

    for found in run_local(2, main):
        assert found == {"cpu": 1 + reads}
