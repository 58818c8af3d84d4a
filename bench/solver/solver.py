"""The placement solver against EPLB and its own bound, on synthetic traces; no tensors, no ranks.

    python -m bench solver                                            # the table of 8 layers
    python -m bench solver --cases 256x64:0.25 --tokens 4096 --formats int8 --seeds 1
    python -m bench solver --layers 58 --tokens 4096 --formats int8:504 --cases 64x8:0.1 256x32:0.1 256x64:0.25
    python -m bench solver --cases 256x256:0.25:2 512x1024:0.25:2 --layers 2 --seeds 1   # bytes of 2 experts per rank

Every placement has standard EP's bytes, pooled over the layers, and is scored on steps that the solver never saw:
max/mean of pairs over ranks under the exact split, mean over steps and layers. EPLB is given the same bytes, and then
one more slot on every rank; its even split is its own, the exact one is ours.
"""

import argparse
import re
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

from bench.options import bench_parser, check_positive
from bench.result import result_document
from bench.solver.score import score
from bench.solver.synthetic_traces import LAWS, Trace, draw_trace
from rq_ep.commands.console import wide_console
from rq_ep.commands.progress_bar import progress_bar
from rq_ep.core.errors import UserError, check_choice, check_integer, check_number
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.core.problem import PlacementProblem, contiguous
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.strategies.eplb import Eplb
from rq_ep.strategies.rq import ReplicateQuantize

SIZES_HELP = (
    "experts x ranks : cap on the share of low pairs : native experts that fit a rank and layer (standard EP's)"
)
NATIVE_BYTES = 1000
NUM_PAIRS = 5  # of runs with one worker and with several, in turns
LOW_BYTES = {"int8": 500, "int8:504": 504, "int4": 270}  # exactly half; half and scales; a quarter and scales


