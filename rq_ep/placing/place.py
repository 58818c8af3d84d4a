"""The verb `place`: from statistics and a budget to a placement, from nothing or from one that serves already."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import UserError, check_number
from rq_ep.core.placement import Placement
from rq_ep.core.problem import Objective, PlacementProblem, standard_ep_bytes
from rq_ep.core.rules import Rules
from rq_ep.core.stats import ExpertStats
from rq_ep.core.strategy import Strategy
from rq_ep.core.topology import Topology
from rq_ep.placing.engine_slots import EqualSlots
from rq_ep.solver.certificate.what_if import what_if as solve_again
from rq_ep.solver.migration.warm_start import MIN_GAIN, left_of, place_again
from rq_ep.strategies import make_strategy
from rq_ep.strategies.eplb import Eplb
from rq_ep.strategies.rq import ReplicateQuantize

UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
MAX_DIGITS = 40  # of a size; Python reads thousands, slowly


def place(
    stats: ExpertStats | str | Path,
    num_ranks: int,
    budget: str | int | Sequence[int] | None = "ep",
    *,
    strategy: str | Strategy = "rq",
    formats: Sequence[str] | None = None,
    ranks_per_node: int = 0,
    max_low_precision_share: float = 0.25,
    max_error: float | None = None,
    mixed_replicas: bool = False,
    tokens_per_step: int | None = None,
    num_redundant_experts: int = 0,
    objective: Objective = "prefill",
    cost: LayerCost | None = None,
    tail_weight: float = 0.0,
    rules: Rules | str | Path | None = None,
    time_limit_s: float | None = None,
    num_workers: int = 1,
    current: Placement | str | Path | None = None,
    lost_ranks: Sequence[int] = (),
    max_moved_bytes: int | None = None,
    move_price: float = 0.0,
    min_gain: float = MIN_GAIN,
    equal_slots: bool = False,
    what_if: bool = False,
    seed: int = 0,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> Placement:
    """Place a model's experts on `num_ranks` ranks.

    Args:
        stats: what `calibrate` returned, or the file it was written to.
        num_ranks: ranks of the expert-parallel group.
        budget: expert bytes of each rank, over all layers: `ep` for what standard EP's fullest rank takes, a number,
            text such as `80GiB` or `10GiB,12GiB` (one for each rank; 0: the rank shall hold nothing), a sequence, or
            None for no limit.
        strategy: a name from `rq_ep.strategies.STRATEGIES`, or one with its own settings.
        formats: weight formats that may be used; default: all that the statistics know.
        ranks_per_node: 0 if all ranks share a node.
        max_low_precision_share: cap on the share of routed pairs computed below the native format.
        max_error: cap on the importance-weighted mean of the experts' relative output errors, as calibrated.
        mixed_replicas: allow native experts further replicas in the smallest format, for at most half of their pairs in
            each step, those of the lowest gates; what these compute of the calibration steps counts against both caps.
        tokens_per_step: the batch size that will be served; default: as calibrated.
        num_redundant_experts: extra replicas per layer, for strategies that count replicas instead of bytes.
        objective: what is balanced: `prefill` pairs, `decode` bytes of activated experts, `mixed` by recorded phase.
        cost: of a layer on the machine that will serve; pairs and bytes are weighed by it.
        tail_weight: 0 for the mean over steps, 1 for the mean of the worst tenth, or between.
        rules: fixed and forbidden replicas, spread over nodes; or the YAML file that says so.
        time_limit_s: the best found until then, which depends on the clock; default: until the search ends.
        num_workers: processes that solve layers; the answer does not depend on them.
        current: the placement that serves now, or its file: staying, moving in part and moving all are compared.
            It may have another number of ranks.
        lost_ranks: ranks of `current` that are gone.
        max_moved_bytes: cap on what all ranks together receive.
        move_price: max/mean that moving as many bytes as the whole budget must gain.
        min_gain: max/mean by which a placement must be better than staying.
        equal_slots: place for an engine of equal slots, one format and even splits: eplb, then a search from there.
        what_if: solve again with more bytes and more low pairs, and for half of the record; told in the certificate.
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
    if not stats.counts.any():
        raise UserError(f"{stats.source}: 0 routed pairs in {stats.num_steps} steps: calibrate again, on more text")
    topology = Topology(num_ranks, ranks_per_node)
    if isinstance(strategy, str):
        strategy = make_strategy(strategy)
    if num_redundant_experts and not isinstance(strategy, Eplb):
        raise UserError(
            f"--num-redundant-experts {num_redundant_experts}: only eplb counts replicas; strategy {strategy.name!r} "
            "goes by --budget"
        )
    check_number("--min-gain", min_gain, 0)
    if mixed_replicas and (equal_slots or not isinstance(strategy, ReplicateQuantize)):
        asked = "--for: these engines store one format" if equal_slots else f"strategy {strategy.name!r} cannot"
        raise UserError(
            f"--mixed-replicas: {asked}; only rq splits an expert over two formats, leave it out or place so"
        )
    problem = PlacementProblem(
        stats=stats,
        topology=topology,
        budget_bytes_R=parse_budget(budget, stats, num_ranks)
        if isinstance(budget, str)
        else _as_tuple(budget, num_ranks),
        formats=tuple(dict.fromkeys(formats or ([stats.native_format] if equal_slots else stats.formats))),
        max_low_precision_share=max_low_precision_share,
        tokens_per_step=tokens_per_step,
        num_redundant_experts=num_redundant_experts,
        seed=seed,
        objective=objective,
        cost=cost,
        tail_weight=tail_weight,
        max_error=max_error,
        mixed_replicas=mixed_replicas,
        rules=rules if isinstance(rules, Rules) else Rules() if rules is None else Rules.load(rules),
        time_limit_s=time_limit_s,
        num_workers=num_workers,
        max_moved_bytes=max_moved_bytes,
        move_price=move_price,
        on_progress=on_progress,
    )
    if equal_slots:
        strategy = EqualSlots.of(strategy)
    left = None if current is None else left_of(current, stats, num_ranks, lost_ranks)
    if left is None and (lost_ranks or max_moved_bytes is not None or move_price):
        raise UserError("--lost-ranks, --max-moved-bytes and --move-price speak of the way from --current: name that")
    try:
        placement = strategy.place(problem) if left is None else place_again(strategy, problem, left, min_gain)
    except UserError as error:
        if num_redundant_experts and budget == "ep":
            raise UserError(
                f"--num-redundant-experts {num_redundant_experts} needs more bytes than --budget ep, "
                f"which is what standard EP takes ({error})"
            ) from None
        raise
    if not what_if:
        return placement
    quiet = replace(problem, on_progress=lambda fraction: None, max_moved_bytes=None, move_price=0.0)
    rows = solve_again(quiet, strategy.place)
    return replace(placement, certificate={**placement.certificate, "what_if": rows})


