"""An evaluation as two tables, what the ranks do and what the model answers, and as a picture of the ranks' loads."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from rq_ep.commands.console import wide_console
from rq_ep.core.files.documents import replacing
from rq_ep.model.evaluation.evaluation_result import Evaluation
from rq_ep.model.evaluation.quality import Estimate


def report(evaluations: Sequence[Evaluation], num_ranks: int, dtype: str, machine: str | None) -> None:
    """Print the figures.

    Args:
        evaluations: a row each.
        num_ranks: of the group.
        dtype: what was computed in.
        machine: what the rows' predictions are from; None: there are none.
    """
    console = wide_console()
    console.print(_ranks_table(evaluations, num_ranks, dtype, machine))
    console.print(_answers_table(evaluations))


def _ranks_table(evaluations: Sequence[Evaluation], num_ranks: int, dtype: str, machine: str | None) -> Table:
    predicted = "" if machine is None else f" Predicted: of p50, and its error in a layer and step, by {machine}."
    table = _table(
        f"{num_ranks} ranks, computing in {dtype}",
        "Load: max/mean over ranks, of every step and layer. ms: compute of the slowest rank in a layer. KiB: experts "
        f"of the fullest rank with room for borrowed ones, and what is borrowed in a layer and step.{predicted}",
    )
    for column in ("load\nmean", "\nworst", "ms\np50", "\np99", "KiB\nheld", "\nmoved"):
        table.add_column(column, justify="right", no_wrap=True)
    if machine is not None:
        table.add_column("ms\npredicted", justify="right", no_wrap=True)
    for row in evaluations:
        cells = [
            f"{row.imbalance_mean:.3f}",
            f"{row.imbalance_worst:.2f}",
            f"{row.compute_s_p50 * 1e3:.2f}",
            f"{row.compute_s_p99 * 1e3:.2f}",
            f"{max(row.bytes_R) / 1024:,.0f}",
            f"{row.transfer_bytes / 1024:,.0f}",
        ]
        if row.predicted_s_p50 is not None:
            cells.append(f"{row.predicted_s_p50 * 1e3:.2f} ({row.prediction_error:.0%})")
        table.add_row(row.label, *cells)
    return table


def _answers_table(evaluations: Sequence[Evaluation]) -> Table:
    first = evaluations[0]
    dense = first.dense
    table = _table(
        f"the model's answers, {first.num_tokens:,} predicted tokens",
        "KL and next token: against the dense model, whose perplexity has a standard error of "
        f"{dense.perplexity.error:.2f}. Shift: choices of the dense routers not made here, all layers. Greedy: "
        "continuations equal to the dense model's in every token.",
    )
    for column in ("\nperplexity", "\nKL / 1e-6", "next token\nas dense", "\nshift", "\ngreedy"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in evaluations:
        table.add_row(
            row.label,
            f"{row.perplexity.mean:.4f}",
            *_likeness(row.kl, row.agreement),
            f"{np.mean([shift.mean for shift in row.routing_shift_L]):.2%}" if row.routing_shift_L else "-",
            "-" if row.greedy_match is None else f"{row.greedy_match.mean:.0%}",
        )
    table.add_row("dense", f"{dense.perplexity.mean:.4f}", style="dim")
    if dense.bf16_kl is not None and dense.bf16_agreement is not None:
        table.add_row("dense, bf16 to fp32", "", *_likeness(dense.bf16_kl, dense.bf16_agreement), style="dim")
    return table


def _table(title: str, caption: str) -> Table:
    table = Table(title=title, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("\nstrategy", no_wrap=True)
    return table


def _likeness(kl: Estimate, agreement: Estimate) -> tuple[str, str]:
    return (
        f"{kl.mean * 1e6:.1f} +- {kl.error * 1e6:.1f}",
        f"{agreement.mean:.2%} +- {agreement.error:.2%}",
    )


def draw(evaluations: Sequence[Evaluation], path: str | Path) -> None:
    """Write a PNG with a panel for each row: how the load of a layer and step spreads over the ranks.

    Ranks are sorted anew in each layer and step: averaged by number, a hot rank that moves about would look balanced.
    """
    figure = Figure(figsize=(2.2 * len(evaluations) + 0.8, 2.8), layout="constrained")
    panels = figure.subplots(1, len(evaluations), sharey=True, squeeze=False)[0]
    for panel, row in zip(panels, evaluations, strict=True):
        ranks = range(1, len(row.sorted_loads_R) + 1)
        panel.bar(ranks, row.sorted_loads_R, color="#4477aa")
        panel.axhline(1, color="#222222", linewidth=0.8, linestyle="--")
        panel.set_title(f"{row.label}\nmax/mean {row.imbalance_mean:.2f}, worst {row.imbalance_worst:.2f}", fontsize=9)
        panel.set_xticks(list(ranks))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("load of the rank / mean load")
    figure.supxlabel("ranks from busiest to idlest, sorted in each layer and step", fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