@dataclass(frozen=True)
class Case:
    """A size and its limits; `slots` native experts per rank and layer (0: standard EP's)."""

    num_experts: int
    num_ranks: int
    cap: float
    slots: int = 0

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Read `256x64:0.25` or `512x1024:0.25:2`: experts, ranks, cap on low-precision pairs, slots."""
        match = re.fullmatch(r"(\d+)x(\d+):([\d.]+)(?::(\d+))?", text)
        if match is None:
            raise UserError(f"--cases {text}: write EXPERTSxRANKS:CAP, such as 256x64:0.25")
        experts = check_integer(f"--cases {text}: experts", int(match[1]), 1, 4096)
        cap = check_number(f"--cases {text}: cap", float(match[3]), 0, 1)
        return cls(experts, Topology(int(match[2])).num_ranks, cap, int(match[4] or 0))

    @property
    def top_k(self) -> int:
        return 8 if self.num_experts >= 64 else min(2, self.num_experts)

    @property
    def slots_per_rank(self) -> int:
        return self.slots or -(-self.num_experts // self.num_ranks)

    @property
    def name(self) -> str:
        return f"{self.num_experts}x{self.num_ranks}"

    def problem(self, trace: Trace, low: str, seed: int) -> PlacementProblem:
        counts_SLE = trace.calibration_SLE
        sizes = {"bf16": NATIVE_BYTES, low: LOW_BYTES[low]}
        stats = ExpertStats(counts_SLE, tuple(sizes), "bf16", sizes, top_k=self.top_k)
        budget = self.slots_per_rank * stats.num_layers * NATIVE_BYTES
        topology = Topology(self.num_ranks)
        return PlacementProblem(
            stats, topology, (budget,) * self.num_ranks, tuple(sizes), max_low_precision_share=self.cap, seed=seed
        )


CASES = ("16x4:0.25", "64x8:0.1", "128x8:0.1", "256x32:0.1", "256x32:0.25", "256x64:0.25")


def baselines(problem: PlacementProblem, case: Case, trace: Trace) -> dict[str, float]:
    """Contiguous blocks; EPLB in `slots` native experts a rank, and with one slot more; held-out figures."""
    free = replace(problem, budget_bytes_R=None, formats=("bf16",))
    blocks = free.placement("standard", contiguous(free))
    figures = {"contiguous": score(blocks, trace.held_out_SLE).even}
    for name, more in (("eplb", 0), ("eplb_plus_1", 1)):
        extras = (case.slots_per_rank + more) * case.num_ranks - case.num_experts
        placed = Eplb().place(replace(free, num_redundant_experts=extras))
        held_out = score(placed, trace.held_out_SLE)
        figures |= {f"{name}_even": held_out.even, name: held_out.fractional}
        if name == "eplb":
            figures["eplb_calibration"] = score(placed, trace.calibration_SLE).fractional
    return figures


def measure(problem: PlacementProblem, trace: Trace, args: argparse.Namespace) -> dict[str, float]:
    """Place in no time, then in full, then with several workers if asked for; score on both parts of the trace."""
    strategy = ReplicateQuantize(max_moves=args.max_moves)
    started = time.perf_counter()
    strategy.place(replace(problem, time_limit_s=0.0))
    first_s = time.perf_counter() - started
    started, started_cpu = time.perf_counter(), time.process_time()
    placement = strategy.place(problem)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
    held_out = score(placement, trace.held_out_SLE)
    return {
        "fractional": held_out.fractional,
        "integer": held_out.integer,
        "cvar90": held_out.cvar90,
        "calibration": score(placement, trace.calibration_SLE).fractional,
        "bound": placement.certificate["bound"],
        "low_share": placement.low_precision_planned,
        "bytes_used": sum(placement.bytes_R) / sum(problem.budget_bytes_R or placement.bytes_R),
        "replicas": sum(len(layer.replicas) for layer in placement.layers) / len(placement.layers),
        "first_s": first_s,
        "seconds": seconds,
        "cpu_s": cpu_s,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **({"speed_up": speed_up(problem, strategy, args.workers)} if args.workers > 1 else {}),
    }


def speed_up(problem: PlacementProblem, strategy: ReplicateQuantize, num_workers: int) -> float:
    """How many times faster several workers are than one: median of pairs, as the machine's speed varies."""
    ratios = []
    for pair in range(NUM_PAIRS):
        seconds = {}
        for workers in (1, num_workers) if pair % 2 == 0 else (num_workers, 1):
            started = time.perf_counter()
            strategy.place(replace(problem, num_workers=workers))
            seconds[workers] = time.perf_counter() - started
        ratios.append(seconds[1] / seconds[num_workers])
    return median(ratios)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each (law, case, tokens, format)."""
    rows = []
    sizes = list(product(args.laws, args.cases, args.tokens))
    with progress_bar() as progress:
        task = progress.add_task("placing", total=len(sizes) * args.seeds * len(args.formats))
        for law, case, tokens in sizes:
            runs_by_format: dict[str, list[dict[str, Any]]] = {low: [] for low in args.formats}
            for seed in range(args.seeds):
                steps = (args.calibration_steps, args.held_out_steps)
                trace = draw_trace(law, case.num_experts, case.top_k, tokens, args.layers, steps, seed)
                beside = baselines(case.problem(trace, args.formats[0], seed), case, trace)
                for low in args.formats:
                    progress.update(task, description=f"{law} {case.name} {tokens} {low}")
                    runs_by_format[low].append(beside | measure(case.problem(trace, low, seed), trace, args))
                    progress.advance(task)
            rows += [_row(law, case, tokens, low, runs) for low, runs in runs_by_format.items()]
    return rows


def _row(law: str, case: Case, tokens: int, low: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    """Means over seeds, and the first figure seed by seed."""
    size = {"law": law, **vars(case), "slots": case.slots_per_rank, "tokens": tokens, "low": low}
    means = {key: float(np.mean([one[key] for one in runs])) for key in runs[0]}
    return size | means | {"fractional_by_seed": [one["fractional"] for one in runs]}


def table_of(rows: list[dict[str, Any]]) -> Table:
    columns = ["law", "experts", "ranks", "cap", "tokens", "low", "max/mean", "whole", "CVaR90", "calibr.", "bound"]
    columns += ["blocks", "EPLB", "EPLB ex.", "+1 slot", "+1 exact", "first s", "s", "CPU s", "speed-up"]
    table = Table(*columns, box=None)
    keys = ["fractional", "integer", "cvar90", "calibration", "bound", "contiguous"]
    keys += ["eplb_even", "eplb", "eplb_plus_1_even", "eplb_plus_1"]
    for row in rows:
        size = (row["law"], str(row["num_experts"]), str(row["num_ranks"]), f"{row['cap']:.0%}", str(row["tokens"]))
        figures = (f"{row[key]:.4f}" if key == "fractional" else f"{row[key]:.3f}" for key in keys)
        table.add_row(
            *size,
            row["low"],
            *figures,
            f"{row['first_s']:.2f}",
            f"{row['seconds']:.1f}",
            f"{row['cpu_s']:.1f}",
            speed_up_cell(row),
        )
    return table


def speed_up_cell(row: Mapping[str, Any]) -> str:
    """How many times faster several workers were; "-" where there was one alone."""
    return f"{row['speed_up']:.2f}" if "speed_up" in row else "-"


def check(args: argparse.Namespace) -> None:
    """Check the options, and read the cases."""
    args.cases = [Case.parse(text) for text in args.cases]
    for names, known, what in ((args.laws, LAWS, "law"), (args.formats, LOW_BYTES, "format")):
        for name in names:
            check_choice(what, name, known)
    check_positive(args, "layers", "seeds", "calibration_steps", "held_out_steps", "tokens", "workers")
    if args.json:
        check_writable(args.json)


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = bench_parser("solver", __doc__)
    moves = ReplicateQuantize.max_moves
    for name, default, metavar, what in (
        ("--cases", list(CASES), "ExR:CAP[:SLOTS]", SIZES_HELP),
        ("--formats", list(LOW_BYTES), "NAME", "the low format: int8 (half the bytes), int8:504, int4"),
        ("--laws", ["ln1.2"], "LAW", "of the experts' popularity: " + ", ".join(LAWS)),
    ):
        parser.add_argument(name, nargs="+", default=default, metavar=metavar, help=what)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 64], metavar="N", help="of all ranks in a step")
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="layers that share the bytes")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="traces to average over")
    parser.add_argument("--calibration-steps", type=int, default=64, metavar="N", help="steps the solver sees")
    parser.add_argument("--held-out-steps", type=int, default=96, metavar="N", help="steps that score it")
    parser.add_argument("--max-moves", type=int, default=moves, metavar="N", help="the solver tries in each layer")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="place with N threads too, for the speed-up"
    )
    parser.add_argument("--quick", action="store_true", help="one small case, to see that all of it runs")
    parser.add_argument("--json", metavar="FILE", help="write the figures with command, commit and versions")
    args = parser.parse_args(argv)
    if args.quick:
        args.cases, args.tokens, args.layers, args.seeds = ["16x4:0.25"], [256], 2, 1
        args.calibration_steps, args.held_out_steps = 16, 16
    check(args)
    return args


def main(argv: Sequence[str]) -> None:
    """Place and score all cases; print the table."""
    args = parse_options(argv)
    rows = run(args)
    wide_console(180).print(table_of(rows))
    if args.json:
        write_json(args.json, result_document("solver", argv, args, rows=rows))
