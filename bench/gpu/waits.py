"""How often the host waits for the device in one call of a layer, and how long it plans.

    python -m bench waits --device cuda --shape gpt-oss-120b --local-ranks 8 --tokens-per-rank 1024

All ranks take turns in this process, so that a rank's waits are the calls of CUDA that return when the device has
done something, as the profiler counts them, divided by ranks and calls. On a CPU there are none.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from bench.layer.published import SHAPES, shape_name
from bench.layer.workloads import parse
from bench.options import bench_parser, check_device, check_positive
from bench.result import result_document
from rq_ep.commands.console import wide_console
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.replicas import Replica
from rq_ep.core.topology import Topology
from rq_ep.moe import ExpertFamily, LocalExperts, Telemetry
from rq_ep.strategies import make_strategy

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
NUM_CALLS = 4


def main(argv: Sequence[str]) -> None:
    """Count the waits of every strategy; print the table.

    Raises:
        UserError: an option makes no sense.
    """
    made = bench_parser("waits", __doc__)
    made.add_argument("--shape", default="gpt-oss-120b", metavar="NAME", help="of shapes.yaml")
    made.add_argument("--local-ranks", type=int, default=8, metavar="R", help="ranks in this process")
    made.add_argument("--tokens-per-rank", type=int, default=1024, metavar="N", help="in a step")
    made.add_argument("--strategies", default="standard,eplb,rq", help="by commas")
    made.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda")
    made.add_argument("--json", metavar="FILE", help="write the figures there")
    options = made.parse_args(argv)
    options.shape = shape_name(options.shape)
    check_device(options.device)
    check_positive(options, "local_ranks", "tokens_per_rank")
    if options.json:
        check_writable(options.json)
    rows = [_row_of(name, options) for name in options.strategies.split(",")]
    table = Table("strategy", "waits of a rank and call", "plan us, p50", title=f"{options.shape}", box=None)
    for row in rows:
        table.add_row(row["strategy"], f"{row['waits']:.2f}", f"{1e6 * row['plan_s']:.0f}")
    wide_console(100).print(table)
    if options.json:
        write_json(options.json, result_document("waits", argv, options, options.device, rows=rows))


@torch.no_grad()
def _row_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    shape, num_ranks = SHAPES[options.shape], options.local_ranks
    # Widths do not matter to who waits: small experts let every strategy fit.
    family = ExpertFamily.gated(64, 64)
    replicas = [Replica(expert * num_ranks // shape.num_experts, expert, "bf16") for expert in range(shape.num_experts)]
    layer = LayerPlacement.even(0, shape.num_experts, replicas)
    telemetry = Telemetry()
    planner = make_strategy(name).planner(layer, Topology(num_ranks))
    experts = LocalExperts(family, layer, planner, num_ranks, device=options.device, telemetry=telemetry)
    for bank in experts.banks:
        for expert in bank.experts:
            random = torch.Generator().manual_seed(expert)
            weights = {key: torch.randn(size, generator=random) / 8 for key, size in family.layout.shapes.items()}
            bank.put(expert, {key: weight.to(options.device) for key, weight in weights.items()})
    workload = parse("zipf:1", shape, options.tokens_per_rank)
    ids_TK = torch.from_numpy(
        np.concatenate([workload.ids(0, "measure", 0, rank, num_ranks) for rank in range(num_ranks)])
    ).to(options.device)
    hidden_TD = torch.randn(len(ids_TK), 64, device=options.device).bfloat16()
    weights_TK = torch.full(ids_TK.shape, 1 / shape.top_k, device=options.device)
    experts(hidden_TD, ids_TK, weights_TK)
    telemetry.clear()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if options.device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(NUM_CALLS):
            experts(hidden_TD, ids_TK, weights_TK)
    counts = {event.key: event.count for event in profiler.key_averages()}
    waits = {key: counts[key] / (NUM_CALLS * num_ranks) for key in WAITS if key in counts}
    return {
        "strategy": name,
        "waits": sum(waits.values()),
        "waits_by_call": waits,
        "plan_s": float(np.median(telemetry.seconds("plan"))),
    }
