"""Handing on: the same loans, in rounds that the links can carry."""

from hypothesis import given
from hypothesis import strategies as st

from rq_ep.core.plan import WeightTransfer
from rq_ep.solver.split.relay import may_relay, relay


def lent_to(*ranks: int, expert: int = 0, src: int = 0) -> list[WeightTransfer]:
    return [WeightTransfer(expert, src, rank, "bf16") for rank in ranks]


def test_one_expert_reaches_seven_ranks_in_three_rounds() -> None:
    relayed = relay(lent_to(*range(1, 8)))
    assert [sum(transfer.round == number for transfer in relayed) for number in range(3)] == [1, 2, 4]
    assert relay(lent_to(1, 2)) == (WeightTransfer(0, 0, 1, "bf16"), WeightTransfer(0, 0, 2, "bf16", 1))


def test_it_is_tried_where_one_rank_sends_an_expert_three_times() -> None:
    assert may_relay(lent_to(1, 2, 3))
    assert not may_relay(lent_to(1, 2))
    assert not may_relay(lent_to(1, 2) + lent_to(2, 3, expert=1))
    assert not may_relay([])


@given(
    st.integers(2, 9).flatmap(
        lambda num_ranks: st.lists(st.sets(st.integers(0, num_ranks - 1), min_size=1), min_size=1, max_size=5)
    ),
    st.integers(0, 2),
)
def test_any_loans(ranks_of_experts: list[set[int]], home: int) -> None:
    transfers = []
    for expert, (src, *borrowers) in enumerate(sorted(ranks)[home % len(ranks) :] for ranks in ranks_of_experts):
        transfers += lent_to(*borrowers, expert=expert, src=src)
    relayed = relay(transfers)
    assert sorted((each.expert, each.dst, each.format) for each in relayed) == sorted(
        (each.expert, each.dst, each.format) for each in transfers
    )
    holders = {(each.expert, each.src) for each in transfers}
    for number in range(max((each.round for each in relayed), default=-1) + 1):
        together = [each for each in relayed if each.round == number]
        assert together
        assert len({each.src for each in together}) == len({each.dst for each in together}) == len(together)
        assert {(each.expert, each.src) for each in together} <= holders
        holders |= {(each.expert, each.dst) for each in together}
    assert relay(transfers[::-1]) == relayed
