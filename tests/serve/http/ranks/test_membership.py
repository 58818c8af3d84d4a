"""Members that die, leave and join: what is sent to whom, and when the group ends."""

import random
from collections.abc import Sequence

import pytest

from rq_ep.serve.http.ranks.member_effects import (
    AskToLeave,
    CommandSupervisor,
    Effect,
    GenerationServes,
    GiveUp,
    RankLost,
    SendRegroup,
)
from rq_ep.serve.http.ranks.member_states import MemberState
from rq_ep.serve.http.ranks.membership import ChangeRefused, Membership
from rq_ep.serve.messages import KillRank, Regroup, StartRank, StopRank

PARTS = {"re-form": 0.25, "re-home": 0.5}
KILLED = "was killed by SIGKILL"


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def store(rank: int) -> tuple[str, int]:
    return "host", 1000 + rank


def serving(num_ranks: int = 4, clock: Clock | None = None) -> Membership:
    """A group that serves, with a supervisor for each rank."""
    membership = Membership(num_ranks, clock or Clock())
    for rank in range(num_ranks):
        membership.connected(rank)
        assert membership.loaded(rank, store(rank)) == []
    membership.start()
    for rank in range(num_ranks):
        membership.supervisor_connected(rank)
    return membership


def regroups(effects: Sequence[Effect]) -> list[Regroup]:
    return [effect.message for effect in effects if isinstance(effect, SendRegroup)]


def losses(effects: Sequence[Effect]) -> list[int]:
    return [effect.rank for effect in effects if isinstance(effect, RankLost)]


def commands(effects: Sequence[Effect]) -> list[tuple[int, type]]:
    return [(effect.rank, type(effect.message)) for effect in effects if isinstance(effect, CommandSupervisor)]


def settle(membership: Membership) -> list[Effect]:
    """Every member serves in the generation."""
    effects: list[Effect] = []
    for rank in membership.members:
        effects += membership.regrouped(rank, membership.generation, PARTS)
    return effects


def die(membership: Membership, rank: int) -> list[Effect]:
    return membership.lost(rank, f"rank {rank} died")


def restart(membership: Membership, rank: int, num_restarts: int = 1) -> None:
    """The supervisor has noticed the end, and has started a process, which has connected."""
    membership.ended(rank, KILLED)
    membership.started(rank, num_restarts)
    membership.connected(rank)


def states(membership: Membership) -> list[str]:
    return [record.state.value for record in membership.ranks]


def test_a_loss_is_told_to_all_who_are_left_and_its_requests_go_on() -> None:
    membership = serving()
    effects = die(membership, 2)
    assert effects == [
        SendRegroup(Regroup(1, [0, 1, 3], store(0), [])), RankLost(2, "rank 2 died", was_member=True, was_serving=True),
    ]  # fmt: skip
    assert membership.open_ranks == [0, 1, 3], "new requests go to them at once"
    assert membership.ranks.degradation() == "3 of 4 ranks serve: rank 2 is lost (rank 2 died)"
    assert membership.ended(2, KILLED) == [], "the end of the process is known"
    assert "rank 2 is lost (rank 2 was killed by SIGKILL)" in str(membership.ranks.degradation())
    assert not any(membership.regrouped(rank, 1, PARTS) for rank in (0, 1))
    (serves,) = membership.regrouped(3, 1, {"re-form": 0.125, "re-home": 1.0})
    assert serves == GenerationServes(True, {"detect": 0.0, "re-form": 0.25, "re-home": 1.0, "total": 0.0})
    assert [record.generation for record in membership.ranks] == [1, 1, 0, 1]
    assert membership.num_failures == 1


def test_the_store_is_that_of_the_lowest_member_that_does_not_join() -> None:
    membership = serving(3)
    (regroup,) = regroups(die(membership, 0))
    assert (regroup.members, regroup.store, membership.leader) == ([1, 2], store(1), 1)
    settle(membership)
    restart(membership, 0)
    (regroup,) = regroups(membership.loaded(0, ("host", 7)))
    assert regroup == Regroup(2, [0, 1, 2], store(1), [0])
    settle(membership)
    assert membership.leader == 1, "a rank that has just joined does not lead"


def test_the_end_of_a_process_may_be_heard_of_before_that_of_its_connection() -> None:
    membership = serving()
    assert losses(membership.ended(2, KILLED)) == [2]
    assert die(membership, 2) == []
    membership.started(2, 1)
    membership.connected(2)
    assert membership.ranks[2].state is MemberState.LOADING
    assert membership.ended(2, "ended with exit code 1") != [], "this is the end of the second process"
    assert membership.ranks[2].state is MemberState.LOST


