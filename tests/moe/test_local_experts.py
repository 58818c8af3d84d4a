"""All ranks in one module, and their telemetry."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rq_ep.core.errors import UserError
from rq_ep.moe import EPExperts, LocalExperts, Telemetry
from rq_ep.parallel import EPGroup, LocalWorld, RankFailure, single_group
from tests.moe import cases

FAMILY = cases.FAMILIES["gated"]


def local(num_ranks: int, num_experts: int, telemetry: Telemetry | None = None) -> LocalExperts:
    counts_RE = np.ones((num_ranks, num_experts), np.int64)
    layer, planner, _ = cases.planned("standard", {}, FAMILY, counts_RE)
    experts = LocalExperts(FAMILY, layer, planner, num_ranks, telemetry=telemetry)
    for rank in experts.ranks:
        cases.fill(rank, cases.expert_weights(FAMILY, num_experts))
    return experts


@pytest.mark.parametrize("num_tokens", [0, 1, 10])
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_equals_the_dense_layer_for_any_number_of_rows(num_ranks: int, num_tokens: int) -> None:
    random = torch.Generator().manual_seed(num_tokens)
    hidden_TD = torch.randn(num_tokens, cases.D, generator=random)
    batch = cases.Batch(hidden_TD, torch.randint(6, (num_tokens, 2), generator=random), torch.rand(num_tokens, 2))
    out_TD = local(num_ranks, 6)(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
    cases.check_close(out_TD, cases.expected(FAMILY, cases.expert_weights(FAMILY, 6), batch))


def test_telemetry_has_loads_times_and_bytes_of_every_rank() -> None:
    telemetry = Telemetry()
    experts = local(3, 6, telemetry)
    batch = cases.batches("distinct")[0]
    batch = cases.Batch(batch.hidden_TD, batch.ids_TK % 2, batch.weights_TK)  # experts 0 and 1 live on rank 0
    for _ in range(2):
        experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
    assert telemetry.layers == (3,)
    assert telemetry.loads().tolist() == [[[14, 0, 0]]] * 2
    assert telemetry.counts().sum() == 28
    assert telemetry.transfer_bytes().tolist() == [[[0, 0, 0]]] * 2
    sent, returned = (telemetry.received_bytes(phase)[:, 0] for phase in ("dispatch", "combine"))
    row, pairs = cases.D * 4, 4  # ranks 1 and 2 hold two tokens of two pairs each, with a row for each pair
    assert sent.tolist() == [[2 * pairs * (row + 8), 0, 0]] * 2
    assert returned.tolist() == [[0, pairs * row, pairs * row]] * 2
    compute_s = telemetry.seconds("compute")
    assert compute_s.shape == (2, 1, 3)
    assert (compute_s >= 0).all()
    telemetry.clear()
    assert telemetry.loads().size == telemetry.seconds().size == 0


def test_telemetry_forgets_the_oldest_calls() -> None:
    telemetry = Telemetry(max_records=6)
    experts = local(3, 6, telemetry)
    batch = cases.batches("distinct")[0]
    for _ in range(5):
        experts(batch.hidden_TD, batch.ids_TK % 6, batch.weights_TK)
    assert len(telemetry) == 6
    assert telemetry.loads().shape == (2, 1, 3)


def test_compute_time_is_the_ranks_own() -> None:
    """The rank with all the work takes all the time, on a clock that counts rows, although all ranks take turns."""
    num_computed = 0

    def counting_gate(up_NF: torch.Tensor) -> torch.Tensor:
        nonlocal num_computed
        num_computed += len(up_NF)
        return FAMILY.apply_gate(up_NF)

    family = replace(FAMILY, apply_gate=counting_gate)
    layer, planner, _ = cases.planned("standard", {}, family, np.ones((3, 6), np.int64))
    telemetry = Telemetry()

    def main(group: EPGroup) -> None:
        experts = EPExperts(family, layer, planner, group, telemetry=telemetry)
        cases.fill(experts, cases.expert_weights(family, 6))
        for _ in range(2):
            experts(torch.randn(10, cases.D), torch.zeros(10, 2, dtype=torch.int64), torch.ones(10, 2))

    LocalWorld(3, clock=lambda: float(num_computed)).run(main)
    assert telemetry.seconds("compute").tolist() == [[[60.0, 0.0, 0.0]]] * 2


def test_gradients_are_not_kept() -> None:
    batch = cases.batches("distinct")[0]
    hidden_TD = batch.hidden_TD.clone().requires_grad_()
    assert not local(2, 8)(hidden_TD, batch.ids_TK, batch.weights_TK).requires_grad


def test_failures_name_layer_and_rank() -> None:
    batch = cases.batches("distinct")[0]
    layer, _, _ = cases.planned("standard", {}, FAMILY, np.ones((1, 8), np.int64))

    def broken(counts_RE: np.ndarray) -> None:
        raise KeyError("lost")

    def refused(counts_RE: np.ndarray) -> None:
        raise UserError("too small")

    arguments = (batch.hidden_TD, batch.ids_TK, batch.weights_TK)
    with pytest.raises(RankFailure, match=r"MoE layer 3 on rank 0: .*lost"):
        EPExperts(FAMILY, layer, broken, single_group())(*arguments)
    with pytest.raises(UserError, match="too small"):
        EPExperts(FAMILY, layer, refused, single_group())(*arguments)
