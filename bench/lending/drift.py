"""Where lending pays: strategies placed for one load and served another, in modelled time. No tensors, no ranks.

    python -m bench drift                                      # gpt-oss-120b's layer on 8 ranks
    python -m bench drift --tokens-per-rank 16 1024 --machine h100 --json bench/results/drift_NAME.json

Popularity is log-normal. A drift of 0.5 serves half of the calibrated popularity and half of another one. Figures are
modelled microseconds of a layer with nothing overlapped (`LayerCost.step`) and, in brackets, experts moved in a step.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from bench.layer.published import SHAPES
from bench.lending.breakeven import AUTO, Layer
from bench.options import bench_parser, check_positive
from bench.result import result_document
from rq_ep.commands.console import wide_console
from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.errors import check_number
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.core.plan import DispatchPlan, imbalance, spread_over_sources
from rq_ep.core.stats import ExpertStats
from rq_ep.placing.place import place
from rq_ep.strategies import make_strategy

# Each row: a name, the strategy, its settings, and whether its planner gets the cost of the layer.
ROWS: tuple[tuple[str, str, dict[str, Any], bool], ...] = (
    ("standard", "standard", {}, False),
    ("eplb", "eplb", {}, False),
    ("llep", "llep", {}, False),
    ("llep auto", "llep", AUTO, True),
    ("rq", "rq", {}, True),
    ("rq_paper", "rq_paper", {}, False),
    ("rq_llep", "rq_llep", {}, True),
    ("rq_llep int8", "rq_llep", {"transient_format": "int8"}, True),
)


def draw(popularity_E: FloatArray, num_steps: int, pairs: int, generator: np.random.Generator) -> IntArray:
    """[S, 1, E] pairs of steps whose popularity strays a little from the common one."""
    strays_SE = popularity_E * np.exp(0.2 * generator.standard_normal((num_steps, len(popularity_E))))
    return np.stack([generator.multinomial(pairs, stray_E / stray_E.sum()) for stray_E in strays_SE])[:, None]


def measure(args: argparse.Namespace, drift: float, tokens_per_rank: int) -> list[dict[str, Any]]:
    """Every row at one drift and step size."""
    shape = SHAPES[args.shape]
    layer = Layer.of(shape, args.num_ranks, args.machine)
    generator = np.random.default_rng(args.seed)
    calibrated_E, other_E = np.exp(args.skew * generator.standard_normal((2, shape.num_experts)))
    calibrated_E, other_E = calibrated_E / calibrated_E.sum(), other_E / other_E.sum()
    pairs = tokens_per_rank * shape.top_k * args.num_ranks
    recorded_SLE = draw(calibrated_E, 32, pairs, generator)
    served_SLE = draw((1 - drift) * calibrated_E + drift * other_E, args.steps, pairs, generator)
    stats = ExpertStats(recorded_SLE, tuple(layer.sizes), "bf16", layer.sizes)
    rows = []
    for label, name, knobs, has_cost in ROWS:
        strategy = make_strategy(name, **knobs)
        placement = place(stats, args.num_ranks, strategy=strategy)
        planner = strategy.planner(placement.layers[0], placement.topology, layer.cost if has_cost else None)
        plans = [planner(counts_RE) for counts_RE in spread_over_sources(served_SLE, args.num_ranks)[:, 0]]
        rows.append(
            {
                "row": label,
                "drift": drift,
                "tokens_per_rank": tokens_per_rank,
                "layer_s": float(np.mean([layer.cost.step(plan).layer_s for plan in plans])),
                "imbalance": float(np.mean([imbalance(plan.loads_R) for plan in plans])),
                "transfers": float(np.mean([len(plan.transfers) for plan in plans])),
                "bound_by_bytes": float(np.mean([_activates_once(plan) for plan in plans])),
            }
        )
    return rows


def _activates_once(plan: DispatchPlan) -> bool:
    """Whether every expert computes on one rank, although some have several replicas."""
    active_P = plan.pairs_RP.any(axis=0)
    copies_E, active_E = (np.bincount(plan.replicas.experts_P[of_P]) for of_P in (slice(None), active_P))
    return bool(copies_E.max() > 1 and active_E.max(initial=0) <= 1)


def main(argv: Sequence[str]) -> None:
    """Model all steps and drifts; print the table."""
    parser = bench_parser("drift", __doc__)
    parser.add_argument("--shape", default="gpt-oss-120b", choices=SHAPES, help="sizes of the layer")
    parser.add_argument("--machine", default="h200", metavar="NAME", help="whose seconds are modelled")
    parser.add_argument("--num-ranks", type=int, default=8, metavar="N", help="ranks")
    parser.add_argument(
        "--tokens-per-rank", type=int, nargs="+", default=[16, 512, 4096, 32768], metavar="N", help="sizes of a step"
    )
    parser.add_argument("--drifts", type=float, nargs="+", default=[0.0, 0.5, 1.0], metavar="F", help="0 to 1")
    parser.add_argument("--skew", type=float, default=1.0, metavar="SD", help="of the experts' log popularity")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps served")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the loads")
    parser.add_argument("--json", metavar="FILE", help="write the figures with command, commit and versions")
    args = parser.parse_args(argv)
    check_positive(args, "num_ranks", "tokens_per_rank", "steps")
    for drift in args.drifts:
        check_number("--drifts", drift, 0, 1)
    if args.json:
        check_writable(args.json)
    table = Table("tokens/rank", "drift", *(f"{label}\nus (moved)" for label, *_ in ROWS), box=None)
    rows = []
    for tokens_per_rank in args.tokens_per_rank:
        for drift in args.drifts:
            of_step = measure(args, drift, tokens_per_rank)
            cells = [f"{1e6 * row['layer_s']:.0f} ({row['transfers']:.1f})" for row in of_step]
            table.add_row(str(tokens_per_rank), f"{drift:g}", *cells)
            rows += of_step
    console = wide_console(140)
    console.width = max(console.width, 140)
    console.print(table)
    if args.json:
        write_json(args.json, result_document("drift", argv, args, rows=rows))
