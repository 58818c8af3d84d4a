"""The rebalancer: observes the loads of steps, and decides whether the placement that serves is to be replaced.

It is a pure decision, at a third speed beside `place` and the planners: the simulator, the benches and the server call
the same functions. Whoever observes need not be who plans: a request carries all that a decision depends on.
"""

import time
from dataclasses import dataclass, replace

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.strategy import RebalanceRule, Strategy
from rq_ep.rebalancing.gain import Gain, gain_of, low_share, planned_and_held_out
from rq_ep.rebalancing.load_window import LoadWindow, ObservedLoads
from rq_ep.rebalancing.observed_importance import ObservedImportance
from rq_ep.rebalancing.replan import moved_bytes, price_of, refined, replan
from rq_ep.rebalancing.staged_moves import StagedMoves
from rq_ep.solver.migration.move_rounds import MoveRound, move_rounds
from rq_ep.solver.migration.rounds.format_changes import LowCap
from rq_ep.solver.migration.rounds.relief import relief_of_arrivals

LOW_SLACK = 0.01  # of all pairs, by which formats that serve may exceed the cap before they have to change
MIN_STEPS = 16  # sampled steps below which nothing is decided: a block of steps would be a single one


@dataclass(frozen=True)
class Decision:
    """Whether to replace the placement that serves, and why."""

    placement: Placement | None  # the new one; None: stay
    reason: str
    gain: Gain | None = None  # on steps that were not planned for
    moved_bytes: int = 0  # that ranks receive
    rounds: tuple[MoveRound, ...] = ()  # that lead to the new placement, at least one
    seconds: float = 0.0  # that the decision took

    @property
    def stays(self) -> bool:
        return self.placement is None


@dataclass(frozen=True)
class RebalanceRequest:
    """All that a decision depends on. It can be sent to another process."""

    problem: PlacementProblem  # the limits; its statistics hold sizes and sensitivities, and no load that counts
    strategy: Strategy
    rule: RebalanceRule
    current: Placement
    loads: ObservedLoads
    importance_LE: FloatArray | None = None  # [L, E] that a pair of each expert has; None: as the statistics say


class Rebalancer:
    """Observes the steps of a group. One decision is asked for at a time, and a placement is committed when it serves.

    Args:
        problem: statistics with sizes and sensitivities, budgets and caps.
        strategy: that serves.
        placement: the one that serves at first.
        rule: when to decide, and what to accept; default: the strategy's own.

    Raises:
        UserError: the strategy keeps the placement that it has.
    """

    def __init__(
        self,
        problem: PlacementProblem,
        strategy: Strategy,
        placement: Placement,
        rule: RebalanceRule | None = None,
    ) -> None:
        rule = rule or strategy.rebalance_rule
        if rule is None:
            raise UserError(f"--rebalance auto: strategy {strategy.name!r} keeps the placement it has; choose rq")
        if problem.budget_bytes_R is None:
            problem = replace(problem, budget_bytes_R=placement.budget_bytes_R or placement.bytes_R)
        self.current = placement
        self._problem = replace(problem, move_price=rule.price_among(problem.stats.num_experts))
        self._strategy = strategy
        self._rule = rule
        self._window = LoadWindow(rule.window)
        self.importance = ObservedImportance(problem.stats.num_layers, problem.stats.num_experts)
        self._due_in: float = max(int(rule.first * rule.interval), min(rule.window, MIN_STEPS))  # full steps

    @property
    def is_due(self) -> bool:
        """Whether a decision is to be made now."""
        return self._due_in <= 0

    def observe(self, counts_LE: IntArray, phase: int = 0) -> None:
        """Take the loads of a step.

        Args:
            counts_LE: [L, E] routed pairs, of all ranks together; a step that routes nothing does not count.
            phase: index into PHASES.
        """
        if counts_LE.any():
            stats = self._problem.stats
            tokens = float(counts_LE.sum()) / (stats.num_layers * (stats.top_k or 1))
            part = min(tokens / self._rule.full_step, 1.0)
            self._window.observe(counts_LE, phase, part)
            self._due_in -= part

    def request(self) -> RebalanceRequest:
        """What to decide on now. The next decision is due an interval later."""
        self._due_in = self._rule.interval
        return RebalanceRequest(
            self._problem, self._strategy, self._rule, self.current, self._window.loads(),
            self.importance.of_a_pair_LE(),
        )  # fmt: skip

    def staged(self, decision: Decision) -> StagedMoves:
        """The moves of a decision, as they arrive step by step."""
        return StagedMoves(
            decision.rounds,
            self.current.topology.num_ranks,
            self._problem.stats.expert_bytes,
            self._rule.bytes_per_step,
        )

    def commit(self, placement: Placement) -> None:
        """The placement serves from now on. The next decision is due when a whole window has passed."""
        self.current = placement
        self._due_in = max(self._rule.window, self._rule.interval)


