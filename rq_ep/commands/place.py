"""`rq-ep place`: replicas, formats and ranks inside a byte budget, with the bound beside the result."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rq_ep.core.placement import Placement
    from rq_ep.core.stats import ExpertStats


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stats", required=True, metavar="FILE", help="statistics written by `rq-ep calibrate`")
    parser.add_argument("--num-ranks", required=True, type=int, metavar="R", help="ranks of the group that will serve")
    parser.add_argument("--ranks-per-node", type=int, default=0, metavar="N", help="0: all ranks share one node")
    parser.add_argument(
        "--budget", default="ep", metavar="BYTES",
        help="expert bytes of each rank over all layers: ep (as standard EP's fullest rank), a size such as 80GiB, "
        "or a size for each rank, by commas",
    )  # fmt: skip
    parser.add_argument(
        "--formats", metavar="NAMES", help="formats to use, by commas (default: all that were measured)"
    )
    parser.add_argument(
        "--strategy", default="rq", metavar="NAME", help="who places: standard, eplb, llep, rq, rq_paper or rq_llep"
    )
    parser.add_argument(
        "--max-low-precision-share", type=float, default=0.25, metavar="F",
        help="cap on the share of routed pairs computed below the native format",
    )  # fmt: skip
    parser.add_argument("--tokens-per-step", type=int, metavar="N", help="batch size served (default: as calibrated)")
    parser.add_argument(
        "--num-redundant-experts", type=int, default=0, metavar="N", help="eplb: extra replicas per layer"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the solver's search")
    parser.add_argument("--out", required=True, metavar="FILE", help="where the placement goes (.json)")
    parser.add_argument("--no-plot", action="store_true", help="write no picture beside the placement")


def run(args: argparse.Namespace) -> None:
    from rq_ep.commands.common import parse_names
    from rq_ep.commands.progress import progress_bar
    from rq_ep.core.files import check_writable
    from rq_ep.core.stats import ExpertStats
    from rq_ep.strategies.place import place

    stats = ExpertStats.load(args.stats)
    check_writable(args.out)
    with progress_bar() as bar:
        task = bar.add_task(f"placing {stats.num_layers} layers", total=100)
        placement = place(
            stats,
            args.num_ranks,
            args.budget,
            strategy=args.strategy,
            formats=None if args.formats is None else parse_names(args.formats),
            ranks_per_node=args.ranks_per_node,
            max_low_precision_share=args.max_low_precision_share,
            tokens_per_step=args.tokens_per_step,
            num_redundant_experts=args.num_redundant_experts,
            seed=args.seed,
            on_progress=lambda fraction: bar.update(task, completed=100 * fraction),
        )
        bar.update(task, completed=100)
    placement.save(args.out)
    _report(placement)
    if not args.no_plot:
        picture = Path(args.out).with_suffix(".png")
        _draw(placement, stats, picture)
        print(f"{picture}: planned load of every rank")
    print(f"{args.out}: {placement.strategy} on {args.num_ranks} ranks")


def _report(placement: "Placement") -> None:
    from collections import Counter

    from rich.console import Console
    from rich.table import Table

    console = Console()
    layers = Table("layer", "predicted", "bound", "gap", "binding", "replicas", title="Balance: max/mean over ranks")
    for layer in placement.layers:
        by_format = Counter(layer.replicas.formats_P)
        layers.add_row(
            str(layer.layer),
            *("-" if value is None else f"{value:.3f}" for value in (layer.predicted, layer.bound)),
            "-" if layer.gap is None else f"{layer.gap:.1%}",
            layer.binding or "-",
            ", ".join(f"{number} {name}" for name, number in sorted(by_format.items())),
        )
    console.print(layers)
    ranks = Table("rank", "expert bytes", "budget", "used", title="Bytes, all layers together")
    for rank, used in enumerate(placement.bytes_R):
        budget = placement.budget_bytes_R[rank] if placement.budget_bytes_R else None
        ranks.add_row(
            str(rank),
            f"{used:,}",
            "-" if budget is None else f"{budget:,}",
            "-" if budget is None else f"{used / budget:.1%}",
        )
    console.print(ranks)
    if placement.low_precision_cap is not None:
        console.print(
            f"{placement.low_precision_planned:.1%} of the calibration pairs in low precision "
            f"(cap {placement.low_precision_cap:.0%})"
        )
    found = placement.certificate
    if "bound" in found:
        console.print(
            f"all layers: predicted {found['predicted']:.3f}, bound {found['bound']:.3f}, gap {found['gap']:.1%}, "
            f"binding: {found['binding']}; standard EP on the same steps {found['standard']:.3f}"
        )
    elif found:
        console.print("; ".join(f"{what.replace('_', ' ')}: {value}" for what, value in found.items()), markup=False)


def _draw(placement: "Placement", stats: "ExpertStats", path: Path) -> None:
    """Planned load of every rank and layer, and the replicas of every layer by format."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from rq_ep.core.files import replacing

    loads_LE = stats.counts.sum(axis=0)
    rows = []
    for layer, loads_E in zip(placement.layers, loads_LE, strict=True):
        pairs_P = loads_E[layer.replicas.experts_P] * layer.shares_P
        load_R = np.bincount(layer.replicas.ranks_P, pairs_P, placement.topology.num_ranks)
        rows.append(load_R / max(load_R.mean(), 1e-300))
    names = [str(layer.layer) for layer in placement.layers]
    figure = Figure(figsize=(10, 1.5 + 0.3 * max(len(names), 6)), layout="constrained")
    FigureCanvasAgg(figure)
    heat, bars = figure.subplots(1, 2)
    image = heat.imshow(np.array(rows), aspect="auto", cmap="coolwarm", vmin=0.5, vmax=1.5)
    figure.colorbar(image, ax=heat, label="planned load / mean")
    heat.set(xlabel="rank", ylabel="layer", title=f"{placement.strategy}: load of every rank", yticks=range(len(names)))
    heat.set_yticklabels(names)
    left = np.zeros(len(names))
    for name in placement.formats:
        numbers = np.array([layer.replicas.formats_P.count(name) for layer in placement.layers])
        bars.barh(names, numbers, left=left, label=name)
        left += numbers
    bars.invert_yaxis()
    bars.set(xlabel="replicas", title="replicas by format")
    bars.legend(loc="lower right")
    heat.set_xticks(range(placement.topology.num_ranks))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
