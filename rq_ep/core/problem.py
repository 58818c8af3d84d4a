"""The placement problem: statistics, ranks, and the limits that a placement must keep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import UserError, check_integer
from rq_ep.core.moves import Held
from rq_ep.core.options import check_options, option, parse_bytes
from rq_ep.core.placement import LayerPlacement, Placement, bytes_by_rank
from rq_ep.core.replicas import Replica
from rq_ep.core.rules import Rules
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology, home_ranks

Objective = Literal["prefill", "decode", "mixed"]
MAX_WORKERS = 1024


LIMITS = "limits, what the placement must keep to"
SEARCH = "search, what is balanced and for how long"
MIGRATION = "from a placement that serves: stay, move in part, or move all"


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """Limits and aims of a placement, as the user gives them and as every strategy reads them."""

    max_low_precision_share: float = option(
        0.25,
        help="cap on the share of routed pairs computed below the native format",
        minimum=0,
        maximum=1,
        group=LIMITS,
    )
    max_error: float | None = option(
        None,
        help="cap on the experts' relative output errors as calibrated, mean weighted by importance",
        minimum=0,
        group=LIMITS,
    )
    num_redundant_experts: int = option(
        0, help="extra replicas per layer, for strategies that count replicas instead of bytes", minimum=0, group=LIMITS
    )
    tokens_per_step: int | None = option(
        None, help="batch size that will be served; default: as calibrated", minimum=1, group=SEARCH
    )
    objective: Objective = option(
        "prefill",
        help="what is balanced: prefill (pairs), decode (bytes of activated experts), mixed (each step by its phase)",
        group=SEARCH,
    )
    tail_weight: float = option(
        0.0,
        help="w of (1 - w) * mean + w * CVaR90 of max/mean over calibration steps: 0 balances the mean step, 1 the "
        "mean of the worst tenth",
        minimum=0,
        maximum=1,
        group=SEARCH,
    )
    time_limit_s: float | None = option(
        None,
        flag="--time-limit",
        help="seconds; the best placement until then, which depends on the clock: without a limit the same seed gives "
        "the same placement",
        minimum=0,
        group=SEARCH,
    )
    num_workers: int = option(
        1,
        flag="--workers",
        help="threads that solve layers; the answer does not depend on them",
        minimum=1,
        maximum=MAX_WORKERS,
        group=SEARCH,
    )
    seed: int = option(0, help="seed of the search", minimum=0, group=SEARCH)
    max_moved_bytes: int | None = option(
        None,
        help="cap on what all ranks together receive, such as 512MiB",
        minimum=0,
        metavar="BYTES",
        parse=lambda size: parse_bytes(str(size), "--max-moved-bytes"),
        group=MIGRATION,
    )
    move_price: float = option(
        0.0,
        help="max/mean, mean over steps, that moving as many bytes as the whole budget must gain",
        minimum=0,
        group=MIGRATION,
    )


def ignore_progress(fraction: float) -> None:
    """Take the fraction done, and do nothing with it."""


@dataclass(frozen=True)
class PlacementProblem(SolverOptions):
    """The input of a placement strategy: the statistics, the ranks, and the limits to keep.

    `budget_bytes_R` None means that bytes are not limited (the result says how many it takes).
    """

    stats: ExpertStats
    topology: Topology
    budget_bytes_R: tuple[int, ...] | None = None
    formats: tuple[str, ...] = ()  # formats that may be used; default: the native one alone
    cost: LayerCost | None = None  # weighs pairs and bytes by format, in seconds; None: a pair is a pair, a byte a byte
    rules: Rules = field(default_factory=Rules)
    held: Held | None = None  # what ranks hold and need not receive; None: the placement that a search begins from
    on_progress: Callable[[float], None] = ignore_progress  # receives the fraction done, now and then

    def __post_init__(self) -> None:
        if not self.formats:
            object.__setattr__(self, "formats", (self.stats.native_format,))
        if missing := [name for name in self.formats if name not in self.stats.expert_bytes]:
            raise UserError(
                f"--formats {','.join(self.formats)}: {self.stats.source} has no sizes for {', '.join(missing)}; "
                f"it knows {', '.join(self.stats.formats)}"
            )
        if self.stats.native_format not in self.formats:
            native = self.stats.native_format
            raise UserError(f"--formats {','.join(self.formats)}: must name the native format {native}")
        check_options(self)
        self._check_search()
        if self.budget_bytes_R is not None:
            if len(self.budget_bytes_R) != self.topology.num_ranks:
                raise UserError(
                    f"--budget names {len(self.budget_bytes_R)} ranks, but --num-ranks is {self.topology.num_ranks}"
                )
            sizes = tuple(check_integer("--budget", size) for size in self.budget_bytes_R)
            object.__setattr__(self, "budget_bytes_R", sizes)

    @property
    def native_bytes(self) -> int:
        """Bytes of one expert in the native format."""
        return self.stats.expert_bytes[self.stats.native_format]

    def _check_search(self) -> None:
        if self.max_error is not None and self.stats.error is None:
            raise UserError(
                f"--max-error {self.max_error:g}: {self.stats.source} holds no measured errors; calibrate again, "
                "or cap pairs with --max-low-precision-share alone"
            )
        if self.objective == "mixed" and self.stats.phase is None:
            raise UserError(
                f"--objective mixed: {self.stats.source} does not say which steps are prefill and which decode; "
                "choose prefill or decode"
            )
        if self.cost is not None and (missing := [name for name in self.formats if name not in self.cost.pair_s]):
            raise UserError(f"--machine: has no times for format {', '.join(missing)}")
        self.rules.allowed_LER(self.stats, self.topology)  # raises where the rules cannot be kept

    def placement(self, strategy: str, layers: Sequence[LayerPlacement], **notes: Any) -> Placement:
        """Put layers together: add up bytes and low-precision pairs; refuse what breaks the budget or the rules."""
        bytes_R = bytes_by_rank(layers, self.topology.num_ranks, self.stats.expert_bytes)
        loads_LE = self.stats.counts.sum(axis=0)
        low_pairs = sum(
            layer.low_pairs(loads_E, self.stats.native_format) for layer, loads_E in zip(layers, loads_LE, strict=True)
        )
        if self.budget_bytes_R is not None:
            over_R = bytes_R - np.array(self.budget_bytes_R)
            worst = int(np.argmax(over_R))
            if over_R[worst] > 0:
                raise UserError(
                    f"strategy {strategy!r}: {bytes_R[worst]} bytes of experts on rank {worst} exceed its budget of "
                    f"{self.budget_bytes_R[worst]}: raise --budget to {int(bytes_R.max())}"
                )
        held_LER = np.zeros((len(layers), self.stats.num_experts, self.topology.num_ranks), bool)
        for held_ER, layer in zip(held_LER, layers, strict=True):
            held_ER[:] = layer.replicas.mask(*held_ER.shape)
        self.rules.check(held_LER, self.stats, self.topology, f"strategy {strategy!r}")
        return Placement(
            layers=tuple(layers),
            strategy=strategy,
            topology=self.topology,
            bytes_R=tuple(bytes_R.tolist()),
            budget_bytes_R=self.budget_bytes_R,
            model=self.stats.model,
            tokens_per_step=self.tokens_per_step,
            low_precision_cap=self.max_low_precision_share if len(self.formats) > 1 else None,
            low_precision_planned=low_pairs / max(int(loads_LE.sum()), 1),
            **notes,
        )


def contiguous(problem: PlacementProblem) -> list[LayerPlacement]:
    """Standard EP's layers: one native replica of each expert, on its home rank."""
    stats = problem.stats
    homes_E = home_ranks(stats.num_experts, problem.topology.num_ranks).tolist()
    replicas = [Replica(rank, expert, stats.native_format) for expert, rank in enumerate(homes_E)]
    return [LayerPlacement.even(layer, stats.num_experts, replicas) for layer in stats.layers]


def standard_ep_bytes(stats: ExpertStats, num_ranks: int) -> int:
    """Expert bytes of standard EP's fullest rank, over all layers, in the native format: the budget `ep`."""
    per_layer = -(-stats.num_experts // num_ranks)
    return per_layer * stats.num_layers * stats.expert_bytes[stats.native_format]
