"""Several low formats at once against each alone, on synthetic traces: balance and predicted error in the same bytes.

    python -m bench low-formats                                  # 64 experts on 8 ranks, 256 on 64
    python -m bench low-formats --cases 64x8:0.1 --budgets 1 0.6 --layers 4

Experts' importance is their pairs times a log-normal factor; their output errors are spread around 0.5 % in int8 and
7 % in int4, which is what `rq-ep calibrate` finds on the demo's model. Below standard EP's bytes (`--budgets 0.6`)
every pair may be low. Each low format is placed alone, the smallest under smaller and smaller caps on pairs; then all
together, with as much predicted error as each of those had, and without a cap on it. Steps are scored that no
placement has seen.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from bench.options import bench_parser, check_positive
from bench.result import result_document
from bench.solver.score import score
from bench.solver.solver import LOW_BYTES, NATIVE_BYTES, SIZES_HELP, Case
from bench.solver.synthetic_traces import Trace, draw_trace
from rq_ep.commands.console import wide_console
from rq_ep.core.errors import UserError, check_number
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.strategies.rq import ReplicateQuantize

NATIVE, LOW = "bf16", ("int8:504", "int4")
ERRORS, ERROR_SPREAD, IMPORTANCE_SPREAD = (0.005, 0.07), 0.3, 0.5
SMALLER_CAPS = (1.0, 0.5, 0.25)  # of the cap on pairs, for the smallest format alone


def sensitive_stats(trace: Trace, top_k: int, seed: int) -> ExpertStats:
    """Statistics with importances and errors of made-up experts."""
    counts_SLE = trace.calibration_SLE
    generator = np.random.default_rng([7, seed])
    importance_LE = counts_SLE.sum(axis=0) * np.exp(IMPORTANCE_SPREAD * generator.standard_normal(counts_SLE.shape[1:]))
    spread_LE = np.exp(ERROR_SPREAD * generator.standard_normal(counts_SLE.shape[1:]))
    error_LEQ = np.stack([0 * spread_LE, *(error * spread_LE for error in ERRORS)], axis=2)
    sizes = {NATIVE: NATIVE_BYTES, **{name: LOW_BYTES[name] for name in LOW}}
    return ExpertStats(counts_SLE, tuple(sizes), NATIVE, sizes, top_k=top_k, importance=importance_LE, error=error_LEQ)


def measure(case: Case, budget: float, args: argparse.Namespace, seed: int) -> Iterator[dict[str, Any]]:
    """Place one trace in every way."""
    steps = (args.calibration_steps, args.held_out_steps)
    trace = draw_trace("ln1.2", case.num_experts, case.top_k, args.tokens, args.layers, steps, seed)
    stats = sensitive_stats(trace, case.top_k, seed)
    of_rank = round(budget * case.slots_per_rank * args.layers * NATIVE_BYTES)
    most = case.cap if budget >= 1 else 1.0

    def placed(low: Sequence[str], share: float, max_error: float | None) -> dict[str, Any] | None:
        started_s = time.process_time()
        try:
            placement = ReplicateQuantize().place(
                PlacementProblem(
                    stats, Topology(case.num_ranks), (of_rank,) * case.num_ranks, (NATIVE, *low),
                    max_low_precision_share=share, max_error=max_error, seed=seed,
                )
            )  # fmt: skip
        except UserError:  # one of each expert does not fit
            return None
        cpu_s = time.process_time() - started_s
        size = {"case": case.name, "budget": budget, "seed": seed, "formats": list(low), "max_share": share}
        return size | {"max_error": max_error, "cpu_s": cpu_s} | _figures(placement, trace)

    alone = [
        placed([name], most * part, None) for name in LOW for part in (SMALLER_CAPS if name == LOW[-1] else (1.0,))
    ]
    errors = sorted(row["error"] for row in alone if row is not None)
    together = [placed(LOW, most, max_error) for max_error in (*errors, None)]
    yield from (row for row in (*alone, *together) if row is not None)


def _figures(placement: Placement, trace: Trace) -> dict[str, Any]:
    formats = placement.certificate["formats"]
    return {
        "max_over_mean": score(placement, trace.held_out_SLE).fractional,
        "predicted": placement.certificate["predicted"],
        "error": sum(row["error"] for row in formats.values()),
        "pairs": {name: formats[name]["pairs"] for name in LOW if name in formats},
        "experts": {name: formats[name]["experts"] for name in LOW if name in formats},
    }


def table_of(rows: list[dict[str, Any]]) -> Table:
    columns = ["case", "budget", "formats", "cap on pairs", "cap on error", "max/mean", "error"]
    table = Table(*columns, *(f"pairs in {name}" for name in LOW), "CPU s", box=None)
    for row in rows:
        table.add_row(
            row["case"], f"{row['budget']:g}", "+".join(row["formats"]), f"{row['max_share']:.1%}",
            "-" if row["max_error"] is None else f"{row['max_error']:.2e}", f"{row['max_over_mean']:.3f}",
            f"{row['error']:.2e}", *(f"{row['pairs'].get(name, 0):.1%}" for name in LOW), f"{row['cpu_s']:.1f}",
        )  # fmt: skip
    return table


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = bench_parser("low-formats", __doc__)
    parser.add_argument(
        "--cases", nargs="+", default=["64x8:0.1", "256x64:0.25"], metavar="ExR:CAP[:SLOTS]", help=SIZES_HELP
    )
    parser.add_argument(
        "--budgets", nargs="+", type=float, default=[1.0, 0.6], metavar="F", help="of standard EP's bytes"
    )
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="of all ranks in a step")
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="layers that share the bytes")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="traces of each case")
    parser.add_argument("--calibration-steps", type=int, default=64, metavar="N", help="steps the solver sees")
    parser.add_argument("--held-out-steps", type=int, default=96, metavar="N", help="steps that score it")
    parser.add_argument("--json", metavar="FILE", help="write the figures with command, commit and versions")
    args = parser.parse_args(argv)
    args.cases = [Case.parse(text) for text in args.cases]
    for budget in args.budgets:
        check_number("--budgets", budget, 0)
    check_positive(args, "tokens", "layers", "seeds", "calibration_steps", "held_out_steps")
    if args.json:
        check_writable(args.json)
    return args


def main(argv: Sequence[str]) -> None:
    """Place all cases in every way; print the table."""
    args = parse_options(argv)
    rows = [
        row
        for case in args.cases
        for budget in args.budgets
        for seed in range(args.seeds)
        for row in measure(case, budget, args, seed)
    ]
    wide_console(150).print(table_of(rows))
    if args.json:
        write_json(args.json, result_document("low-formats", argv, args, rows=rows))
