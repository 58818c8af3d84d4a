"""Run one bench, in a process of its own or as one rank of a launcher's group.

python -m bench plan --sizes 64x8
torchrun --nproc-per-node 2 -m bench layer --shape tiny
deepspeed --num_gpus 8 --module bench layer --shape mixtral
python launch/ray_job.py --num-ranks 2 bench layer --shape tiny
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from rq_ep.core.errors import UserError, check_choice


class Bench(NamedTuple):
    """Where the `main(argv)` of a bench is, and what it measures."""

    module: str
    summary: str


BENCHES = {
    "layer": Bench("bench.layer.layer", "one MoE layer under several strategies: load, time, bytes, output error"),
    "plan": Bench("bench.layer.plan", "CPU time of planning one step of one layer"),
    "overhead": Bench("bench.layer.overhead", "what a layer spends besides its matrix products, and moving an expert"),
    "solver": Bench("bench.solver.solver", "the placement solver against EPLB and a lower bound, on synthetic traces"),
    "low-formats": Bench("bench.solver.low_formats", "several low formats at once against each of them alone"),
    "engines": Bench("bench.engines.engines", "placements inside vLLM and SGLang: their own answers beside ours"),
    "replan": Bench("bench.solver.replan", "a placement planned again after a change of domain: gain, bytes, CPU time"),
    "recover": Bench("bench.solver.recover", "the loss of a rank: how fast the others go on, and how well balanced"),
    "breakeven": Bench("bench.lending.breakeven", "from which imbalance on lending experts pays, in modelled time"),
    "drift": Bench("bench.lending.drift", "strategies placed for one load that serve another, in modelled time"),
    "formats": Bench("bench.formats.formats", "bytes, rounding error and speed of every weight format"),
    "fidelity": Bench("bench.formats.fidelity", "what low-bit experts do to a model's answers"),
    "serve": Bench("bench.serving.serve", "latency and throughput of a server under every strategy"),
    "options": Bench(
        "bench.serving.request_options", "what a grammar and routed experts cost, what a prefix and n save"
    ),
    "soak": Bench("bench.serving.soak", "a server whose clients come and go: is anything lost, wrong or leaked?"),
    "rebalance": Bench("bench.serving.rebalance", "a placement that follows the load: gain, cost, wrong answers"),
    "step": Bench("bench.serving.decode_step", "where the time of a decode step goes, by both ways to dispatch it"),
    "faults": Bench("bench.serving.faults", "ranks that die, leave and come back: failed answers, pauses, cost"),
    "load": Bench("bench.serving.load", "a model about as large as the machine: calibrated, placed, loaded, served"),
    "balance": Bench("bench.serving.balance", "what balance is worth end to end: prompts through HTTP"),
    "gpu": Bench("bench.gpu.gpu", "all evidence that one device gives, stage by stage, in nine minutes"),
    "decode": Bench("bench.gpu.decode", "tokens per second of one rank by format, against transformers' own"),
    "waits": Bench("bench.gpu.waits", "how often the host waits for the device in a call of a layer"),
    "staging": Bench("bench.gpu.staging", "products while an expert arrives on another stream"),
    "device-tests": Bench("bench.gpu.device_tests", "the tests that need a device, none hiding the next"),
    "report": Bench("bench.report", "measures nothing: renews the tables of bench/results/*.md from the JSON there"),
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The name of a bench, and the arguments that are its own."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog="\n".join(["benches:", *(f"  {name:12} {bench.summary}" for name, bench in BENCHES.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher puts it first
    parser.add_argument("name", metavar="NAME", help="which bench; NAME --help lists its options")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="options of the bench")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Any:
    """Run the bench that `argv` names, and return what its `main` returns.

    Raises:
        UserError: there is no such bench, or an option of it makes no sense.
        RankFailure: another rank has ended.
    """
    options = parse_arguments(argv)
    bench = BENCHES[check_choice("bench", options.name, BENCHES)]
    return import_module(bench.module).main(options.arguments)


def _run_from_shell() -> int:
    """Exit code 2 and one line for a user's mistake, 1 for a failed rank or check."""
    from rq_ep.parallel import RankFailure

    logging.basicConfig(format="%(message)s")
    logging.getLogger("bench").setLevel(logging.INFO)
    try:
        result = main()
    except (UserError, RankFailure) as error:
        print(f"bench {parse_arguments(None).name}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(_run_from_shell())
