"""A placement that is planned again after the domain of the text has changed: gain, bytes, time; no tensors, no ranks.

    python -m bench replan                                                     # synthetic domains, 8 layers
    python -m bench replan --cases 64x8:0.1 256x32:0.1 --layers 58 --seeds 1   # how long planning takes
    python -m bench replan --domains c=C,C_HELD_OUT prose=PROSE,PROSE_HELD_OUT --num-ranks 4   # of `rq-ep calibrate`
    python -m bench replan --domains ... --least-bytes 120   # proven: what any planner must move, by a MILP of 120 s

The placement of one domain serves another. `decide` plans from it on 128 steps, the solver places anew on half of
them, and both are scored on steps that neither saw, as in `bench solver`. EPLB's map change is what differs between its
placements of both domains, in as many slots as standard EP has.

`--least-bytes` asks how few bytes a planner could do with that knows the steps to come (`bench/solver/least_moves.py`).
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from bench.options import bench_parser, check_positive
from bench.result import result_document
from bench.solver.least_moves import least_moves
from bench.solver.score import score
from bench.solver.solver import LOW_BYTES, SIZES_HELP, Case
from bench.solver.synthetic_traces import draw_domain_change
from rq_ep.commands.console import wide_console
from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError, check_choice, check_number
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.problem import PlacementProblem, contiguous, standard_ep_bytes
from rq_ep.core.replicas import Replica
from rq_ep.core.stats import PHASES, ExpertStats
from rq_ep.core.strategy import RebalanceRule
from rq_ep.core.topology import Topology
from rq_ep.rebalancing.live_placement import LivePlacement
from rq_ep.rebalancing.rebalancer import Decision, Rebalancer, decide
from rq_ep.rebalancing.replan import moved_bytes
from rq_ep.rebalancing.staged_moves import StagedMoves
from rq_ep.solver.certificate.certify import certify
from rq_ep.solver.migration.move_rounds import MoveRound, move_rounds
from rq_ep.strategies.eplb import Eplb
from rq_ep.strategies.rq import ReplicateQuantize

STRATEGY = ReplicateQuantize()
WINDOW = 128  # steps that a decision sees; half of them are planned for
STEPS_OF_AN_EXPERT = 10  # that a native expert takes to arrive
SHARE_OF_GAIN = 0.9  # that the least bytes are asked for
SLACK = 0.02  # within which a placement counts as good as the one that was placed anew


@dataclass(frozen=True)
class Change:
    """A change of domain; statistics of the problem are those of before."""

    name: str
    problem: PlacementProblem
    after_SLE: IntArray  # served and observed
    held_out_SLE: IntArray  # of the same domain

    @property
    def anew(self) -> PlacementProblem:
        """The problem for half of the steps that a decision sees."""
        return replace(self.problem, stats=replace(self.problem.stats, counts=self.after_SLE[:WINDOW:2], phase=None))

    def score(self, placement: Placement) -> float:
        return score(placement, self.held_out_SLE).integer


def decision_of(change: Change, current: Placement, price: float) -> tuple[Decision, float]:
    """What is decided after `WINDOW` steps, whatever it gains, and the CPU seconds that it takes, warm."""
    rule = replace(STRATEGY.rebalance_rule or RebalanceRule(), price=price, min_gain=0.0, min_share=0.0)
    rebalancer = Rebalancer(change.problem, STRATEGY, current, rule)
    for counts_LE in change.after_SLE[:WINDOW]:
        rebalancer.observe(counts_LE)
    request = rebalancer.request()
    decide(request)
    started_s = time.process_time()
    return decide(request), time.process_time() - started_s


def eplb_bytes(change: Change) -> int:
    """Bytes of the replicas that EPLB's placement of the new domain has where that of the old one has none."""
    old, new = (Eplb().layers(problem) for problem in (change.problem, change.anew))
    replicas = [
        {(one.rank, one.expert) for one in after.replicas} - {(one.rank, one.expert) for one in before.replicas}
        for before, after in zip(old, new, strict=True)
    ]
    return change.problem.native_bytes * sum(map(len, replicas))


