"""The command `rq-ep`: calibrate a model, place its experts, and look at the result. Serving is `-m rq_ep.serve`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from rq_ep.config import FlagParser
from rq_ep.core.errors import UserError, check_choice


class Command(NamedTuple):
    """The help of a sub-command."""

    summary: str
    example: str


COMMANDS = {
    "tiny-model": Command(
        "train a small MoE language model from text at hand: something real to try the rest on", "--out runs/tiny"
    ),
    "calibrate": Command(
        "run text through a model; write each expert's load and sensitivity to low bits",
        "--model runs/tiny --text runs/tiny/text/train --out runs/stats.safetensors",
    ),
    "quantize": Command(
        "write experts in low-bit formats, rounded with regard to the inputs they meet",
        "--model runs/tiny --text runs/tiny/text/train --formats int4_g32 --out runs/experts",
    ),
    "place": Command(
        "choose replicas, formats and ranks inside a byte budget; print the bound beside the result",
        "--stats runs/stats.safetensors --num-ranks 4 --budget ep --out runs/placement.json",
    ),
    "simulate": Command(
        "replay recorded loads under several strategies; print the load of every rank",
        "--stats runs/held-out.safetensors --calibration runs/stats.safetensors --num-ranks 4",
    ),
    "eval": Command(
        "compare a placement with the dense model on held-out text: load, time, bytes, quality",
        "--model runs/tiny --text runs/tiny/text/held-out --placement runs/placement.json",
    ),
    "profile": Command(
        "time experts, links and planning on this machine; write the figures that price plans",
        "--model runs/tiny --out runs/profile.json",
    ),
    "convert": Command(
        "turn other engines' expert statistics into ours, and placements into theirs or back",
        "runs/placement.json --to sglang --out runs/init_expert_location.json",
    ),
    "env": Command("say what this machine has: devices, backends, versions", "--json"),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except for None, False and empty lists."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    chosen = next((word for word in argv if not word.startswith("-")), None)
    speaker = f"rq-ep {chosen}" if chosen in COMMANDS else "rq-ep"
    try:
        _run(argv, chosen)
    except UserError as error:
        print(f"{speaker}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        return 1
    except OSError as error:  # a disk that is full, a file that may not be read
        print(f"{speaker}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{speaker}: stopped", file=sys.stderr)
        return 130
    return 0


def _run(argv: Sequence[str], chosen: str | None) -> None:
    """Run the sub-command `chosen`, the first word of `argv` that is no flag."""
    if chosen == "serve":
        raise UserError("a server is started by torchrun --nproc-per-node R -m rq_ep.serve --model MODEL")
    if chosen is not None:
        check_choice("command", chosen, COMMANDS)
    parser = FlagParser(
        prog="rq-ep",
        description=__doc__,
        epilog="First tiny-model, or a checkpoint of your own; then calibrate, place, eval; then serve. "
        "`rq-ep COMMAND --help` has an example of each.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, example) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary, epilog=f"example: rq-ep {name} {example}",
            formatter_class=HelpFormatter,
        )  # fmt: skip
        if name == chosen:  # the others need not be imported
            command = import_module(f"rq_ep.commands.{name.replace('-', '_')}")
            command.configure(subparser)
            subparser.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
