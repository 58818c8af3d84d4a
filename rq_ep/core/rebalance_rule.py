"""When a placement that serves is replaced by another: what is observed, how often, and what a change must gain."""

from dataclasses import dataclass

from rq_ep.core.options import check_options, option


@dataclass(frozen=True, kw_only=True)
class RebalanceRule:
    """The rule of a strategy; each field may be set by the user. Steps are those of the group that route tokens."""

    window: int = option(
        256, flag="--rebalance-window", help="steps whose loads a new placement is planned for", minimum=16
    )
    interval: int = option(
        64,
        flag="--rebalance-interval",
        help="steps between two decisions; after a change the next decision waits for a whole window",
        minimum=1,
    )
    min_gain: float | None = option(
        0.02,
        flag="--rebalance-min-gain",
        help="max/mean, mean over steps and layers, by which a new placement must be better on steps that it was not "
        "planned for; null: whatever is planned is taken",
        minimum=0,
    )
    min_share: float = option(
        0.25,
        flag="--rebalance-min-share",
        help="share of what max/mean is above 1 that a new placement must remove: what stays is mostly chance",
        minimum=0,
        maximum=1,
    )
    price: float = option(
        0.1,
        flag="--rebalance-price",
        help="max/mean that moving as many bytes as all experts take must gain besides",
        minimum=0,
    )

    def __post_init__(self) -> None:
        check_options(self)
