"""The loss of a rank: CPU time of the answer, bytes that move, and balance of those left; no tensors, no processes.

    python -m bench recover                                     # 58 layers of 64 experts on 8 ranks, of 256 on 32
    python -m bench recover --cases 64x8:0.1 --layers 8 --seeds 3

Ranks are lost one at a time from a placement that the solver made inside standard EP's bytes. `first` is the answer at
once; `settled` is what the members go on to beside the steps; `fresh` is placed for them alone. All are scored on steps
that none has seen, as in `bench solver`.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from bench.options import bench_parser, check_positive
from bench.result import result_document
from bench.solver.score import score
from bench.solver.solver import LOW_BYTES, SIZES_HELP, Case
from bench.solver.synthetic_traces import draw_trace
from rq_ep.commands.console import wide_console
from rq_ep.core.errors import check_choice
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.parallel.host import short_collections
from rq_ep.solver.migration.members import lowered, lowered_problem
from rq_ep.solver.migration.recover import recover, warm_up
from rq_ep.solver.migration.warm_start import place_for_members
from rq_ep.strategies.rq import ReplicateQuantize

STRATEGY = ReplicateQuantize()


def measure(case: Case, args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Lose some ranks in turn."""
    steps = (args.calibration_steps, args.held_out_steps)
    trace = draw_trace("ln1.2", case.num_experts, case.top_k, args.tokens, args.layers, steps, seed)
    problem = case.problem(trace, args.low, seed)
    placement = STRATEGY.place(problem)
    sizes, rows = problem.stats.expert_bytes, []
    before = score(placement, trace.held_out_SLE).integer
    for lost in range(0, case.num_ranks, -(-case.num_ranks // args.lost)):
        members = [rank for rank in range(case.num_ranks) if rank != lost]
        with short_collections():  # as in a server
            started_s = time.process_time()
            first, rounds = recover(problem, placement, members, max(sizes.values()))
            recover_s = time.process_time() - started_s
        settled = place_for_members(STRATEGY, problem, first, members)
        settle_s = time.process_time() - started_s - recover_s
        fresh = STRATEGY.place(lowered_problem(problem, members))
        scores = [
            score(one, trace.held_out_SLE).integer
            for one in (lowered(first, members), lowered(settled, members), fresh)
        ]
        received = sum(int(one.received_bytes_R(case.num_ranks, sizes).sum()) for one in rounds)
        rows.append(
            {"case": case.name, "layers": args.layers, "seed": seed, "lost": lost, "recover_cpu_s": recover_s}
            | {"rounds": len(rounds), "moved": received / sum(placement.bytes_R)}
            | {"low_share": first.low_precision_planned, "settle_cpu_s": settle_s, "before": before}
            | dict(zip(("first", "settled", "fresh"), scores, strict=True))
        )
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    columns = ["case", "seed", "lost", "CPU s", "rounds", "moved", "low", "before", "first", "settled", "fresh"]
    table = Table(*columns, "settled CPU s", box=None)
    for row in rows:
        figures = (f"{row[key]:.3f}" for key in ("low_share", "before", "first", "settled", "fresh"))
        table.add_row(
            row["case"], str(row["seed"]), str(row["lost"]), f"{row['recover_cpu_s']:.3f}", str(row["rounds"]),
            f"{row['moved']:.1%}", *figures, f"{row['settle_cpu_s']:.1f}",
        )  # fmt: skip
    return table


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = bench_parser("recover", __doc__)
    parser.add_argument(
        "--cases", nargs="+", default=["64x8:0.1", "256x32:0.1"], metavar="ExR:CAP[:SLOTS]", help=SIZES_HELP
    )
    parser.add_argument("--layers", type=int, default=58, metavar="N", help="layers that share the bytes")
    parser.add_argument(
        "--lost", type=int, default=3, metavar="N", help="ranks lost, each in turn, from those there are"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="models of each case")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="of all ranks in a step")
    parser.add_argument("--low", default="int8:504", metavar="NAME", help="the low format")
    parser.add_argument("--calibration-steps", type=int, default=64, metavar="N", help="that are placed for")
    parser.add_argument("--held-out-steps", type=int, default=64, metavar="N", help="steps that score")
    parser.add_argument("--json", metavar="FILE", help="write the figures with command, commit and versions")
    args = parser.parse_args(argv)
    args.cases = [Case.parse(text) for text in args.cases]
    check_choice("format", args.low, LOW_BYTES)
    check_positive(args, "layers", "lost", "seeds", "tokens", "calibration_steps", "held_out_steps")
    if args.json:
        check_writable(args.json)
    return args


def main(argv: Sequence[str]) -> None:
    """Lose ranks of every case; print the table."""
    args = parse_options(argv)
    warm_up()
    rows = [row for case in args.cases for seed in range(args.seeds) for row in measure(case, args, seed)]
    wide_console(140).print(table_of(rows))
    if args.json:
        write_json(args.json, result_document("recover", argv, args, rows=rows))
