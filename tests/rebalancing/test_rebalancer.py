"""The rebalancer follows a load that changes, and moves nothing where it does not."""

import pickle
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.problem import PlacementProblem, contiguous
from rq_ep.core.replicas import Replica
from rq_ep.core.strategy import RebalanceRule, Strategy
from rq_ep.core.topology import Topology
from rq_ep.rebalancing.gain import gain_of, low_share
from rq_ep.rebalancing.live_placement import LivePlacement
from rq_ep.rebalancing.rebalancer import Rebalancer, decide
from rq_ep.rebalancing.replan import replan
from rq_ep.rebalancing.staged_moves import StagedMoves
from rq_ep.solver.certificate.certify import certify
from rq_ep.solver.migration.move_rounds import move_rounds
from rq_ep.strategies import make_strategy
from rq_ep.strategies.eplb import Eplb
from rq_ep.strategies.rq import ReplicateQuantize
from tests.rebalancing.cases import NUM_RANKS, SIZES, problem_of, single_requests_SLE, steps_SLE

pytestmark = pytest.mark.slow
RQ = ReplicateQuantize(max_moves=600, max_steps=32)


def live(problem: PlacementProblem, placement: Placement, strategy: Strategy = RQ, **rule: float) -> LivePlacement:
    return LivePlacement(Rebalancer(problem, strategy, placement, replace(RebalanceRule(), **rule)))


def run(placement: LivePlacement, counts_SLE: IntArray) -> None:
    for counts_LE in counts_SLE:
        placement.step(counts_LE)


def imbalance(problem: PlacementProblem, placement: Placement, counts_SLE: IntArray) -> float:
    on_these = replace(problem, stats=replace(problem.stats, counts=counts_SLE))
    return gain_of(on_these, RQ, placement.layers, placement.layers).before


@pytest.mark.parametrize(("pairs", "seed"), [(16_384, 2), (1024, 3), (128, 4)])  # of 8,192, 512 and 64 tokens
def test_nothing_moves_in_ten_thousand_steps_of_one_load(pairs: int, seed: int) -> None:
    problem = problem_of(steps_SLE(0, 64, 1, pairs))
    following = live(problem, RQ.place(problem), interval=800)
    run(following, steps_SLE(0, 10_000, seed, pairs))
    assert following.commits == []
    assert len(following.decisions) == 12
    assert all(decision.stays for _, decision in following.decisions)


def test_nothing_moves_where_one_request_after_another_is_unlike_the_one_before() -> None:
    """A window of 256 single tokens would show one or two requests, and the formats and places that suit these."""
    counts_SLE = single_requests_SLE(8000, 0)
    problem = problem_of(counts_SLE.reshape(64, 125, *counts_SLE.shape[1:]).sum(axis=1))
    following = live(problem, RQ.place(problem))
    run(following, counts_SLE)
    assert following.commits == []
    assert len(following.decisions) >= 4


def test_of_single_tokens_what_can_be_gained_is_judged() -> None:
    """Two pairs leave two of four ranks idle at best, whatever the placement: a max/mean of 2 is the least."""
    generator = np.random.default_rng(0)
    chance_E = np.where(np.arange(16) < 3, 0.2, 0.4 / 13)  # three busy experts, all on rank 0
    counts_SLE = np.zeros((200, 2, 16), np.int64)
    for counts_E in counts_SLE.reshape(-1, 16):
        counts_E[generator.choice(16, 2, replace=False, p=chance_E)] = 1
    problem = problem_of(counts_SLE, ("bf16",))
    standard = certify(problem, RQ, contiguous(problem))
    following = live(problem, standard, full_step=1)
    run(following, counts_SLE)
    assert following.num_rebalances == 1
    gained = imbalance(problem, standard, counts_SLE) - imbalance(problem, following.placement, counts_SLE)
    assert gained > 0.2


def test_a_load_that_drifts_and_stays_balanced_moves_nothing() -> None:
    problem = problem_of(np.ones((1, 2, 16), np.int64), ("bf16",))
    following = live(problem, certify(problem, RQ, contiguous(problem)), interval=200)
    generator = np.random.default_rng(0)
    for step in range(2000):  # within a rank, load wanders from one expert to the next
        wave_E = 1 + 0.8 * np.sin(2 * np.pi * (np.arange(16) / 4 + step / 500))
        following.step(generator.multinomial(4096, wave_E / wave_E.sum(), 2))
    assert following.commits == []
    assert len(following.decisions) == 10