def test_a_late_report_on_an_older_process_is_not_about_the_one_that_has_connected() -> None:
    membership = serving()
    die(membership, 2)
    membership.connected(2)  # before the supervisor's reports are read
    assert membership.ended(2, KILLED) == []
    assert membership.ranks[2].state is MemberState.LOADING
    membership.started(2, 1)
    assert (membership.ranks[2].state, membership.ranks[2].num_restarts) == (MemberState.LOADING, 1)


def test_a_loss_during_a_recovery_supersedes_it() -> None:
    membership = serving()
    die(membership, 2)
    assert membership.regrouped(0, 1, PARTS) == []
    effects = die(membership, 1)
    assert regroups(effects) == [Regroup(2, [0, 3], store(0), [])]
    assert RankLost(1, "rank 1 died", was_member=True, was_serving=False) in effects, "it has made no step since"
    assert membership.regrouped(3, 1, PARTS) == [], "this was sent before"
    assert membership.is_pending(3)
    assert any(isinstance(effect, GenerationServes) for effect in settle(membership))


def test_two_that_die_at_once_and_all_but_one() -> None:
    membership = serving()
    assert [regroups(die(membership, rank))[0].members for rank in (0, 3, 1)] == [[1, 2, 3], [1, 2], [2]]
    settle(membership)
    assert membership.members == (2,)
    assert membership.num_failures == 3


def test_the_last_member_takes_the_group_along_and_all_losses_are_named() -> None:
    membership = serving(2)
    die(membership, 0)
    assert die(membership, 1) == [GiveUp("no rank is left that holds the model: rank 0 died; rank 1 died")]


def test_a_member_that_only_joins_cannot_go_on_alone() -> None:
    membership = serving(2)
    die(membership, 0)
    settle(membership)
    restart(membership, 0)
    membership.loaded(0, store(0))
    (give_up,) = die(membership, 1)
    assert give_up == GiveUp("no rank is left that holds the model: rank 1 died")


def test_a_rank_that_comes_back_joins_between_two_steps() -> None:
    membership = serving()
    die(membership, 2)
    settle(membership)
    restart(membership, 2)
    assert states(membership) == ["serving", "serving", "loading", "serving"]
    assert regroups(membership.loaded(2, ("host", 9))) == [Regroup(2, [0, 1, 2, 3], store(0), [2])]
    assert membership.open_ranks == [0, 1, 3], "until it serves"
    effects = settle(membership)
    assert effects == [GenerationServes(False, PARTS)]
    assert membership.open_ranks == [0, 1, 2, 3]
    assert membership.ranks.degradation() is None


def test_a_group_begins_without_ranks_that_join_when_they_come() -> None:
    membership = Membership(4, Clock())
    for rank in (0, 1, 3):
        membership.connected(rank)
        assert membership.loaded(rank, store(rank)) == []
    membership.start([0, 1, 3], 1)
    assert membership.ranks.degradation() == "3 of 4 ranks serve: rank 2 is expected (it has not come yet)"
    for refused in (membership.add, membership.remove):
        with pytest.raises(ChangeRefused):
            refused([2])
    membership.supervisor_connected(2)
    membership.connected(2)
    assert membership.ranks.degradation() == "3 of 4 ranks serve: rank 2 is loading (it came late)"
    assert regroups(membership.loaded(2, store(2))) == [Regroup(2, [0, 1, 2, 3], store(0), [2])]
    settle(membership)
    assert (membership.ranks.degradation(), membership.num_failures) == (None, 0)


def test_a_rank_that_could_join_waits_for_the_end_of_a_recovery() -> None:
    membership = serving()
    die(membership, 2)
    restart(membership, 2)
    assert membership.loaded(2, store(2)) == []
    assert [message.members for message in regroups(die(membership, 1))] == [[0, 3]]
    assert regroups(settle(membership)) == [Regroup(3, [0, 2, 3], store(0), [2])]


