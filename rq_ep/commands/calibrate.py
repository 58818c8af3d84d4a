"""`rq-ep calibrate`: what each expert of a model carries, and what low bits would do to it.

A model that is too large for one process is spread over ranks: torchrun --nproc-per-node R -m rq_ep calibrate ...
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rq_ep.core.stats import ExpertStats
    from rq_ep.parallel import EPGroup

STEADY = 0.9  # rank correlation of loads between halves above which the sample is taken to be large enough


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR",
        help="Hugging Face checkpoint; to spread one that is too large for one process over R ranks: "
        "torchrun --nproc-per-node R -m rq_ep calibrate ...",
    )  # fmt: skip
    parser.add_argument(
        "--text", required=True, nargs="+", type=Path, metavar="PATH",
        help="files and directories of UTF-8 text, .jsonl with a text to a line; a directory's name is a domain",
    )  # fmt: skip
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="where the statistics go (.safetensors); the same command goes on where it was stopped",
    )
    parser.add_argument(
        "--trace", metavar="FILE",
        help="also write what the router chose for every token (.safetensors), for `rq-ep simulate --trace` and "
        "bench/layer.py",
    )  # fmt: skip
    parser.add_argument("--formats", metavar="NAMES", help="formats to measure, by commas (default: native and int8)")
    parser.add_argument("--max-tokens", type=int, default=32_768, metavar="N", help="tokens to run, over all domains")
    parser.add_argument("--sequence-length", type=int, default=128, metavar="N", help="tokens in a sequence")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences in a step")
    parser.add_argument(
        "--experts", metavar="DIR",
        help="experts written by `rq-ep quantize`: measure the error of their formats on these",
    )  # fmt: skip
    parser.add_argument(
        "--importance", default="output", metavar="NAME",
        help="what makes an expert important: output (default: gate weight x norm of its output), gate-mass, load, "
        "wanda, or drop (what the answers lose without it: a pass over the text for every expert)",
    )  # fmt: skip
    parser.add_argument(
        "--measure-kl", action="store_true",
        help="measure what each expert in each format does to the answers, a pass for each: for small models; "
        "`place` then goes by that",
    )  # fmt: skip
    parser.add_argument(
        "--sensitivity-tokens", type=int, default=2048, metavar="N",
        help="tokens of each such pass",
    )  # fmt: skip
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the places text is taken from")


def run(args: argparse.Namespace) -> None:
    from rq_ep.commands.common import launched_ranks, quiet_libraries

    quiet_libraries()
    with launched_ranks("calibrate", args.device) as group:
        stats = _calibrate(args, group)
        if group.rank:
            return
        stats.save(args.out)
        _report(stats)
        if args.trace:
            print(f"{args.trace}: what the router chose in these steps, token by token")
        print(f"{args.out}: {stats.num_steps} steps, {stats.num_tokens} tokens of {', '.join(stats.domains)}")


def _calibrate(args: argparse.Namespace, group: "EPGroup") -> "ExpertStats":
    """The statistics, the same on every rank; rank 0 shows how far it is."""
    from rq_ep.commands.common import parse_dtype, parse_names
    from rq_ep.commands.progress_bar import showing
    from rq_ep.core.files import check_writable
    from rq_ep.model.calibration.calibrate import calibrate
    from rq_ep.model.load.ranks import together

    together(group, lambda: check_writable(args.out) if group.rank == 0 else None)
    with showing(group.rank == 0) as show:
        return calibrate(
            args.model,
            args.text,
            formats=None if args.formats is None else parse_names(args.formats),
            batch_size=args.batch_size,
            sequence_length=args.sequence_length,
            max_tokens=args.max_tokens,
            packed_experts=args.experts,
            resume_path=f"{args.out}.halfway" if args.trace is None else None,
            importance=args.importance,
            measure_kl=args.measure_kl,
            sensitivity_tokens=args.sensitivity_tokens,
            dtype=None if args.dtype is None else parse_dtype(args.dtype),
            device=args.device,
            group=group,
            seed=args.seed,
            trace_path=args.trace,
            progress=show,
        )


def _report(stats: "ExpertStats") -> None:
    import numpy as np
    from rich.table import Table

    from rq_ep.commands.console import wide_console
    from rq_ep.core.stats import PHASES
    from rq_ep.model.calibration.stability import ranking_agreement

    assert stats.visits is not None
    assert stats.importance is not None
    assert stats.error is not None
    others = [q for q, name in enumerate(stats.formats) if name != stats.native_format]
    table = Table("layer", "max/mean", "dead", "busiest", "most important", title="Experts")
    for q in others:
        table.add_column(f"{stats.formats[q]} error")
    for i, visits_E in enumerate(stats.visits):
        busiest, weightiest = int(np.argmax(visits_E)), int(np.argmax(stats.importance[i]))
        table.add_row(
            str(stats.layers[i]),
            f"{visits_E.max() / visits_E.mean():.2f}",
            str(int((visits_E == 0).sum())),
            f"{busiest} ({visits_E[busiest] / visits_E.sum():.0%})",
            f"{weightiest} ({stats.importance[i, weightiest] / stats.importance[i].sum():.0%})",
            *(f"{stats.error[i, :, q].mean():.2%}" for q in others),
        )
    console = wide_console()
    console.print(table)
    if unseen := int((stats.visits == 0).sum()):
        console.print(
            f"{unseen} experts were never chosen: nothing is known of what low bits would do to them, so `place` keeps "
            "them as they are; more text, or other text, may reach them"
        )
    assert stats.phase is not None
    assert stats.domain is not None
    prefill = stats.phase == PHASES.index("prefill")
    agreement = ranking_agreement(stats.counts[prefill], stats.domain[prefill])
    if agreement is not None:
        console.print(
            f"ranking by load: Spearman {agreement:.2f} between one half of the steps and the other"
            + ("; it still moves: give more text or raise --max-tokens" if agreement < STEADY else "")
        )
