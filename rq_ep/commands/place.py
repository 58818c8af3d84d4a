"""`rq-ep place`: replicas, formats and ranks inside a byte budget, with the bound beside the result."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from rq_ep.config import add_flags, read_settings
from rq_ep.core.errors import UserError
from rq_ep.core.options import option
from rq_ep.core.placement import Placement
from rq_ep.core.problem import LIMITS, MIGRATION, SEARCH
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import MAX_RANKS
from rq_ep.interchange import ENGINES, check_engine
from rq_ep.placing.placement_settings import PlacementSettings


@dataclass(frozen=True, kw_only=True)
class PlaceOptions(PlacementSettings):
    """What `rq-ep place` takes beside the settings of a placement."""

    stats: str = option("", help="statistics written by `rq-ep calibrate`", required=True, metavar="FILE")
    num_ranks: int = option(
        None, help="ranks of the group that will serve", required=True, minimum=1, maximum=MAX_RANKS
    )
    out: str = option("", help="where the placement goes (.json)", required=True, metavar="FILE")
    plot: bool = option(True, help="write a picture beside the placement")
    budget: str = option(
        "ep",
        help="expert bytes of each rank over all layers: ep (as standard EP's fullest rank), a size such as 80GiB, or "
        "a size for each rank, by commas (0: that rank shall hold nothing)",
        metavar="BYTES",
        parse=str,
        group=LIMITS,
    )
    engine: str | None = option(
        None,
        flag="--for",
        help=f"place for an engine of equal slots, one format and even splits ({', '.join(ENGINES)}); write it with "
        "`rq-ep convert`",
        group=SEARCH,
    )
    machine: str | None = option(
        None,
        help="weigh pairs and bytes by format in seconds of h200, h100, a100, cpu, of a YAML file of rates, or of the "
        "JSON file of `rq-ep profile`",
        group=SEARCH,
    )
    moves: str | None = option(
        None,
        help="file for the moves: who receives what from whom, layer by layer (.json)",
        metavar="FILE",
        group=MIGRATION,
    )


def configure(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, PlaceOptions)


def run(args: argparse.Namespace) -> None:
    from rq_ep.commands.common import check_outputs, layer_cost
    from rq_ep.commands.progress_bar import progress_bar
    from rq_ep.commands.reports.place_report import draw, report
    from rq_ep.placing.place import place

    options = read_settings(PlaceOptions, args)
    stats = ExpertStats.load(options.stats)
    check_outputs({"--out": options.out, "--moves": options.moves}, [options.stats])
    if options.moves and not options.current:
        raise UserError(f"--moves {options.moves}: moves lead from --current: name that")
    if options.engine is not None:
        check_engine("--for", options.engine)
    with progress_bar() as bar:
        task = bar.add_task(f"placing {stats.num_layers} layers", total=100)
        placement = place(
            stats,
            options.num_ranks,
            options.budget,
            options,
            cost=layer_cost(options.machine, stats),
            equal_slots=options.engine is not None,
            on_progress=lambda fraction: bar.update(task, completed=100 * fraction),
        )
        bar.update(task, completed=100)
    summary = _write_moves(options, placement, stats) if options.moves else ""
    placement.save(options.out)
    report(placement)
    if summary:
        print(summary)
    if options.plot:
        picture = Path(options.out).with_suffix(".png")
        draw(placement, stats, picture)
        print(f"{picture}: planned load of every rank")
    print(f"{options.out}: {placement.strategy} on {options.num_ranks} ranks")


def _write_moves(options: PlaceOptions, placement: Placement, stats: ExpertStats) -> str:
    """Write the moves from the current placement; return what there is to say of them."""
    from rq_ep.solver.migration.warm_start import moves_to

    assert isinstance(options.current, str)
    assert options.moves is not None
    moves = moves_to(placement, options.current, stats, options.lost_ranks)
    moves.save(options.moves)
    received_R = moves.received_bytes_R(stats.expert_bytes)
    number = sum(len(layer.moves) for layer in moves.layers)
    return (
        f"{options.moves}: {number} moves in {len(moves.layers)} layers; {received_R.sum():,} bytes received, "
        f"at most {received_R.max():,} by a rank; {moves.room_bytes:,} bytes of room beside the budget"
    )