def parse_budget(text: str, stats: ExpertStats, num_ranks: int) -> tuple[int, ...]:
    """[R] expert bytes of each rank from `ep`, one size, or a comma-separated size for each rank."""
    if text.strip().lower() == "ep":
        return (standard_ep_bytes(stats, num_ranks),) * num_ranks
    parts = text.split(",")
    sizes = tuple(parse_bytes(part, "--budget", text, least=0 if len(parts) > 1 else 1) for part in parts)
    if len(sizes) not in (1, num_ranks):
        raise UserError(f"--budget {text}: {len(sizes)} sizes for {num_ranks} ranks; give one, or one for each rank")
    return sizes * num_ranks if len(sizes) == 1 else sizes


def parse_bytes(part: str, flag: str, text: str | None = None, least: int = 0) -> int:
    """Bytes from a number with or without a unit.

    Args:
        part: such as `512MiB`.
        flag: it was given with, for messages.
        text: the whole of what was given; default: `part`.
        least: smallest number of bytes that makes sense.
    """
    text = part if text is None else text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", part, re.IGNORECASE | re.ASCII)
    if match is None or match[2].lower() not in UNITS or len(match[1]) > MAX_DIGITS:
        known = "write ep, bytes, or" if flag == "--budget" else "write bytes, or"
        raise UserError(
            f"{flag} {text:.80}: {part!r:.60} is not a size; {known} a number with KiB, MiB, GiB, KB, MB or GB"
        )
    unit = UNITS[match[2].lower()]
    size = int(match[1]) * unit if match[1].isdigit() else round(float(match[1]) * unit)
    if size < least:
        raise UserError(f"{flag} {text}: {part!r} must be at least one byte")
    return size


def _as_tuple(budget: int | Sequence[int] | None, num_ranks: int) -> tuple[int, ...] | None:
    if budget is None:
        return None
    return tuple(budget) if isinstance(budget, Iterable) else (budget,) * num_ranks