@pytest.mark.parametrize("when", ["starting", "loading", "waiting", "joining"])
def test_a_rank_that_dies_on_its_way_back_leaves_the_others_alone(when: str) -> None:
    membership = serving()
    die(membership, 2)
    if when != "waiting":
        settle(membership)
    membership.ended(2, KILLED)
    membership.started(2, 1)
    if when == "starting":
        assert membership.ended(2, "ended with exit code 1") == []
    else:
        membership.connected(2)
        if when != "loading":
            membership.loaded(2, store(2))
        effects = die(membership, 2)
        expected = [Regroup(3, [0, 1, 3], store(0), [])] if when == "joining" else []
        assert regroups(effects) == expected
        assert losses(effects) == [2]
    assert membership.ranks[2].state is MemberState.LOST
    assert membership.members == (0, 1, 3)
    assert membership.num_failures == (2 if when == "joining" else 1)


def test_a_loss_while_another_rank_joins_names_that_one_as_joining_still() -> None:
    membership = serving()
    die(membership, 2)
    settle(membership)
    restart(membership, 2)
    membership.loaded(2, store(2))
    assert regroups(die(membership, 0)) == [Regroup(3, [1, 2, 3], store(1), [2])]
    for rank in (1, 2):
        membership.regrouped(rank, 3, PARTS)
    assert regroups(die(membership, 3)) == [Regroup(4, [1, 2], store(1), [])], "what has joined holds experts"


def test_a_rank_that_is_not_started_again_is_named_and_can_be_added() -> None:
    membership = serving()
    die(membership, 2)
    membership.ended(2, KILLED)
    membership.given_up(2, "ended 4 times (--max-rank-restarts 3)")
    assert "rank 2 is lost (rank 2: ended 4 times (--max-rank-restarts 3))" in str(membership.ranks.degradation())
    assert commands(membership.add([2])) == [(2, StartRank)]
    assert membership.ranks[2].state is MemberState.RESTARTING


def test_a_supervisor_that_dies_takes_its_rank_along_for_good() -> None:
    membership = serving()
    assert losses(membership.supervisor_lost(2)) == [2]
    assert die(membership, 2) == []
    with pytest.raises(ChangeRefused, match=r"the launcher has no process for rank 2: .* its supervisor has ended"):
        membership.add([2])
    membership.supervisor_connected(2)  # the launcher has replaced it
    membership.started(2, 0)
    membership.connected(2)
    assert membership.ranks[2].state is MemberState.LOADING


def test_a_leave_waits_for_the_requests_and_ends_the_process() -> None:
    membership = serving()
    assert membership.remove([2]) == []
    assert membership.open_ranks == [0, 1, 3]
    assert membership.members == (0, 1, 2, 3), "it serves what it has"
    assert membership.drained(2) == [AskToLeave((2,), 0)]
    assert membership.drained(2) == [], "there is no answer yet"
    effects = membership.may_leave(AskToLeave((2,), 0), None)
    assert effects == [SendRegroup(Regroup(1, [0, 1, 3], store(0), [])), CommandSupervisor(2, StopRank())]
    with pytest.raises(ChangeRefused, match="rank 2 is leaving: there is nothing to add"):
        membership.add([2])
    (lost,) = membership.left(2)
    assert (lost, membership.ranks[2].state) == (RankLost(2, "by request", False, False), MemberState.REMOVED)
    assert settle(membership) == [GenerationServes(False, PARTS)]
    assert membership.num_failures == 0
    assert commands(membership.add([2])) == [(2, StartRank)]
    membership.started(2, 1)
    membership.connected(2)
    assert regroups(membership.loaded(2, store(2))) == [Regroup(2, [0, 1, 2, 3], store(0), [2])]


def test_a_rank_without_which_the_others_cannot_hold_the_model_any_more_stays() -> None:
    membership = serving()
    membership.remove([2])
    (asked,) = membership.drained(2)
    assert isinstance(asked, AskToLeave)
    die(membership, 3)
    assert membership.may_leave(asked, None) == [], "the answer was about others, of whom one has died"
    assert membership.members == (0, 1, 2)
    asked_again = settle(membership)[-1]
    assert asked_again == AskToLeave((2,), 1)
    assert membership.may_leave(asked_again, "5 bytes are missing") == []
    assert (membership.open_ranks, membership.ranks[2].reason) == ([0, 1, 2], "it stays: 5 bytes are missing")
    membership.remove([2])
    assert membership.drained(2) == [asked_again], "it may be asked to leave again"


def test_a_leave_can_be_called_off() -> None:
    membership = serving()
    membership.remove([1, 2])
    assert membership.add([2]) == []
    assert membership.open_ranks == [0, 2, 3]
    assert membership.drained(2) == []
    assert membership.members == (0, 1, 2, 3)


