"""The verb `place`: from statistics and a budget to a placement."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem, standard_ep_bytes
from rq_ep.core.stats import ExpertStats
from rq_ep.core.strategy import Strategy
from rq_ep.core.topology import Topology
from rq_ep.strategies import make_strategy
from rq_ep.strategies.eplb import Eplb

UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def place(
    stats: ExpertStats | str | Path,
    num_ranks: int,
    budget: str | int | Sequence[int] | None = "ep",
    *,
    strategy: str | Strategy = "rq",
    formats: Sequence[str] | None = None,
    ranks_per_node: int = 0,
    max_low_precision_share: float = 0.25,
    tokens_per_step: int | None = None,
    num_redundant_experts: int = 0,
    seed: int = 0,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> Placement:
    """Place a model's experts on `num_ranks` ranks.

    Args:
        stats: what `calibrate` returned, or the file it was written to.
        num_ranks: ranks of the expert-parallel group.
        budget: expert bytes of each rank, over all layers: `ep` for what standard EP's fullest rank takes, a number,
            text such as `80GiB` or `10GiB,12GiB` (one for each rank), a sequence, or None for no limit.
        strategy: a name from `rq_ep.strategies.STRATEGIES`, or one with its own settings.
        formats: weight formats that may be used; default: all that the statistics know.
        ranks_per_node: 0 if all ranks share a node.
        max_low_precision_share: cap on the share of routed pairs computed below the native format.
        tokens_per_step: the batch size that will be served; default: as calibrated.
        num_redundant_experts: extra replicas per layer, for strategies that count replicas instead of bytes.
        seed: of everything random.
        on_progress: told the fraction done, now and then.

    Raises:
        UserError: an argument is out of range, or the budget too small (the message says what would do).
    """
    if not isinstance(stats, ExpertStats):
        stats = ExpertStats.load(stats)
    if not stats.num_layers or not stats.num_experts:
        raise UserError(
            f"{stats.source}: {stats.num_layers} MoE layers of {stats.num_experts} experts: nothing to place"
        )
    topology = Topology(num_ranks, ranks_per_node)
    if isinstance(strategy, str):
        strategy = make_strategy(strategy)
    if num_redundant_experts and not isinstance(strategy, Eplb):
        raise UserError(
            f"--num-redundant-experts {num_redundant_experts}: only eplb counts replicas; strategy {strategy.name!r} "
            "goes by --budget"
        )
    problem = PlacementProblem(
        stats=stats,
        topology=topology,
        budget_bytes_R=parse_budget(budget, stats, num_ranks)
        if isinstance(budget, str)
        else _as_tuple(budget, num_ranks),
        formats=tuple(dict.fromkeys(formats or stats.formats)),
        max_low_precision_share=max_low_precision_share,
        tokens_per_step=tokens_per_step,
        num_redundant_experts=num_redundant_experts,
        seed=seed,
        on_progress=on_progress,
    )
    try:
        return strategy.place(problem)
    except UserError as error:
        if num_redundant_experts and budget == "ep":
            raise UserError(
                f"--num-redundant-experts {num_redundant_experts} needs more bytes than --budget ep, "
                f"which is what standard EP takes ({error})"
            ) from None
        raise


def parse_budget(text: str, stats: ExpertStats, num_ranks: int) -> tuple[int, ...]:
    """[R] expert bytes of each rank from `ep`, one size, or a comma-separated size for each rank."""
    if text.strip().lower() == "ep":
        return (standard_ep_bytes(stats, num_ranks),) * num_ranks
    sizes = tuple(_parse_bytes(part, text) for part in text.split(","))
    if len(sizes) not in (1, num_ranks):
        raise UserError(f"--budget {text}: {len(sizes)} sizes for {num_ranks} ranks; give one, or one for each rank")
    return sizes * num_ranks if len(sizes) == 1 else sizes


def _parse_bytes(part: str, text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", part, re.IGNORECASE)
    if match is None or match[2].lower() not in UNITS:
        raise UserError(
            f"--budget {text}: {part!r} is not a size; write ep, bytes, or a number with KiB, MiB, GiB, KB, MB or GB"
        )
    size = (
        int(match[1]) * UNITS[match[2].lower()]
        if match[1].isdigit()
        else round(float(match[1]) * UNITS[match[2].lower()])
    )
    if size < 1:
        raise UserError(f"--budget {text}: {part!r} must be at least one byte")
    return size


def _as_tuple(budget: int | Sequence[int] | None, num_ranks: int) -> tuple[int, ...] | None:
    if budget is None:
        return None
    return tuple(budget) if isinstance(budget, Iterable) else (budget,) * num_ranks
