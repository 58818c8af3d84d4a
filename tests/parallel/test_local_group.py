"""Ranks in one process take turns, exchange as processes do, and notice a deadlock."""

import threading
import time
from typing import Any

import pytest
import torch

from rq_ep.parallel import EPGroup, LocalWorld, RankFailure, run_local, single_group
from rq_ep.parallel.routing_counts import count_pairs


def test_collectives_return_what_the_ranks_contributed() -> None:
    def main(group: EPGroup) -> tuple[Any, ...]:
        ids_TK = torch.full((group.rank, 2), group.rank, dtype=[torch.int64, torch.int32, torch.int64][group.rank])
        counts_RE = group.gather_counts(count_pairs(ids_TK, 3))
        send = torch.arange(3) + 10 * group.rank
        received = group.all_to_all(send, [1, 1, 1], [1, 1, 1])
        group.barrier()
        return counts_RE.tolist(), received.tolist(), group.all_gather_object(str(group.rank))

    for rank, (counts, received, names) in enumerate(run_local(3, main)):
        assert counts == [[0, 0, 0], [0, 2, 0], [0, 0, 4]]
        assert received == [rank, 10 + rank, 20 + rank]
        assert names == ["0", "1", "2"]


def test_uneven_and_empty_splits() -> None:
    def main(group: EPGroup) -> list[list[float]]:
        send = torch.full((3, 2), float(group.rank)) if group.rank == 0 else torch.zeros(0, 2)
        splits = [0, 3] if group.rank == 0 else [0, 0]
        return group.all_to_all(send, splits, [0, 0] if group.rank == 0 else [3, 0]).tolist()

    assert run_local(2, main) == [[], [[0.0, 0.0]] * 3]


def test_transfers_arrive_in_their_order() -> None:
    def main(group: EPGroup) -> list[int]:
        mine = [torch.full((4,), 10 * group.rank + n, dtype=torch.uint8) for n in range(2)]
        other = 1 - group.rank
        landed = [torch.zeros(4, dtype=torch.uint8) for _ in range(2)]
        group.start_transfers([(piece, other) for piece in mine], [(piece, other) for piece in landed]).wait()
        return [int(piece[0]) for piece in landed]

    assert run_local(2, main) == [[10, 11], [0, 1]]


def test_one_rank_computes_at_a_time_and_its_clock_is_its_own() -> None:
    """A turn of rank 0 lasts 20 s on the clock of this test, one of rank 1 lasts 1 s."""
    active: list[int] = []
    now_s = [0.0]

    def main(group: EPGroup) -> float:
        start_s = group.clock()
        for _ in range(3):
            active.append(group.rank)
            assert len(active) == 1
            now_s[0] += 20.0 if group.rank == 0 else 1.0
            time.sleep(0.001)  # gives another thread the occasion to run
            assert active == [group.rank]
            active.clear()
            group.barrier()
        return group.clock() - start_s

    assert LocalWorld(2, clock=lambda: now_s[0]).run(main) == [60.0, 3.0]


def test_an_exception_on_one_rank_ends_all() -> None:
    before = threading.active_count()

    def main(group: EPGroup) -> None:
        group.barrier()
        if group.rank == 1:
            raise KeyError("broken")
        group.barrier()
        raise AssertionError("a rank went on")

    with pytest.raises(KeyError, match="broken") as caught:
        run_local(3, main)
    assert caught.value.__notes__ == ["on rank 1 of 3 in one process"]
    assert threading.active_count() == before


def test_ranks_that_wait_for_each_other_fail() -> None:
    def different(group: EPGroup) -> None:
        if group.rank:
            group.barrier()
        else:
            group.all_gather_object(0)

    def missing(group: EPGroup) -> None:
        if group.rank:
            group.barrier()

    def nothing_sent(group: EPGroup) -> None:
        if group.rank:
            group.start_transfers([], [(torch.zeros(1, dtype=torch.uint8), 0)]).wait()
        group.barrier()

    with pytest.raises(RankFailure, match="rank 0: gather of objects, rank 1: barrier"):
        run_local(2, different)
    with pytest.raises(RankFailure, match="rank 0 for nothing, it has ended"):
        run_local(2, missing)
    with pytest.raises(RankFailure, match="rank 1 for an expert from rank 0"):
        run_local(2, nothing_sent)


def test_splits_that_do_not_fit_are_refused_before_anything_is_sent() -> None:
    group = single_group()
    with pytest.raises(ValueError, match="do not fit 2 rows"):
        group.all_to_all(torch.zeros(2, 1), [3], [3])
    with pytest.raises(ValueError, match="2 input and 1 output splits for 1 ranks"):
        group.all_to_all(torch.zeros(2, 1), [1, 1], [2])
    with pytest.raises(ValueError, match=r"expects .* rows of the ranks, but they send"):
        run_local(2, lambda group: group.all_to_all(torch.zeros(2, 1), [1, 1], [1, 0]))


def test_modes_of_the_caller_hold_on_every_rank() -> None:
    with torch.inference_mode():
        assert run_local(2, lambda _: torch.is_inference_mode_enabled()) == [True, True]
    with torch.no_grad():
        assert run_local(2, lambda _: torch.is_grad_enabled()) == [False, False]
    assert run_local(2, lambda _: torch.is_grad_enabled()) == [True, True]