def test_after_a_change_nearly_all_of_the_gain_is_had_for_few_bytes() -> None:
    before, after = steps_SLE(0, 400, 0), steps_SLE(1, 700, 0)
    problem = problem_of(before[:64], ("bf16",))
    problem = replace(problem, budget_bytes_R=tuple(int(1.25 * size) for size in problem.budget_bytes_R or ()))
    first = RQ.place(problem)
    following = live(problem, first)
    run(following, np.concatenate([before, after]))
    held_out = steps_SLE(1, 64, 9)
    stale = imbalance(problem, first, held_out)
    fresh = imbalance(problem, RQ.place(replace(problem, stats=replace(problem.stats, counts=after[:64]))), held_out)
    now = imbalance(problem, following.placement, held_out)
    assert stale - now >= 0.9 * (stale - fresh)
    assert 1 <= following.num_rebalances <= 2
    eplb_problem = replace(problem, num_redundant_experts=4)
    maps = [
        Eplb().place(replace(eplb_problem, stats=replace(problem.stats, counts=part[:64]))) for part in (before, after)
    ]
    moved_by_eplb = SIZES["bf16"] * sum(
        len({one[:2] for one in new.replicas} - {one[:2] for one in old.replicas})
        for old, new in zip(maps[0].layers, maps[1].layers, strict=True)
    )
    assert following.moved_bytes <= 0.5 * moved_by_eplb


def test_from_standard_ep_it_learns_without_calibration() -> None:
    problem = problem_of(np.ones((1, 2, 16), np.int64))
    following = live(problem, certify(problem, RQ, contiguous(problem)))
    run(following, steps_SLE(0, 200, 0))
    held_out = steps_SLE(0, 64, 9)
    calibrated = RQ.place(replace(problem, stats=replace(problem.stats, counts=steps_SLE(0, 64, 1))))
    assert imbalance(problem, following.placement, held_out) <= imbalance(problem, calibrated, held_out) + 0.02
    assert "int8" in following.placement.formats
    assert all(np.array(following.placement.bytes_R) <= np.array(problem.budget_bytes_R))


def test_of_several_low_formats_it_takes_from_standard_ep_those_that_a_new_placement_takes() -> None:
    formats = ("bf16", "int8", "int4")
    observed = problem_of(steps_SLE(0, 32, 0), formats, cap=0.5)
    following = replan(observed, RQ, certify(observed, RQ, contiguous(observed)))
    assert following is not None
    assert following.formats == RQ.place(observed).formats == ("bf16", "int8")
    assert following.certificate["predicted"] < 1.01


