"""CPU time of planning one layer and step, for every strategy; no tensors, no ranks.

    python -m bench plan                                       # 64 experts on 8 ranks, and other sizes
    python -m bench plan --uncalibrated                        # placed for even loads, so that rq_llep has to lend
    python -m bench plan --sizes 256x32 --json bench/results/plan_NAME.json

Loads are log-normal, drawn again for every step; placements come from other steps. Each strategy sees the same steps.
Loops are compiled when the first planner is built, or read from the cache of an earlier process: that is
in `build/ms`, and in no plan.
"""

import argparse
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from bench.options import bench_parser
from bench.result import result_document
from rq_ep.commands.console import wide_console
from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.errors import UserError, check_integer, check_number
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.core.plan import imbalance
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.placing.place import place
from rq_ep.strategies import STRATEGIES, make_strategy, setting_names, strategy_class

NUM_CALIBRATION_STEPS = 64
EXPERT_BYTES = {"bf16": 1000, "int8": 504}


def draw_counts(popularity_E: FloatArray, num_steps: int, num_ranks: int, pairs: int, seed: int) -> IntArray:
    """[S, R, E] pairs: every step's popularity strays from the common one, every rank draws from the step's."""
    generator = np.random.default_rng(seed)
    counts_SRE = np.empty((num_steps, num_ranks, len(popularity_E)), np.int64)
    for counts_RE in counts_SRE:
        step_E = popularity_E * np.exp(0.3 * generator.standard_normal(len(popularity_E)))
        counts_RE[:] = generator.multinomial(pairs, step_E / step_E.sum(), size=num_ranks)
    return counts_SRE


def measure(name: str, num_experts: int, num_ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time the planner of one strategy; the first pass over the steps is warm-up."""
    popularity_E = np.exp(args.skew * np.random.default_rng(args.seed).standard_normal(num_experts))
    known_E = np.ones(num_experts) if args.uncalibrated else popularity_E
    recorded = draw_counts(known_E, NUM_CALIBRATION_STEPS, num_ranks, args.pairs_per_rank, args.seed + 1)
    stats = ExpertStats(recorded.sum(axis=1)[:, None], tuple(EXPERT_BYTES), "bf16", EXPERT_BYTES)
    started = time.perf_counter()
    placement = place(stats, num_ranks, strategy=name)
    place_s = time.perf_counter() - started
    settings = {"min_tokens_per_gemm": args.min_tokens_per_gemm}
    settings = {setting: value for setting, value in settings.items() if setting in setting_names(strategy_class(name))}
    started = time.perf_counter()
    planner = make_strategy(name, **settings).planner(placement.layers[0], placement.topology)
    build_s = time.perf_counter() - started
    steps = draw_counts(popularity_E, args.steps, num_ranks, args.pairs_per_rank, args.seed + 2)
    plans = [planner(counts_RE) for counts_RE in steps]
    seconds = []
    for _ in range(args.rounds):
        for counts_RE in steps:
            started = time.thread_time()
            planner(counts_RE)
            seconds.append(time.thread_time() - started)
    p50, p99 = np.percentile(seconds, [50, 99])
    return {
        "num_experts": num_experts,
        "num_ranks": num_ranks,
        "strategy": name,
        "plan_p50_s": p50,
        "plan_p99_s": p99,
        "build_s": build_s,
        "place_s": place_s,
        "imbalance": float(np.mean([imbalance(plan.loads_R) for plan in plans])),
        "replicas": len(placement.layers[0].replicas),
        "transfers": float(np.mean([len(plan.transfers) for plan in plans])),
    }


def parse_size(text: str) -> tuple[int, int]:
    """Read `128x8`: experts and ranks."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise UserError(f"--sizes {text}: write EXPERTSxRANKS, such as 128x8")
    return check_integer(f"--sizes {text}: experts", int(match[1]), 1, 4096), Topology(int(match[2])).num_ranks


def check(args: argparse.Namespace) -> None:
    """Check the options, and read the sizes."""
    args.sizes = [parse_size(text) for text in args.sizes]
    for name in args.strategies:
        strategy_class(name)
    for name, low in {"pairs_per_rank": 0, "min_tokens_per_gemm": 0, "steps": 1, "rounds": 1, "seed": 0}.items():
        check_integer(f"--{name.replace('_', '-')}", getattr(args, name), low)
    check_number("--skew", args.skew, 0, 20)
    if args.json:
        check_writable(args.json)


def main(argv: Sequence[str]) -> None:
    """Time all planners; print the table."""
    parser = bench_parser("plan", __doc__)
    parser.add_argument(
        "--sizes", nargs="+", default=["64x8", "128x8", "256x8", "256x64"], metavar="ExR", help="experts x ranks"
    )
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), metavar="NAME", help="which to time")
    parser.add_argument(
        "--pairs-per-rank", type=int, default=32768, metavar="N", help="routed pairs of a rank and step"
    )
    parser.add_argument("--min-tokens-per-gemm", type=int, default=1024, metavar="M", help="of strategies that lend")
    parser.add_argument("--uncalibrated", action="store_true", help="placements are learnt from even loads")
    parser.add_argument("--skew", type=float, default=1.2, metavar="SD", help="of the experts' log popularity")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="different steps")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="times each step is planned")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the loads")
    parser.add_argument("--json", metavar="FILE", help="write the figures with command, commit and versions")
    args = parser.parse_args(argv)
    check(args)
    columns = "experts ranks strategy p50/us p99/us max/mean replicas moved build/ms place/s"
    table = Table(*columns.split(), box=None)
    rows = []
    for size in args.sizes:
        of_size = [measure(name, size[0], size[1], args) for name in args.strategies]
        for row in of_size:
            table.add_row(
                str(row["num_experts"]), str(row["num_ranks"]), row["strategy"], f"{1e6 * row['plan_p50_s']:.0f}",
                f"{1e6 * row['plan_p99_s']:.0f}", f"{row['imbalance']:.3f}", str(row["replicas"]),
                f"{row['transfers']:.1f}", f"{1e3 * row['build_s']:.0f}", f"{row['place_s']:.2f}",
            )  # fmt: skip
        rows += of_size
    console = wide_console()
    console.width = max(console.width, 100)
    console.print(table)
    if args.json:
        write_json(args.json, result_document("plan", argv, args, rows=rows))
