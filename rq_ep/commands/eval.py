"""`rq-ep eval`: strategies and placements side by side on held-out text."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rq_ep.commands.common import StrategyOptions, check_inputs, check_outputs, parse_strategies, quiet_libraries
from rq_ep.config import MODEL_HELP, add_flags, as_mapping, read_settings
from rq_ep.core.errors import UserError
from rq_ep.core.options import option
from rq_ep.core.placement import Placement
from rq_ep.model.settings import EvaluationSettings
from rq_ep.strategies import NATIVE_STRATEGIES

if TYPE_CHECKING:
    from rq_ep.model.evaluation.candidate import Candidate

DEFAULT_NUM_RANKS = 4


@dataclass(frozen=True, kw_only=True)
class EvalOptions(StrategyOptions, EvaluationSettings):
    """What `rq-ep eval` takes beside the settings of an evaluation."""

    model: str = option("", help=MODEL_HELP, required=True, metavar="MODEL")
    text: Sequence[Path] = option(
        (),
        help="held-out text: files and directories of UTF-8 text, .jsonl with a text to a line",
        required=True,
        several=True,
        metavar="PATH",
    )
    placement: Sequence[str] = option(
        (),
        help="placements written by `rq-ep place`, served by the strategies that made them",
        several=True,
        metavar="FILE",
    )
    strategies: Sequence[str] | None = option(
        None,
        help="strategies to compare, by commas (default: all that need no low format); without a placement they "
        "place on uniform load",
    )
    num_ranks: int | None = option(None, help="ranks (default: the placement's, or 4)", minimum=1)
    machine: str | None = option(
        None,
        help="predict the compute that is measured, by the file of `rq-ep profile`, and print the error",
        metavar="FILE",
    )
    experts: str | None = option(None, help="quantized experts written by `rq-ep quantize`", metavar="DIR")
    json: str | None = option(None, help="write the figures here, too", metavar="FILE")
    plot: str | None = option(None, help="write a picture of the ranks' loads here (.png)", metavar="FILE")


def configure(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, EvalOptions)


def run(args: argparse.Namespace) -> None:
    from rq_ep.core.files.documents import write_json
    from rq_ep.costs import cost_model

    options = read_settings(EvalOptions, args)
    check_inputs(options.model, options.text)
    machine = None if options.machine is None else cost_model(options.machine)
    check_outputs({"--json": options.json, "--plot": options.plot}, [*options.placement, options.machine])
    candidates, num_ranks = _candidates(options)

    from rq_ep.commands.progress_bar import showing
    from rq_ep.commands.reports.eval_report import draw, report
    from rq_ep.model.evaluation.evaluate import compare

    quiet_libraries()
    with showing() as show:
        evaluations = compare(
            options.model,
            options.text,
            candidates,
            options,
            num_ranks=num_ranks,
            machine=machine,
            packed_experts=options.experts,
            progress=show,
        )
    report(evaluations, num_ranks, options.dtype, None if machine is None else machine.description)
    if unplaced := [candidate.label for candidate in candidates if candidate.placement is None]:
        print(f"{', '.join(unplaced)}: no --placement was given; the strategy placed by itself, on uniform load.")
    if options.json:
        document = {
            "settings": as_mapping(options) | {"num_ranks": num_ranks},
            "strategies": {candidate.label: vars(candidate.strategy) for candidate in candidates},
            "rows": [evaluation.as_dict() for evaluation in evaluations],
        }
        write_json(options.json, document, default=str)
    if options.plot:
        draw(evaluations, options.plot)


def _candidates(options: EvalOptions) -> "tuple[list[Candidate], int]":
    """The rows of the table: a placement for each file, and the strategies that no file was made by."""
    placements = {path: Placement.load(path) for path in options.placement}
    sizes = {placement.topology.num_ranks: path for path, placement in placements.items()}
    if options.num_ranks is None and len(sizes) > 1:
        raise UserError(f"--placement: {', '.join(f'{path} is for {size} ranks' for size, path in sizes.items())}")
    num_ranks = options.num_ranks or next(iter(sizes), DEFAULT_NUM_RANKS)
    for path, placement in placements.items():
        placement.check_serves(None, num_ranks, path)
    made_by = {placement.strategy for placement in placements.values()}
    wanted = NATIVE_STRATEGIES if options.strategies is None else options.strategies
    strategies = parse_strategies([*wanted, *sorted(made_by - set(wanted))], options.strategy_settings)

    from rq_ep.model.evaluation.candidate import Candidate  # which imports torch: after all checks

    candidates = []
    for name, strategy in strategies.items():
        files = [path for path, placement in placements.items() if placement.strategy == name]
        for path in files:
            label = name if len(files) == 1 else f"{name} ({Path(path).stem})"
            candidates.append(Candidate(label, strategy, placements[path]))
        if not files:
            candidates.append(Candidate(name, strategy))
    return candidates, num_ranks
