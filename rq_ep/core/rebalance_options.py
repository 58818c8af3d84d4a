"""What a user may say of rebalancing."""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from rq_ep.core.options import check_options, option, parse_bytes

if TYPE_CHECKING:  # it imports NumPy, which a supervisor of a rank does without
    from rq_ep.core.strategy import RebalanceRule

REBALANCING = "rebalancing, the placement follows the load"


@dataclass(frozen=True, kw_only=True)
class RebalanceOptions:
    """Whether to rebalance, and how; what is left out is as the strategy's rule says."""

    rebalance: Literal["off", "auto"] = option(
        "off",
        help="auto: replace the placement that serves, expert by expert, where a better one is found for the load of "
        "the last steps",
        group=REBALANCING,
    )
    window: int | None = option(
        None,
        flag="--rebalance-window",
        help="steps whose loads a new placement is planned for, where a step of fewer than 32 tokens is a part of one, "
        "but not for eplb; default: 256, eplb 1000",
        minimum=16,
        group=REBALANCING,
    )
    interval: int | None = option(
        None,
        flag="--rebalance-interval",
        help="such steps between two decisions; after a change the next one waits for a whole window; default: 64, "
        "eplb 3000, and its first one after a quarter of that",
        minimum=1,
        group=REBALANCING,
    )
    min_gain: float | None = option(
        None,
        flag="--rebalance-min-gain",
        help="max/mean by which a new placement must be better on steps that it was not planned for, beside the price "
        "of its bytes; default: 0.02, and eplb takes whatever it plans",
        minimum=0,
        group=REBALANCING,
    )
    room_bytes: int | None = option(
        None,
        flag="--rebalance-room",
        help="bytes of a rank, beside its budget, for what arrives, such as 64MiB; they count when memory is checked, "
        "the 4 MiB for each rank of the node that something is sent to do not; "
        "default: one expert of the largest format",
        minimum=1,
        metavar="BYTES",
        parse=lambda size: parse_bytes(str(size), "--rebalance-room"),
        group=REBALANCING,
    )
    bytes_per_step: int | None = option(
        None,
        flag="--rebalance-bytes-per-step",
        help="bytes that reach a rank in a step at most, such as 4MiB; default: those that a thread moves in a 25th of "
        "a core's time or, where each rank has a core to spare, in half of it",
        minimum=1,
        metavar="BYTES",
        parse=lambda size: parse_bytes(str(size), "--rebalance-bytes-per-step"),
        group=REBALANCING,
    )

    def __post_init__(self) -> None:
        check_options(self)

    def applied_to(self, rule: "RebalanceRule") -> "RebalanceRule":
        """The rule with what the user has said."""
        names = {field.name for field in fields(rule)} & {field.name for field in fields(RebalanceOptions)}
        said = {name: value for name in sorted(names) if (value := getattr(self, name)) is not None}
        return replace(rule, **said)
