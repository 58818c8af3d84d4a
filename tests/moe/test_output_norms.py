"""What a sample of steps says of the experts while they serve is what calibration measures of them."""

import numpy as np
import pytest
import torch

from rq_ep.formats import get_format
from rq_ep.moe import EPExperts
from rq_ep.moe.output_norms import DENSE, NUM_DENSE, SPARSE, OutputNorms
from rq_ep.parallel import EPGroup, run_local
from tests.moe import cases

BORROWING = {"knobs": {"min_tokens_per_gemm": 1, "fallback_ratio": 1.0}}


@pytest.mark.parametrize(("strategy", "routing"), [("rq", "distinct"), ("llep", "one_hot_expert"), ("rq", "no_tokens")])
def test_the_ranks_together_have_the_weighted_norms_and_the_pairs_of_every_expert(strategy: str, routing: str) -> None:
    family, ranks = cases.FAMILIES["transposed"], cases.batches(routing)
    num_experts = cases.ROUTINGS[routing][0]
    weights = cases.expert_weights(family, num_experts)
    variant = BORROWING if strategy == "llep" else {"budget": 1.6}
    layer, planner, _ = cases.planned(strategy, variant, family, cases.counts_of(ranks, num_experts))

    def main(group: EPGroup) -> np.ndarray:
        experts = EPExperts(family, layer, planner, group)
        cases.fill(experts, weights)
        norms = OutputNorms()
        experts.sample_norms(norms)
        batch = ranks[group.rank]
        plain = experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
        norms._is_sampled = True
        sampled = experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
        assert torch.equal(plain, sampled)
        norms.between_steps()
        ((index, sums_2E),) = norms.take()
        assert index == layer.index
        return sums_2E

    norm_E, pairs_E = sum(run_local(len(ranks), main))
    expected_2E = np.zeros((2, num_experts))
    for batch in ranks:
        for row, ids, gates in zip(batch.hidden_TD, batch.ids_TK.tolist(), batch.weights_TK.tolist(), strict=True):
            for expert, gate in zip(ids, gates, strict=True):
                out = family.forward(row[None], get_format("fp32"), weights[expert])
                expected_2E[:, expert] += [gate * float(out.norm()), 1]
    np.testing.assert_allclose([norm_E, pairs_E], expected_2E, rtol=2e-2)


def test_few_steps_are_sampled_more_of_them_at_first_and_idle_agreements_do_not_count() -> None:
    norms, sampled = OutputNorms(), []
    for step in range(NUM_DENSE + 3 * SPARSE):
        norms.between_steps()
        norms.between_steps()  # nothing ran in between
        if norms.sums_of(0, 4, torch.device("cpu")) is not None:
            sampled.append(step)
    assert sampled == [*range(0, NUM_DENSE, DENSE), *range(NUM_DENSE, NUM_DENSE + 3 * SPARSE, SPARSE)]