class Timeline(NamedTuple):
    """Steps of a migration, one after another, and the max/mean after them."""

    steps: list[int]
    imbalance: list[float]

    def step_of(self, limit: float) -> int | None:
        """The first step from which on the max/mean is at a limit, or below."""
        above = [number for number, value in enumerate(self.imbalance) if value > limit]
        first = above[-1] + 1 if above else 0
        return self.steps[first] if first < len(self.steps) else None


def timeline(change: Change, current: Placement, rounds: Sequence[MoveRound], goal: Placement) -> Timeline:
    """A migration, step by step, where a native expert takes `STEPS_OF_AN_EXPERT` steps to arrive."""
    layers = list(current.layers)
    values = [_layer_score(change, layers, position) for position in range(len(layers))]
    stats = change.problem.stats
    moves = StagedMoves(
        rounds, current.topology.num_ranks, stats.expert_bytes, change.problem.native_bytes // STEPS_OF_AN_EXPERT
    )
    steps, imbalance, step = [0], [float(np.mean(values))], 0
    while not moves.is_done:
        step += 1
        if (arrived := moves.step()) is None:
            continue
        layers = arrived.applied_to(layers, goal)
        for position in arrived.layers:
            values[position] = _layer_score(change, layers, position)
        steps.append(step)
        imbalance.append(float(np.mean(values)))
    return Timeline(steps, imbalance)


def _layer_score(change: Change, layers: Sequence[LayerPlacement], position: int) -> float:
    one = Placement(
        (layers[position],), STRATEGY.name, change.problem.topology, (0,) * change.problem.topology.num_ranks
    )
    return score(one, change.held_out_SLE[::4, position : position + 1]).integer


def steps_to_half(change: Change, current: Placement, goal: Placement) -> dict[str, int | None]:
    """Steps until half of the imbalance that a migration removes is gone, with low replicas or native ones first."""
    stats = change.problem.stats
    held = [list(layer.replicas) for layer in current.layers]
    room_bytes = change.problem.native_bytes
    steps = {}
    for name, low_is_first in (("low_first", True), ("native_first", False)):

        def value(layer: int, replica: Replica, low_is_first: bool = low_is_first) -> float:
            return float((replica.format != stats.native_format) == low_is_first)

        rounds = move_rounds(held, goal, stats.expert_bytes, stats.native_format, room_bytes, value)
        line = timeline(change, current, rounds, goal)
        steps[name] = line.step_of((line.imbalance[0] + line.imbalance[-1]) / 2)
    return steps


def learnt(change: Change, calibrated: float) -> dict[str, float]:
    """From standard EP, with no statistics: the step from which on a placement serves that is as good as calibrated."""
    stats = change.problem.stats
    uniform = ExpertStats.uniform(stats.layers, stats.num_experts, stats.expert_bytes, stats.native_format)
    problem = replace(change.problem, stats=replace(uniform, top_k=stats.top_k))
    live = LivePlacement(Rebalancer(problem, STRATEGY, certify(problem, STRATEGY, contiguous(problem))))
    start = change.score(live.placement)
    for counts_LE in change.after_SLE:
        num_before = live.num_rebalances
        live.step(counts_LE)
        if live.num_rebalances > num_before and change.score(live.placement) <= calibrated + SLACK:
            break
    step = live.commits[-1].step if live.commits else len(change.after_SLE)
    return {"standard": start, "learnt": change.score(live.placement), "learnt_step": step}


def least_bytes(change: Change, current: Placement, limit: float, args: argparse.Namespace) -> dict[str, float]:
    """What any planner moves at least for a max/mean of `limit`, and what the best placement that was found does."""
    least = least_moves(change.anew, current, change.held_out_SLE, limit, args.groups, args.least_bytes)
    figures: dict[str, float] = {"least_bytes": least.bound}
    if least.layers is not None:
        found = replace(current, layers=tuple(least.layers))
        figures |= {"found_bytes": moved_bytes(change.anew, current, found), "found": change.score(found)}
    return figures


