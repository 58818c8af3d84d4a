"""From which imbalance on lending beats standard EP, and how near to perfect balance it comes. No tensors, no ranks.

    python -m bench breakeven --hidden-size 2048 --intermediate-size 2048       # the layer of the LLEP paper's Figure 6
    python -m bench breakeven --tokens-per-rank 4096 32768 --json bench/results/breakeven_NAME.json

First, break-even. A share of the pairs falls on 4 experts of rank 0 and grows; all strategies have standard EP's
replicas, so lending is all that differs. Printed is the excess, max/mean of standard EP less 1, from which on a
strategy takes less time, by modelled seconds and, in brackets, with the CPU time of planning, measured here, on top.
Second, speed-up over standard EP by scenario and, in brackets, as a fraction of max/mean, which perfect balance of
compute would bring. Seconds are `LayerCost.step` of a machine's peak rates, with nothing overlapped.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.table import Table

from bench.layer.published import SHAPES, Shape
from bench.layer.workloads import parse
from bench.options import bench_parser, check_positive
from bench.result import result_document
from rq_ep.commands.console import wide_console
from rq_ep.core.arrays import BoolArray, FloatArray, IntArray
from rq_ep.core.cost import LayerCost, LayerShape
from rq_ep.core.errors import UserError, check_integer
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.core.plan import imbalance
from rq_ep.core.problem import PlacementProblem, contiguous
from rq_ep.core.stats import ExpertStats
from rq_ep.core.strategy import Planner
from rq_ep.core.topology import Topology
from rq_ep.costs import cost_model
from rq_ep.placing.place import place
from rq_ep.strategies import make_strategy

NUM_HOT = 4  # experts of rank 0 that the break-even loads
NUM_EXCESSES = 80
MAX_TOKENS_PER_RANK = 2**16
NUM_CALIBRATION_STEPS = 8
CALIBRATION_TOKENS = 4096  # per rank
AUTO = {"min_tokens_per_gemm": "auto", "fallback_ratio": "auto"}


class Row(NamedTuple):
    """A contestant."""

    label: str
    strategy: str
    knobs: dict[str, Any]
    has_cost: bool  # whether its planner gets the cost of the layer
    placed_for: Literal["nothing", "balanced", "served"] = "nothing"  # load it knows; nothing: standard EP's replicas


LENDING = (
    Row("standard", "standard", {}, False),
    Row("llep", "llep", {}, False),
    Row("llep auto", "llep", AUTO, True),
    Row("rq_llep", "rq_llep", {}, True),
    Row("rq_llep int8", "rq_llep", {"transient_format": "int8"}, True),
)
SERVING = (
    *LENDING[:3],
    Row("rq_llep uncalibrated", "rq_llep", {}, True, "balanced"),
    Row("rq calibrated", "rq", {}, True, "served"),
)


class Layer(NamedTuple):
    """One layer on one machine."""

    shape: Shape
    num_ranks: int
    sizes: dict[str, int]  # format -> bytes of an expert
    cost: LayerCost

    @classmethod
    def of(cls, shape: Shape, num_ranks: int, machine: str) -> "Layer":
        matrices = 3 * shape.hidden_size * shape.intermediate_size
        sizes = {"bf16": 2 * matrices, "int8": matrices + 4 * (2 * shape.intermediate_size + shape.hidden_size)}
        cost = cost_model(machine).layer(LayerShape(shape.hidden_size, shape.intermediate_size, sizes))
        return cls(shape, num_ranks, sizes, cost)

    def planner(self, row: Row, scenario: str) -> Planner:
        """A contestant's planner, placed inside standard EP's bytes, in bf16 and int8."""
        strategy = make_strategy(row.strategy, **row.knobs)
        known = scenario if row.placed_for == "served" else "balanced"
        recorded_SE = [
            self.counts(known, CALIBRATION_TOKENS, "calibrate", step).sum(axis=0)
            for step in range(NUM_CALIBRATION_STEPS)
        ]
        stats = ExpertStats(np.stack(recorded_SE)[:, None], tuple(self.sizes), "bf16", self.sizes)
        if row.placed_for == "nothing":
            placed = contiguous(PlacementProblem(stats, Topology(self.num_ranks)))[0]
        else:
            placed = place(stats, self.num_ranks, strategy=strategy).layers[0]
        return strategy.planner(placed, Topology(self.num_ranks), self.cost if row.has_cost else None)

    def counts(self, scenario: str, tokens_per_rank: int, stage: str, step: int) -> IntArray:
        """[R, E] routed pairs, drawn as `layer.py` draws them."""
        workload = parse(scenario, self.shape, tokens_per_rank)
        ids = (workload.ids(0, stage, step, rank, self.num_ranks) for rank in range(self.num_ranks))
        return np.stack([np.bincount(ids_TK.ravel(), minlength=self.shape.num_experts) for ids_TK in ids])

    def expected(self, excess: float, tokens_per_rank: int) -> IntArray:
        """[R, E] pairs in their exact shares, rank 0 with 1 + excess times the mean."""
        num_experts, pairs = self.shape.num_experts, tokens_per_rank * self.shape.top_k
        native = -(-num_experts // self.num_ranks)
        # A share p on the hot experts loads rank 0 with p + (1 - p) * (native - hot) / (experts - hot) of all pairs.
        cold = (native - NUM_HOT) / (num_experts - NUM_HOT)
        share = ((1 + excess) / self.num_ranks - cold) / (1 - cold)
        shares_E = np.full(num_experts, (1 - share) / (num_experts - NUM_HOT))
        shares_E[:NUM_HOT] = share / NUM_HOT
        ends_E = np.floor(np.cumsum(shares_E) * pairs + 0.5).astype(np.int64)
        return np.tile(np.diff(ends_E, prepend=0), (self.num_ranks, 1))


def break_even(layer: Layer, tokens_per_rank: int) -> list[dict[str, Any]]:
    """For each strategy the excess from which on it is faster than standard EP; None if it never is."""
    planners = [layer.planner(row, "balanced") for row in LENDING]
    excess_X = np.geomspace(0.01, 0.92 * (layer.num_ranks - 1), NUM_EXCESSES)
    modelled_s_NX, plan_s_NX = np.zeros((2, len(LENDING), NUM_EXCESSES))
    for x, excess in enumerate(excess_X.tolist()):
        counts_RE = layer.expected(excess, tokens_per_rank)
        for n, planner in enumerate(planners):
            modelled_s_NX[n, x] = layer.cost.step(planner(counts_RE)).layer_s
            plan_s_NX[n, x] = _cpu_s(planner, counts_RE)
    total_s_NX = modelled_s_NX + plan_s_NX
    return [
        {
            "row": row.label,
            "tokens_per_rank": tokens_per_rank,
            "excess": _crossing(excess_X, modelled_s_NX[n] < modelled_s_NX[0]),
            "excess_with_planning": _crossing(excess_X, total_s_NX[n] < total_s_NX[0]),
            "plan_s": float(np.median(plan_s_NX[n])),
        }
        for n, row in enumerate(LENDING)
        if n > 0
    ]


def _crossing(excess_X: FloatArray, is_faster_X: BoolArray) -> float | None:
    """The least excess from which on all are faster."""
    slower = np.flatnonzero(~is_faster_X)
    first = int(slower[-1]) + 1 if len(slower) else 0
    return float(excess_X[first]) if first < len(excess_X) else None


def _cpu_s(planner: Planner, counts_RE: IntArray) -> float:
    """CPU seconds of a plan, median of a few."""
    seconds = []
    for _ in range(7):
        started = time.thread_time()
        planner(counts_RE)
        seconds.append(time.thread_time() - started)
    return float(np.median(seconds))


def speed_ups(layer: Layer, scenario: str, sizes: list[int]) -> list[dict[str, Any]]:
    """Every strategy of one scenario, at all sizes of a step."""
    planners = [layer.planner(row, scenario) for row in SERVING]
    rows = []
    for tokens_per_rank in sizes:
        counts_RE = layer.counts(scenario, tokens_per_rank, "measure", 0)
        plans = [planner(counts_RE) for planner in planners]
        costs = [layer.cost.step(plan) for plan in plans]
        for row, plan, cost in zip(SERVING, plans, costs, strict=True):
            rows.append(
                {
                    "row": row.label,
                    "scenario": scenario,
                    "tokens_per_rank": tokens_per_rank,
                    "layer_s": cost.layer_s,
                    "compute_s": float(cost.compute_s_R.max()),
                    "exchange_s": float(cost.exchange_s_R.max()),
                    "transfer_s": float(cost.transfer_s_R.max()),
                    "transfers": len(plan.transfers),
                    "speed_up": costs[0].layer_s / cost.layer_s,
                    "ideal_speed_up": imbalance(plans[0].loads_R),
                }
            )
    return rows


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = bench_parser("breakeven", __doc__)
    add = parser.add_argument
    add("--shape", default="gpt-oss-120b", choices=SHAPES, help="sizes of the layer")
    add("--hidden-size", type=int, metavar="N", help="instead of the shape's")
    add("--intermediate-size", type=int, metavar="N", help="instead of the shape's")
    add("--machine", default="h200", metavar="NAME", help="whose seconds are modelled, or a file of its rates")
    add("--num-ranks", type=int, default=8, metavar="N", help="ranks")
    add(
        "--tokens-per-rank",
        type=int,
        nargs="+",
        default=[4096, 8192, 16384, 32768, 65536],
        metavar="N",
        help="sizes of a step",
    )
    add("--scenarios", nargs="+", default=["95:1", "80:4", "balanced"], metavar="S", help="as of `layer`")
    add("--json", metavar="FILE", help="write the figures with command, commit and versions")
    args = parser.parse_args(argv)
    check_positive(args, "hidden_size", "intermediate_size")
    num_experts = SHAPES[args.shape].num_experts
    check_integer("--num-ranks", args.num_ranks, 2)
    if num_experts < NUM_HOT * args.num_ranks:
        raise UserError(
            f"--num-ranks {args.num_ranks}: {num_experts} experts do not give rank 0 the {NUM_HOT} hot ones"
        )
    for tokens in args.tokens_per_rank:
        check_integer("--tokens-per-rank", tokens, 1, MAX_TOKENS_PER_RANK)
    for scenario in args.scenarios:
        parse(scenario, SHAPES[args.shape], 1)
    if args.json:
        check_writable(args.json)
    return args


def main(argv: Sequence[str]) -> None:
    """Model both parts; print a table of each."""
    args = parse_options(argv)
    sizes = {name: value for name in ("hidden_size", "intermediate_size") if (value := getattr(args, name))}
    layer = Layer.of(replace(SHAPES[args.shape], **sizes), args.num_ranks, args.machine)
    console = wide_console(140)
    console.width = max(console.width, 140)

    edges = [row for tokens in args.tokens_per_rank for row in break_even(layer, tokens)]
    table = Table("tokens/rank", *(f"{row.label}\nexcess (with planning)" for row in LENDING[1:]), box=None)
    for tokens in args.tokens_per_rank:
        cells = [
            f"{_number(row['excess'])} ({_number(row['excess_with_planning'])})"
            for row in edges
            if row["tokens_per_rank"] == tokens
        ]
        table.add_row(str(tokens), *cells)
    console.print(table)

    rows = [row for scenario in args.scenarios for row in speed_ups(layer, scenario, args.tokens_per_rank)]
    table = Table("scenario", "tokens/rank", "max/mean", *(row.label for row in SERVING[1:]), box=None)
    for first in range(0, len(rows), len(SERVING)):
        standard, *others = rows[first : first + len(SERVING)]
        ideal = standard["ideal_speed_up"]
        cells = [f"{row['speed_up']:.2f} ({row['speed_up'] / ideal:.2f}), {row['transfers']} moved" for row in others]
        table.add_row(standard["scenario"], str(standard["tokens_per_rank"]), f"{ideal:.2f}", *cells)
    console.print(table)
    if args.json:
        write_json(args.json, result_document("breakeven", argv, args, break_even=edges, rows=rows))


def _number(excess: float | None) -> str:
    return "never" if excess is None else f"{excess:.2f}"