@pytest.mark.parametrize("period", [16, 64])
def test_an_oscillation_faster_than_the_window_moves_nothing(period: int) -> None:
    parts = [steps_SLE(number % 2, period // 2, number) for number in range(1536 // period)]
    problem = problem_of(np.concatenate(parts[: 512 // period]))
    following = live(problem, RQ.place(problem))
    run(following, np.concatenate(parts))
    assert following.commits == []


def test_a_load_that_breaks_the_cap_on_low_pairs_changes_formats() -> None:
    problem = problem_of(steps_SLE(0, 64, 0), cap=0.1)
    low = {one.expert for one in RQ.place(problem).layers[0].replicas if one.format == "int8"}
    busy = steps_SLE(0, 400, 1)
    busy[:, 0, sorted(low)] *= 4
    following = live(problem, RQ.place(problem), min_gain=10.0)
    run(following, busy)
    moved = [decision for _, decision in following.decisions if not decision.stays]
    assert moved
    assert "low pairs" in moved[0].reason
    assert "(cap 10.0%)" in moved[0].reason


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cap", [0.1, 0.3])
def test_every_placement_on_the_way_keeps_to_bytes_and_cap_and_holds_every_expert_in_one_format(
    seed: int, cap: float
) -> None:
    problem = problem_of(steps_SLE(seed, 64, 0), cap=cap)
    current = RQ.place(problem)
    rebalancer = Rebalancer(problem, RQ, current)
    for counts_LE in np.concatenate([steps_SLE(seed, 64, 1), steps_SLE(seed + 10, 128, 1)]):
        rebalancer.observe(counts_LE)
    request = rebalancer.request()
    decision = decide(request)
    assert decision.placement is not None
    assert len(decision.rounds) > 1
    pairs_LE = request.loads.counts_SLE.sum(axis=0)

    def low_of(layers: Sequence[LayerPlacement]) -> float:
        rows = zip(layers, pairs_LE, strict=True)
        return sum(layer.low_pairs(pairs_E, "bf16") for layer, pairs_E in rows) / int(pairs_LE.sum())

    layers = list(current.layers)
    allowed = max(cap, *map(low_of, (layers, decision.placement.layers))) + 1e-9
    for moves in decision.rounds:
        arriving_R = np.zeros(NUM_RANKS, np.int64)
        for _, move in moves.receives:
            arriving_R[move.rank] += SIZES[move.format]
        bytes_R = bytes_by_rank(layers, NUM_RANKS, SIZES) + arriving_R
        assert all(bytes_R <= np.array(problem.budget_bytes_R) + SIZES["bf16"]), "held and staged"
        layers = moves.applied_to(layers, decision.placement)  # an expert of none or of two formats cannot be made
        assert low_of(layers) <= allowed
    for layer, goal in zip(layers, decision.placement.layers, strict=True):
        assert list(layer.replicas) == list(goal.replicas)
        np.testing.assert_array_equal(layer.shares_P, goal.shares_P)


def test_low_replicas_first_halve_the_imbalance_in_half_of_the_steps() -> None:
    sizes = {"bf16": 1000, "int8": 500}
    before = [[Replica(expert // 8, expert, "bf16" if expert % 2 else "int8") for expert in range(16)]]
    replicas = [*before[0], *(one._replace(rank=1) for one in before[0] if one.rank == 0)]
    goal = LayerPlacement.even(0, 16, replicas)
    after = Placement((goal,), "rq", Topology(2), (6000, 12_000))
    counts_E = np.array([100] * 8 + [0] * 8)  # rank 0 computes all: each replica on rank 1 takes as much from it

    def step_of_half(is_first: str) -> int:
        def value(layer: int, replica: Replica) -> float:
            return float(replica.format == is_first)

        layers = [LayerPlacement.even(0, 16, before[0])]
        moves = StagedMoves(move_rounds(before, after, sizes, "bf16", 1000, value), 2, sizes, bytes_per_step=250)
        for step in range(1, 100):
            arrived = moves.step()
            if arrived is not None:
                layers = arrived.applied_to(layers, after)
            if layers[0].loads_R(counts_E, 2).max() <= (800 + 400) / 2:
                return step
        raise AssertionError("the migration does not end")

    assert step_of_half("int8") == 4 * 2, "steps of four replicas of 500 bytes"
    assert step_of_half("bf16") == 4 * 4, "steps of four replicas of 1,000 bytes"


def test_the_cap_on_low_pairs_holds_at_every_moment_from_nothing_and_through_domains() -> None:
    """On the loads that a migration was decided for; where a new load breaks the cap, it is not exceeded further."""
    problem = problem_of(np.ones((1, 2, 16), np.int64))
    following = live(problem, certify(problem, RQ, contiguous(problem)), window=64, interval=32)
    layers, num_rounds, cap = list(following.placement.layers), 0, problem.max_low_precision_share
    limit, decided_on = cap, problem
    for counts_LE in np.concatenate([steps_SLE(domain, 200, 1) for domain in (0, 1)]):
        num_decisions = len(following.decisions)
        loads = following._rebalancer._window.loads().counts_SLE
        changed = following.step(counts_LE)
        if len(following.decisions) > num_decisions:
            loads = np.concatenate([loads, counts_LE[None]])
            decided_on = replace(problem, stats=replace(problem.stats, counts=loads))
            limit = max(cap, low_share(decided_on, layers).mean)
        for position, layer in changed.items():
            layers[position] = layer
            num_rounds += 1
        if changed:  # the window has a step more than was decided on
            assert low_share(decided_on, layers).mean <= limit + 1e-3
    assert num_rounds > 5
    assert following.num_rebalances >= 2


def test_bytes_per_step_and_planning_delay_when_it_serves() -> None:
    problem = problem_of(steps_SLE(0, 64, 0))
    first = RQ.place(problem)
    load = np.concatenate([steps_SLE(0, 128, 1), steps_SLE(1, 600, 1)])
    commits = []
    for delay, bytes_per_step in ((0, None), (30, None), (0, 100)):
        rebalancer = Rebalancer(problem, RQ, first, RebalanceRule(bytes_per_step=bytes_per_step))
        following = LivePlacement(rebalancer, delay)
        run(following, load)
        commits.append([commit.step for commit in following.commits])
    assert commits[1][0] == commits[0][0] + 30
    assert commits[2][1] - commits[2][0] >= 5, "an expert takes at least 504 bytes, 100 of which arrive in a step"


def test_a_request_and_a_decision_can_be_sent_to_another_process() -> None:
    problem = problem_of(steps_SLE(0, 64, 0))
    rebalancer = Rebalancer(problem, RQ, RQ.place(problem))
    for counts_LE in steps_SLE(1, 100, 0):
        rebalancer.observe(counts_LE)
    assert rebalancer.is_due
    request = pickle.loads(pickle.dumps(rebalancer.request()))
    decision = pickle.loads(pickle.dumps(decide(request)))
    assert not decision.stays
    assert decision.rounds
    assert not rebalancer.is_due


def test_too_few_steps_decide_nothing_and_idle_steps_do_not_count() -> None:
    problem = problem_of(steps_SLE(0, 64, 0))
    rebalancer = Rebalancer(problem, RQ, RQ.place(problem))
    for _ in range(1000):
        rebalancer.observe(np.zeros((2, 16), np.int64))
    assert not rebalancer.is_due
    rebalancer.observe(steps_SLE(1, 1, 0)[0])
    decision = decide(rebalancer.request())
    assert decision.stays
    assert decision.reason == "1 steps were observed, fewer than 16"


def test_too_little_room_is_the_reason_to_stay() -> None:
    problem = problem_of(steps_SLE(0, 64, 0))
    following = live(problem, RQ.place(problem), room_bytes=10)
    run(following, steps_SLE(1, 100, 0))
    assert following.commits == []
    assert "--rebalance-room 10: too little" in following.decisions[0][1].reason


@pytest.mark.parametrize("name", ["standard", "llep", "rq_paper"])
def test_a_strategy_that_keeps_what_it_has_is_refused_by_name(name: str) -> None:
    problem = problem_of(steps_SLE(0, 64, 0))
    strategy = make_strategy(name)
    with pytest.raises(UserError, match=f"--rebalance auto: strategy '{name}' keeps the placement it has; choose rq"):
        Rebalancer(problem, strategy, certify(problem, strategy, contiguous(problem)))


def test_a_plan_that_moves_nothing_stays_and_the_next_decision_comes() -> None:
    problem = problem_of(steps_SLE(0, 64, 0), ("bf16",))
    counts_SLE = np.repeat(steps_SLE(0, 1, 0), 100, axis=0)
    placement = Eplb().place(replace(problem, stats=replace(problem.stats, counts=counts_SLE)))
    following = LivePlacement(Rebalancer(problem, Eplb(), placement, RebalanceRule(interval=20, min_gain=None)))
    run(following, counts_SLE)
    assert [decision.stays for _, decision in following.decisions] == [True] * 5
    assert following.decisions[0][1].reason.endswith("it is the placement that serves")


def test_eplb_takes_whatever_it_plans_as_its_engines_do() -> None:
    problem = problem_of(steps_SLE(0, 64, 0), ("bf16",))
    rule = replace(Eplb.rebalance_rule or RebalanceRule(), window=100, interval=300)
    following = LivePlacement(Rebalancer(problem, Eplb(), Eplb().place(problem), rule))
    run(following, steps_SLE(1, 700, 0))
    assert following.decisions[0][0] == 300 // 4, "as in vLLM"
    assert following.num_rebalances == 3
    assert Eplb.rebalance_rule == RebalanceRule(
        window=1000, interval=3000, full_step=1, first=0.25, min_gain=None, price=0.0
    )