def decide(request: RebalanceRequest) -> Decision:
    """Plan for one half of the observed steps, and accept what is better on the other half by more than it costs."""
    started_s = time.perf_counter()
    decision = _decide(request)
    if decision.placement is not None:
        decision = _with_rounds(request, decision, decision.placement)
    return replace(decision, seconds=time.perf_counter() - started_s)


def _with_rounds(request: RebalanceRequest, decision: Decision, placement: Placement) -> Decision:
    """The decision with the rounds of its moves, those first that relieve their layer most for a byte."""
    stats, current = request.problem.stats, request.current
    room_bytes = request.rule.room_bytes or max(stats.expert_bytes.values())
    counts_SLE = request.loads.counts_SLE
    relief_L = [
        relief_of_arrivals(pairs_SE, old.replicas, new.replicas, stats.expert_bytes, placement.topology.num_ranks)
        for pairs_SE, old, new in zip(counts_SLE.swapaxes(0, 1), current.layers, placement.layers, strict=True)
    ]
    held = [list(layer.replicas) for layer in current.layers]
    pairs_LE = counts_SLE.sum(axis=0)
    low_cap = LowCap(pairs_LE, request.problem.max_low_precision_share * int(pairs_LE.sum()))
    try:
        rounds = move_rounds(
            held, placement, stats.expert_bytes, stats.native_format, room_bytes,
            lambda layer, replica: relief_L[layer].get(replica, 0.0), low_cap,
        )  # fmt: skip
    except UserError as error:
        return replace(decision, placement=None, reason=f"{decision.reason}, but {error}")
    if not rounds:
        return replace(decision, placement=None, reason=f"{decision.reason}: it is the placement that serves")
    return replace(decision, rounds=tuple(rounds))


def _decide(request: RebalanceRequest) -> Decision:
    strategy, current, loads = request.strategy, request.current, request.loads
    num_steps = len(loads.phase_S)
    if num_steps < MIN_STEPS:
        return Decision(None, f"{num_steps} steps were observed, fewer than {MIN_STEPS}")
    planned, held_out = loads, loads
    if request.rule.min_gain is not None:
        planned, held_out = (loads.take(half) for half in planned_and_held_out(num_steps))
    problem = _with_loads(request, planned)
    placement = replan(problem, strategy, current)
    if placement is None:
        return Decision(None, "no placement was found inside the limits")
    decision = _judged(request, problem, held_out, placement)
    if decision.stays:
        return decision
    other = refined(problem, strategy, current, placement)  # only now: most decisions are to stay
    refined_decision = decision if other is placement else _judged(request, problem, held_out, other)
    return decision if refined_decision.stays else refined_decision


def _judged(
    request: RebalanceRequest, planned: PlacementProblem, held_out: ObservedLoads, placement: Placement
) -> Decision:
    """Whether a placement that was planned is better on the held-out steps by more than it costs."""
    strategy, rule, current = request.strategy, request.rule, request.current
    num_bytes = moved_bytes(planned, current, placement)
    gain = gain_of(_with_loads(request, held_out), strategy, current.layers, placement.layers)
    figures = f"max/mean {gain.before:.3f} -> {gain.after:.3f}"
    if rule.min_gain is None:
        return Decision(placement, f"{figures}, whatever it gains", gain, num_bytes)
    figures += " on steps that were not planned for"
    cap, everything = request.problem.max_low_precision_share, _with_loads(request, request.loads)
    low_before, low_after = (low_share(everything, layers) for layers in (current.layers, placement.layers))
    if low_before.surely_exceeds(cap + LOW_SLACK) and low_after.mean < low_before.mean:
        figures += f", low pairs {low_before.mean:.1%} -> {low_after.mean:.1%} (cap {cap:.1%})"
        return Decision(placement, figures, gain, num_bytes)
    least = max(rule.min_gain, rule.min_share * (gain.before - gain.floor)) + price_of(planned, num_bytes)
    if gain.estimate.mean < least:
        return Decision(None, f"{figures}: gains less than {least:.3f}", gain, num_bytes)
    if not gain.estimate.surely_exceeds(0.0):
        return Decision(None, f"{figures}: not more than chance ({gain.estimate.noise:.3f})", gain, num_bytes)
    return Decision(placement, figures, gain, num_bytes)


def _with_loads(request: RebalanceRequest, loads: ObservedLoads) -> PlacementProblem:
    """The problem with these loads in place of its statistics' own, and with the importance that goes with them."""
    stats = replace(
        request.problem.stats, counts=loads.counts_SLE, phase=loads.phase_S, tokens=None, domain=None, domains=(),
        source="the observed load",
    )  # fmt: skip
    if request.importance_LE is not None:
        stats = replace(stats, importance=request.importance_LE * loads.counts_SLE.sum(axis=0))
    return replace(request.problem, stats=stats)
