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
    parser.add_argument("--out", required=True, metavar="FILE", help="where the placement goes (.json)")
    parser.add_argument("--no-plot", action="store_true", help="write no picture beside the placement")
    _add_limits(parser.add_argument_group("limits, what the placement must keep to"))
    _add_search(parser.add_argument_group("search, what is balanced and for how long"))
    _add_current(parser.add_argument_group("from a placement that serves: stay, move in part, or move all"))


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--budget", default="ep", metavar="BYTES",
        help="expert bytes of each rank over all layers: ep (as standard EP's fullest rank), a size such as 80GiB, "
        "or a size for each rank, by commas (0: that rank shall hold nothing)",
    )  # fmt: skip
    group.add_argument("--formats", metavar="NAMES", help="formats to use, by commas (default: all that were measured)")
    group.add_argument(
        "--max-low-precision-share", type=float, default=0.25, metavar="F",
        help="cap on the share of routed pairs computed below the native format",
    )  # fmt: skip
    group.add_argument(
        "--max-error", type=float, metavar="E",
        help="cap on the experts' relative output errors as calibrated, mean weighted by importance",
    )  # fmt: skip
    group.add_argument(
        "--mixed-replicas", action="store_true",
        help="rq: native experts may have further replicas in the smallest format, which compute at most half of the "
        "expert's pairs in a step, those of the lowest gates, and count against the caps with what they compute; "
        "pays where ranks hold few experts, seldom where many share the bytes, and takes several searches",
    )  # fmt: skip
    group.add_argument(
        "--rules", metavar="FILE",
        help="YAML: `fixed` and `forbidden` lists of {layer: 3, expert: 0-7, rank: [0, 1]} (what is not named is all), "
        "`spread_nodes: true` for replicas on different nodes, `whole_groups: true` for expert groups on one",
    )  # fmt: skip
    group.add_argument(
        "--num-redundant-experts", type=int, default=0, metavar="N", help="eplb: extra replicas per layer"
    )


def _add_search(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--strategy", metavar="NAME", help="who places: standard, eplb, llep, rq, rq_paper or rq_llep (default: rq)"
    )
    group.add_argument(
        "--for", dest="engine", metavar="ENGINE",
        help="place for sglang, trtllm, ascend or eplb: equal slots, one format, even splits; write it with "
        "`rq-ep convert`",
    )  # fmt: skip
    group.add_argument("--tokens-per-step", type=int, metavar="N", help="batch size served (default: as calibrated)")
    group.add_argument(
        "--objective", default="prefill", metavar="KIND",
        help="what is balanced: prefill (pairs), decode (bytes of activated experts), mixed (each step by its phase)",
    )  # fmt: skip
    group.add_argument(
        "--machine", metavar="NAME",
        help="weigh pairs and bytes by format in seconds of h200, h100, a100, cpu, of a YAML file of rates, or of the "
        "JSON file of `rq-ep profile`",
    )  # fmt: skip
    group.add_argument(
        "--tail-weight", type=float, default=0.0, metavar="W",
        help="0 balances the mean step, 1 the mean of the worst tenth, 0.3 a little of it",
    )  # fmt: skip
    group.add_argument(
        "--time-limit", type=float, metavar="S",
        help="seconds; the best found until then, which depends on the clock: without it the same seed places the same",
    )  # fmt: skip
    group.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that solve layers; the answer is the same"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the solver's search")
    group.add_argument(
        "--what-if", action="store_true",
        help="solve again with 10%% more bytes, a GiB more per rank (if that is 1%% to ten times the budget), 5 points "
        "more low pairs, and for half the record",
    )  # fmt: skip


def _add_current(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--current", metavar="FILE", help="the placement that serves now; it may have another number of ranks"
    )
    group.add_argument(
        "--lost-ranks", metavar="RANKS",
        help="ranks of --current that are gone, by commas; the others close up, and what they hold is used again",
    )  # fmt: skip
    group.add_argument("--max-moved-bytes", metavar="BYTES", help="cap on what all ranks receive, such as 512MiB")
    group.add_argument(
        "--move-price", type=float, default=0.0, metavar="P",
        help="max/mean that moving as many bytes as the whole budget must gain",
    )  # fmt: skip
    group.add_argument(
        "--min-gain", type=float, default=0.01, metavar="G", help="max/mean; for less the current placement stays"
    )
    group.add_argument("--moves", metavar="FILE", help="write who receives what from whom, layer by layer (.json)")