def measure(change: Change, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each price of moved bytes."""
    current = STRATEGY.place(change.problem)
    started_s = time.process_time()
    fresh = STRATEGY.place(change.anew)
    fresh_cpu_s = time.process_time() - started_s
    figures: dict[str, Any] = {
        "change": change.name,
        "layers": len(current.layers),
        "stale": change.score(current),
        "fresh": change.score(fresh),
        "fresh_cpu_s": fresh_cpu_s,
    }
    if args.learn:
        figures |= learnt(change, figures["fresh"])
    to_gain = figures["stale"] - figures["fresh"]
    budget, of_eplb = sum(change.problem.budget_bytes_R or current.bytes_R), eplb_bytes(change)
    if args.least_bytes and to_gain >= SLACK:
        least = least_bytes(change, current, figures["stale"] - SHARE_OF_GAIN * to_gain, args)
        figures |= {name: value / max(of_eplb, 1) if "bytes" in name else value for name, value in least.items()}
    rows = []
    by_rule = (STRATEGY.rebalance_rule or RebalanceRule()).price_among(change.problem.stats.num_experts)
    for price in args.prices or (by_rule, 0.0):
        decision, cpu_s = decision_of(change, current, price)
        goal = decision.placement or current
        line = timeline(change, current, decision.rounds, goal)
        replanned = change.score(goal)
        moved = 0 if decision.stays else decision.moved_bytes
        rows.append(
            figures
            | {
                "price": price,
                "replanned": replanned,
                "gain_share": None if to_gain < SLACK else (figures["stale"] - replanned) / to_gain,
                "moved": moved / budget,
                "moved_of_eplb": moved / max(of_eplb, 1),
                "rounds": len(decision.rounds),
                "cpu_s": cpu_s,
                "half_step": line.step_of((line.imbalance[0] + line.imbalance[-1]) / 2),
                "last_step": line.steps[-1],
                **{f"half_step_{name}": step for name, step in steps_to_half(change, current, goal).items()},
            }
        )
    return rows


def changes(args: argparse.Namespace) -> Iterator[Change]:
    """Changes between recorded domains, where files are given; else between halves of a synthetic model's domains."""
    if args.domains:
        yield from recorded_changes(args)
        return
    for case, tokens, seed in product(args.cases, args.tokens, range(args.seeds)):
        steps = (args.calibration_steps, WINDOW + args.more_steps + args.held_out_steps)
        trace = draw_domain_change("ln1.2", case.num_experts, case.top_k, tokens, args.layers, steps, seed)
        served, held_out = np.split(trace.held_out_SLE, [WINDOW + args.more_steps])
        yield Change(f"{case.name} {tokens} seed {seed}", case.problem(trace, args.low, seed), served, held_out)


def recorded_changes(args: argparse.Namespace) -> Iterator[Change]:
    """Changes from each domain to each other one, by their prefill steps."""
    recorded = {name: [ExpertStats.load(path) for path in paths] for name, paths in args.domains.items()}

    def prefill_SLE(stats: ExpertStats) -> IntArray:
        return stats.counts if stats.phase is None else stats.counts[stats.phase == PHASES.index("prefill")]

    for (before, (calibration, _)), (after, (served, held_out)) in permutations(recorded.items(), 2):
        stats = replace(calibration, counts=prefill_SLE(calibration), phase=None, tokens=None, domain=None, domains=())
        budget = standard_ep_bytes(stats, args.num_ranks)
        problem = PlacementProblem(
            stats, Topology(args.num_ranks), (budget,) * args.num_ranks, stats.formats, max_low_precision_share=args.cap
        )
        yield Change(f"{before} -> {after}", problem, prefill_SLE(served), prefill_SLE(held_out))


def table_of(rows: list[dict[str, Any]]) -> Table:
    columns = ["change", "price", "stale", "again", "anew", "gain", "of budget", "of EPLB's", "rounds"]
    columns += ["half", "low first", "native first", "CPU s", "anew CPU s", "from nothing", "least bytes"]
    table = Table(*columns, box=None)
    for row in rows:
        from_nothing = "-"
        if "learnt" in row:
            from_nothing = f"{row['standard']:.3f} -> {row['learnt']:.3f} at {row['learnt_step']}"
        least = "-"
        if "least_bytes" in row:
            least = f">= {row['least_bytes']:.1%}"
        if "found" in row:
            least += f"; {row['found']:.3f} for {row['found_bytes']:.1%}"
        table.add_row(
            row["change"], f"{row['price']:g}", *(f"{row[key]:.3f}" for key in ("stale", "replanned", "fresh")),
            *("-" if row[key] is None else f"{row[key]:.0%}" for key in ("gain_share", "moved", "moved_of_eplb")),
            str(row["rounds"]),
            *(str(row[key]) for key in ("half_step", "half_step_low_first", "half_step_native_first")),
            f"{row['cpu_s']:.2f}", f"{row['fresh_cpu_s']:.2f}", from_nothing, least,
        )  # fmt: skip
    return table


def _domain(text: str) -> tuple[str, tuple[str, str]]:
    name, equals, files = text.partition("=")
    first, comma, second = files.partition(",")
    if not (equals and comma and second):
        raise UserError(f"--domains {text}: write NAME=STATS,HELD_OUT_STATS")
    return name, (first, second)


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = bench_parser("replan", __doc__)
    parser.add_argument(
        "--cases", nargs="+", default=["64x8:0.1", "256x32:0.1"], metavar="ExR:CAP[:SLOTS]", help=SIZES_HELP
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096], metavar="N", help="of all ranks in a step")
    parser.add_argument("--low", default="int8:504", metavar="NAME", help="the low format")
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="layers that share the bytes")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="changes of each case")
    parser.add_argument(
        "--prices", nargs="+", type=float, default=[], metavar="P", help="of moved bytes (default: the rule's, and 0)"
    )
    parser.add_argument("--domains", nargs="+", default=[], metavar="NAME=STATS,HELD_OUT", help="recorded, by prefill")
    parser.add_argument("--num-ranks", type=int, default=4, metavar="R", help="of recorded domains")
    parser.add_argument("--cap", type=float, default=0.25, metavar="SHARE", help="of low pairs, of recorded domains")
    parser.add_argument("--calibration-steps", type=int, default=64, metavar="N", help="of the domain before")
    parser.add_argument("--more-steps", type=int, default=128, metavar="N", help="served besides, where it learns")
    parser.add_argument("--held-out-steps", type=int, default=64, metavar="N", help="steps that score")
    parser.add_argument("--learn", action="store_true", help="serve from standard EP with no statistics as well")
    parser.add_argument(
        "--least-bytes", type=float, default=0, metavar="SECONDS", help="for 90 %% of the gain; of a few experts"
    )
    parser.add_argument("--groups", type=int, default=2, metavar="N", help="of held-out steps, for --least-bytes")
    parser.add_argument("--json", metavar="FILE", help="write the figures with command, commit and versions")
    args = parser.parse_args(argv)
    args.cases = [Case.parse(text) for text in args.cases]
    args.domains = dict(map(_domain, args.domains))
    check_choice("format", args.low, LOW_BYTES)
    check_positive(args, "layers", "seeds", "calibration_steps", "held_out_steps", "num_ranks", "tokens", "groups")
    for price in args.prices:
        check_number("--prices", price, 0)
    check_number("--least-bytes", args.least_bytes, 0)
    if args.json:
        check_writable(args.json)
    return args


def main(argv: Sequence[str]) -> None:
    """Plan again after each change; print the table."""
    args = parse_options(argv)
    rows = []
    for change in changes(args):
        rows += measure(change, args)
    wide_console(180).print(table_of(rows))
    if args.json:
        write_json(args.json, result_document("replan", argv, args, rows=rows))
