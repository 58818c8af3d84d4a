"""`rq-ep calibrate`: measure the load of each expert of a model, and its error in low bits.

A model that is too large for one process is spread over ranks: torchrun --nproc-per-node R -m rq_ep calibrate ...
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rq_ep.config import MODEL_HELP, add_flags, read_settings
from rq_ep.core.options import option
from rq_ep.core.stats import ExpertStats
from rq_ep.model.settings import CalibrationSettings

if TYPE_CHECKING:
    from rq_ep.parallel import EPGroup

STEADY = 0.9  # rank correlation of loads between halves above which the sample is taken to be large enough


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(CalibrationSettings):
    """What `rq-ep calibrate` takes beside the settings of a calibration."""

    model: str = option(
        "",
        help=f"{MODEL_HELP}; to spread one that is too large for one process over R ranks: "
        "torchrun --nproc-per-node R -m rq_ep calibrate ...",
        required=True,
        metavar="MODEL",
    )
    text: Sequence[Path] = option(
        (),
        help="files and directories of UTF-8 text, .jsonl with a text to a line; a directory's name is a domain",
        required=True,
        several=True,
        metavar="PATH",
    )
    out: str = option(
        "",
        help="where the statistics go (.safetensors); progress is saved beside it once a minute, and the same command "
        "goes on from there",
        required=True,
        metavar="FILE",
    )
    trace: str | None = option(
        None,
        help="also write what the router chose for every token (.safetensors), for `rq-ep simulate --trace` and "
        "`python -m bench layer`",
        metavar="FILE",
    )
    experts: str | None = option(
        None,
        help="experts written by `rq-ep quantize`: measure the error of their formats on these",
        metavar="DIR",
    )


def configure(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, CalibrateOptions)


def run(args: argparse.Namespace) -> None:
    from rq_ep.commands.common import check_inputs, launched_ranks, quiet_libraries

    options = read_settings(CalibrateOptions, args)
    check_inputs(options.model, options.text)
    quiet_libraries()
    with launched_ranks("calibrate", options.device) as group:
        stats = _calibrate(options, group)
        if group.rank:
            return
        stats.save(options.out)
        _report(stats)
        if options.trace:
            print(f"{options.trace}: what the router chose in these steps, token by token")
        print(f"{options.out}: {stats.num_steps} steps, {stats.num_tokens} tokens of {', '.join(stats.domains)}")


def _calibrate(options: CalibrateOptions, group: "EPGroup") -> ExpertStats:
    """The statistics, the same on every rank; rank 0 shows how far it is."""
    from rq_ep.commands.common import check_outputs
    from rq_ep.commands.progress_bar import showing
    from rq_ep.model.calibration.calibrate import calibrate
    from rq_ep.parallel.agreement import run_on_all_ranks

    outputs = {"--out": options.out, "--trace": options.trace} if group.rank == 0 else {}
    run_on_all_ranks(group, lambda: check_outputs(outputs))
    with showing(group.rank == 0) as show:
        return calibrate(
            options.model,
            options.text,
            options,
            packed_experts=options.experts,
            resume_path=f"{options.out}.resume" if options.trace is None else None,
            group=group,
            trace_path=options.trace,
            progress=show,
        )


def _report(stats: ExpertStats) -> None:
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
