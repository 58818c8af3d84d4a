"""A rank reports now and then what its experts have contributed."""

from rq_ep.moe import EPExperts
from rq_ep.parallel import EPGroup, run_local
from rq_ep.serve.messages import ImportanceReport
from rq_ep.serve.rank.rebalance.importance_reports import REPORT_EVERY_S, ImportanceReports
from tests.moe import cases


def test_the_sums_of_a_second_are_one_message_of_the_experts_that_had_pairs() -> None:
    family, ranks = cases.FAMILIES["gated"], cases.batches("one_hot_expert")
    num_experts = cases.ROUTINGS["one_hot_expert"][0]
    layer, planner, _ = cases.planned("rq", {}, family, cases.counts_of(ranks, num_experts))

    def main(group: EPGroup) -> list[ImportanceReport]:
        experts = EPExperts(family, layer, planner, group)
        cases.fill(experts, cases.expert_weights(family, num_experts))
        sent: list[ImportanceReport] = []
        now_s = 0.0
        reports = ImportanceReports([experts], sent.append, lambda: now_s)
        batch = ranks[group.rank]
        for _ in range(8):  # two of them are sampled
            reports.between_steps()
            experts(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
        reports.between_steps()
        reports.tick()
        assert sent == []
        now_s = REPORT_EVERY_S
        reports.tick()
        reports.tick()
        now_s *= 2
        reports.tick()  # nothing has been sampled since
        return sent

    pairs = dict.fromkeys(range(num_experts), 0)
    for (report,) in run_local(len(ranks), main):
        ((position, experts, norms, pairs_of),) = report.rows
        assert position == 0
        assert all(norm > 0 for norm in norms)
        for expert, number in zip(experts, pairs_of, strict=True):
            pairs[expert] += int(number)
    counts_E = cases.counts_of(ranks, num_experts).sum(axis=0)
    assert pairs == {expert: 2 * number for expert, number in enumerate(counts_E.tolist())}