def test_a_rank_that_dies_while_it_leaves_is_not_started_again() -> None:
    membership = serving()
    membership.remove([2])
    effects = die(membership, 2)
    assert regroups(effects)[0].members == [0, 1, 3]
    assert losses(effects) == [2]
    assert commands(effects) == [(2, StopRank)]
    assert membership.ranks[2].state is MemberState.REMOVED
    membership.started(2, 1)  # sent before the supervisor knew
    assert membership.ranks[2].state is MemberState.REMOVED


def test_members_that_leave_stay_if_all_others_die() -> None:
    membership = serving(3)
    membership.remove([1, 2])
    effects = die(membership, 0)
    assert regroups(effects)[0].members == [1, 2]
    assert membership.open_ranks == [1, 2]


def test_ranks_leave_only_once_nothing_is_under_way() -> None:
    membership = serving()
    die(membership, 1)
    membership.remove([3])
    assert membership.drained(3) == []
    assert settle(membership)[-1] == AskToLeave((3,), 1)
    effects = membership.may_leave(AskToLeave((3,), 1), None)
    assert regroups(effects) == [Regroup(2, [0, 2], store(0), [])]
    assert commands(effects) == [(3, StopRank)]


def test_what_cannot_be_changed_is_refused_and_nothing_is_changed() -> None:
    membership = serving(3)
    with pytest.raises(ChangeRefused, match="at least one rank has to stay"):
        membership.remove([0, 1, 2])
    with pytest.raises(ChangeRefused, match="rank 1 is serving: there is nothing to add"):
        membership.add([1])
    membership.remove([1])
    with pytest.raises(ChangeRefused, match="rank 1 is leaving already"):
        membership.remove([0, 1])
    with pytest.raises(ChangeRefused, match="at least one rank has to stay"):
        membership.remove([0, 2])
    assert states(membership) == ["serving", "leaving", "serving"]
    die(membership, 0)
    membership.ended(0, KILLED)
    with pytest.raises(ChangeRefused, match="rank 0 is lost: there is nothing to add"):
        membership.add([0])  # its supervisor is about to start it


def test_a_rank_that_is_on_its_way_back_can_be_removed_at_once_but_not_within_its_join() -> None:
    membership = serving()
    die(membership, 2)
    settle(membership)
    membership.ended(2, KILLED)
    assert commands(membership.remove([2])) == [(2, StopRank)]
    assert membership.ranks[2].state is MemberState.REMOVED
    membership.add([2])
    membership.connected(2)
    membership.loaded(2, store(2))
    with pytest.raises(ChangeRefused, match="rank 2 is joining: try again once it serves"):
        membership.remove([2])


def test_a_stalled_rank_is_killed_and_counts_as_lost() -> None:
    clock = Clock()
    membership = serving(3, clock)
    effects = membership.stalled(1, "rank 1 has not gone on", 60.0)
    assert commands(effects) == [(1, KillRank)]
    assert regroups(effects)[0].members == [0, 2]
    clock.now_s += 2
    (serves,) = settle(membership)
    assert isinstance(serves, GenerationServes)
    assert serves.seconds == {"detect": 60.0, **PARTS, "total": 62.0}
    assert membership.ended(1, KILLED) == []
    assert membership.ranks[1].reason == "rank 1 has not gone on", "which says more"


def test_members_that_wait_for_one_that_does_not_answer_go_on_without_it() -> None:
    clock = Clock()
    membership = serving(3, clock)
    membership.unreachable(0, "PeerLost: connection closed")
    clock.now_s += 3
    membership.unreachable(2, "PeerLost: connection closed")
    assert membership.check() == []
    clock.now_s += 2
    effects = membership.check()
    assert commands(effects) == [(1, KillRank)]
    assert "rank 1 does not answer (rank 0: PeerLost: connection closed)" in str(membership.ranks.degradation())
    assert regroups(effects)[0].members == [0, 2]
    clock.now_s += 1
    membership.unreachable(0, "it crossed the message")
    clock.now_s += 60
    assert membership.check() == []


def test_a_member_that_has_joined_goes_on_without_those_that_do_not_answer() -> None:
    clock = Clock()
    membership = serving(2, clock)
    die(membership, 1)
    settle(membership)
    restart(membership, 1)
    membership.loaded(1, store(1))
    clock.now_s += 10
    membership.unreachable(1, "PeerLost")  # while it has no experts yet: nobody is left who has
    clock.now_s += 5
    assert membership.check() == [GiveUp("rank 0 does not answer (rank 1: PeerLost)")]
    settle(membership)
    assert [message.members for message in regroups(membership.check())] == [[1]]


