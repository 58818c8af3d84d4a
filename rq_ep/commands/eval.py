"""`rq-ep eval`: strategies and placements side by side on held-out text."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rq_ep.commands.common import add_set_option
from rq_ep.core.errors import UserError

if TYPE_CHECKING:
    from rq_ep.model.evaluation.candidate import Candidate

DEFAULT_NUM_RANKS = 4


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face checkpoint")
    parser.add_argument(
        "--text", required=True, nargs="+", type=Path, metavar="PATH",
        help="held-out text: files and directories of UTF-8 text, .jsonl with a text to a line",
    )  # fmt: skip
    parser.add_argument(
        "--placement", nargs="+", action="extend", default=[], metavar="FILE",
        help="placements written by `rq-ep place`, served by the strategies that made them",
    )  # fmt: skip
    parser.add_argument(
        "--strategies", metavar="NAMES",
        help="strategies to compare, by commas (default: all that need no low format); without a placement they "
        "place on uniform load",
    )  # fmt: skip
    add_set_option(parser)
    parser.add_argument("--num-ranks", type=int, metavar="R", help="ranks (default: the placement's, or 4)")
    parser.add_argument("--max-tokens", type=int, default=16_384, metavar="N", help="tokens to run, over all domains")
    parser.add_argument("--sequence-length", type=int, default=128, metavar="N", help="tokens in a sequence")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences in a step")
    parser.add_argument("--dtype", default="float32", metavar="NAME", help="dtype to compute in")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the places text is taken from")
    parser.add_argument(
        "--machine", metavar="FILE",
        help="predict the compute that is measured, by the file of `rq-ep profile`, and print the error",
    )  # fmt: skip
    parser.add_argument("--experts", metavar="DIR", help="quantized experts written by `rq-ep quantize`")
    parser.add_argument(
        "--greedy-tokens", type=int, default=32, metavar="N",
        help="length of the greedy continuations compared with the dense model's (default 32; 0: none)",
    )  # fmt: skip
    parser.add_argument(
        "--no-noise-floor", action="store_true",
        help="spare the comparison of the dense model in bf16 with itself in fp32, and the memory of one copy of it",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")
    parser.add_argument("--plot", metavar="FILE", help="write a picture of the ranks' loads here (.png)")


def run(args: argparse.Namespace) -> None:
    from rq_ep.commands.common import parse_dtype, quiet_libraries
    from rq_ep.commands.eval_report import draw, report
    from rq_ep.commands.progress_bar import showing
    from rq_ep.core.files import check_writable, write_json
    from rq_ep.costs import cost_model
    from rq_ep.model.evaluation.evaluate import compare

    machine = None if args.machine is None else cost_model(args.machine)
    quiet_libraries()
    candidates, num_ranks = _candidates(args)
    for path in filter(None, (args.json, args.plot)):
        check_writable(path)
    with showing() as show:
        evaluations = compare(
            args.model,
            args.text,
            candidates,
            num_ranks=num_ranks,
            batch_size=args.batch_size,
            sequence_length=args.sequence_length,
            max_tokens=args.max_tokens,
            dtype=parse_dtype(args.dtype),
            device=args.device,
            seed=args.seed,
            machine=machine,
            packed_experts=args.experts,
            noise_floor=not args.no_noise_floor,
            greedy_tokens=args.greedy_tokens,
            progress=show,
        )
    report(evaluations, num_ranks, args.dtype, None if machine is None else machine.description)
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("run", "command")}
        document = {
            "settings": settings | {"num_ranks": num_ranks},
            "strategies": {candidate.label: vars(candidate.strategy) for candidate in candidates},
            "rows": [evaluation.as_dict() for evaluation in evaluations],
        }
        write_json(args.json, document, default=str)
    if args.plot:
        draw(evaluations, args.plot)


def _candidates(args: argparse.Namespace) -> "tuple[list[Candidate], int]":
    """The rows of the table: a placement for each file, and the strategies that no file was made by."""
    from rq_ep.commands.common import parse_names, parse_strategies
    from rq_ep.core.placement import Placement
    from rq_ep.model.evaluation.candidate import Candidate
    from rq_ep.strategies import NATIVE_STRATEGIES

    placements = {path: Placement.load(path) for path in args.placement}
    made_by = {placement.strategy for placement in placements.values()}
    wanted = list(NATIVE_STRATEGIES) if args.strategies is None else parse_names(args.strategies)
    names = [*wanted, *sorted(made_by - set(wanted))]
    strategies = parse_strategies(names, args.set)
    candidates = []
    for name, strategy in strategies.items():
        files = [path for path, placement in placements.items() if placement.strategy == name]
        for path in files:
            label = name if len(files) == 1 else f"{name} ({Path(path).stem})"
            candidates.append(Candidate(label, strategy, placements[path]))
        if not files:
            candidates.append(Candidate(name, strategy))
    sizes = {placement.topology.num_ranks: path for path, placement in placements.items()}
    if args.num_ranks is not None:
        return candidates, args.num_ranks
    if len(sizes) > 1:
        raise UserError(f"--placement: {', '.join(f'{path} is for {size} ranks' for size, path in sizes.items())}")
    return candidates, next(iter(sizes), DEFAULT_NUM_RANKS)
