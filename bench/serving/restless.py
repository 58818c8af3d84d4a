"""A strategy that replaces its placement as often as it can: for the bench alone."""

from dataclasses import dataclass
from typing import ClassVar

from rq_ep.core.strategy import RebalanceRule
from rq_ep.strategies.rq import ReplicateQuantize


@dataclass(frozen=True)
class Restless(ReplicateQuantize):
    """`rq` without a gate: every 16 steps it moves to whatever it has planned, as if bytes cost nothing."""

    rebalance_rule: ClassVar[RebalanceRule | None] = RebalanceRule(
        window=16, interval=16, full_step=1, min_gain=None, price=0.0
    )