def run(args: argparse.Namespace) -> None:
    from rq_ep.commands.common import layer_cost, parse_names
    from rq_ep.commands.place_report import draw, report
    from rq_ep.commands.progress_bar import progress_bar
    from rq_ep.core.errors import UserError
    from rq_ep.core.files import check_writable
    from rq_ep.core.stats import ExpertStats
    from rq_ep.placing.place import parse_bytes, place

    stats = ExpertStats.load(args.stats)
    for path in filter(None, (args.out, args.moves)):
        check_writable(path)
    if args.moves and not args.current:
        raise UserError(f"--moves {args.moves}: moves lead from --current: name that")
    lost_ranks = _ranks(args.lost_ranks)
    with progress_bar() as bar:
        task = bar.add_task(f"placing {stats.num_layers} layers", total=100)
        placement = place(
            stats,
            args.num_ranks,
            args.budget,
            strategy=args.strategy or ("eplb" if args.engine else "rq"),
            formats=None if args.formats is None else parse_names(args.formats),
            ranks_per_node=args.ranks_per_node,
            max_low_precision_share=args.max_low_precision_share,
            max_error=args.max_error,
            mixed_replicas=args.mixed_replicas,
            tokens_per_step=args.tokens_per_step,
            num_redundant_experts=args.num_redundant_experts,
            objective=args.objective,
            cost=layer_cost(args.machine, stats),
            tail_weight=args.tail_weight,
            rules=args.rules,
            time_limit_s=args.time_limit,
            num_workers=args.workers,
            current=args.current,
            lost_ranks=lost_ranks,
            max_moved_bytes=None
            if args.max_moved_bytes is None
            else parse_bytes(args.max_moved_bytes, "--max-moved-bytes"),
            move_price=args.move_price,
            min_gain=args.min_gain,
            equal_slots=_is_engine(args.engine),
            what_if=args.what_if,
            seed=args.seed,
            on_progress=lambda fraction: bar.update(task, completed=100 * fraction),
        )
        bar.update(task, completed=100)
    moved = "" if not args.moves else _write_moves(args.moves, placement, args.current, stats, lost_ranks)
    placement.save(args.out)
    report(placement)
    if moved:
        print(moved)
    if not args.no_plot:
        picture = Path(args.out).with_suffix(".png")
        draw(placement, stats, picture)
        print(f"{picture}: planned load of every rank")
    print(f"{args.out}: {placement.strategy} on {args.num_ranks} ranks")


def _is_engine(name: str | None) -> bool:
    from rq_ep.core.errors import check_choice
    from rq_ep.interchange import ENGINES

    return name is not None and bool(check_choice("engine", name, ENGINES))


def _ranks(text: str | None) -> list[int]:
    from rq_ep.commands.common import parse_names
    from rq_ep.core.errors import UserError

    names = [] if text is None else parse_names(text)
    if text is not None and not (names and all(name.isdecimal() and len(name) < 9 for name in names)):
        raise UserError(f"--lost-ranks {text:.60}: write ranks of the current placement, such as 3 or 3,7")
    return [int(name) for name in names]


def _write_moves(path: str, placement: "Placement", current: str, stats: "ExpertStats", lost_ranks: list[int]) -> str:
    from rq_ep.solver.migration.warm_start import moves_to

    moves = moves_to(placement, current, stats, lost_ranks)
    moves.save(path)
    received_R = moves.received_bytes_R(stats.expert_bytes)
    number = sum(len(layer.moves) for layer in moves.layers)
    return (
        f"{path}: {number} moves in {len(moves.layers)} layers; {received_R.sum():,} bytes received, "
        f"at most {received_R.max():,} by a rank; {moves.room_bytes:,} bytes of room beside the budget"
    )