def test_members_that_all_wait_try_once_more_and_then_the_group_ends() -> None:
    clock = Clock()
    membership = serving(2, clock)
    for attempt in range(2):
        clock.now_s += 10
        for rank in range(2):
            membership.unreachable(rank, "PeerLost")
        clock.now_s += 5
        effects = membership.check()
        if attempt == 0:
            assert regroups(effects) == [Regroup(1, [0, 1], store(0), [])]
    (give_up,) = effects
    assert give_up == GiveUp("rank 0: PeerLost; rank 1: PeerLost")


def test_a_loss_that_members_had_noticed_first_counts_from_then_on() -> None:
    clock = Clock()
    membership = serving(2, clock)
    membership.unreachable(0, "PeerLost")
    clock.now_s += 0.5
    die(membership, 1)
    (serves,) = settle(membership)
    assert isinstance(serves, GenerationServes)
    assert serves.seconds == {"detect": 0.5, **PARTS, "total": 0.5}


def test_members_that_cannot_hold_the_model_end_the_group_unless_others_have_died_since() -> None:
    membership = serving()
    die(membership, 0)
    die(membership, 1)
    assert membership.cannot_continue(1, "they lack 5 bytes") == []
    assert membership.cannot_continue(2, "they lack 9 bytes") == [GiveUp("they lack 9 bytes")]


def test_a_group_that_drains_shrinks_but_takes_nobody_in() -> None:
    membership = serving()
    die(membership, 2)
    settle(membership)
    restart(membership, 2)
    membership.drain()
    assert membership.loaded(2, store(2)) == []
    assert regroups(die(membership, 1))[0].members == [0, 3]


def test_what_has_happened_is_kept_in_order() -> None:
    membership = serving(2)
    die(membership, 1)
    settle(membership)
    restart(membership, 1)
    membership.loaded(1, store(1))
    settle(membership)
    happened = [event["state"] for event in membership.ranks.events if event["rank"] == 1]
    assert happened == ["serving", "lost", "restarting", "loading", "joining", "serving"]


@pytest.mark.parametrize("seeds", [range(start, start + 25) for start in range(0, 100, 25)])
def test_whatever_happens_members_are_told_of_themselves_and_somebody_holds_the_model(seeds: range) -> None:
    """What was said last to the members is who they are, and generations rise by one."""
    for seed in seeds:
        play_at_random(seed)


def play_at_random(seed: int) -> None:
    chance, membership = random.Random(seed), serving(4)
    told: Regroup | None = None
    asked: list[AskToLeave] = []
    for _ in range(200):
        rank, action = chance.randrange(4), chance.randrange(12)
        record = membership.ranks[rank]
        effects: list[Effect] = []
        try:
            if action < 2 and record.state not in (MemberState.RESTARTING,):
                effects = die(membership, rank)
            elif action == 2:
                effects = membership.ended(rank, KILLED)
            elif action == 3 and record.state is MemberState.LOST:
                membership.started(rank, record.num_restarts + 1)
            elif action == 4:
                membership.connected(rank)
            elif action == 5 and record.state is MemberState.LOADING:
                effects = membership.loaded(rank, store(rank))
            elif action == 6:
                effects = membership.remove([rank])
            elif action == 7:
                effects = membership.drained(rank)
            elif action == 8:
                effects = membership.add([rank])
            elif action == 9 and record.is_stopping:
                effects = membership.left(rank)
            elif action == 10 and asked:
                effects = membership.may_leave(asked.pop(0), chance.choice([None, None, "5 bytes are missing"]))
            else:
                effects = membership.regrouped(rank, membership.generation, PARTS)
        except ChangeRefused:
            assert effects == []
        asked += [effect for effect in effects if isinstance(effect, AskToLeave)]
        for message in regroups(effects):
            assert message.generation == (told.generation if told else 0) + 1
            told = message
        if any(isinstance(effect, GiveUp) for effect in effects):
            return
        if told is not None:
            assert (told.members, set(told.joining)) == (list(membership.members), membership.joining)
        assert membership.open_ranks
        assert membership.leader in membership.members
        assert membership.leader not in membership.joining
        present = (MemberState.SERVING, MemberState.LEAVING, MemberState.JOINING)
        assert all(membership.ranks[rank].state in present for rank in membership.members)
