"""Results of the fidelity bench as rows, tables and a picture."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from rich.table import Table

from rq_ep.commands.console import wide_console
from rq_ep.core.files.documents import replacing
from rq_ep.model.evaluation.quality import Estimate

MARKERS = {"least important": "o", "coldest": "s", "by chance": "x", "all": "*"}


@dataclass(frozen=True)
class Row:
    """One choice of experts, or, for `by chance`, the mean of several, in one format."""

    format: str
    chosen: str
    share: float  # of the experts of each layer
    expert_bytes: int  # of the whole model
    low_pairs: float  # share of the routed pairs, by calibration
    kl: Estimate  # nats per token, dense || this
    agreement: Estimate
    routing_shift: Estimate  # share of the dense routers' choices not made here
    perplexity_change: float


@dataclass(frozen=True)
class Mixed:
    """Every expert in a format for half of its pairs."""

    format: str
    low_half: str
    kl: Estimate
    agreement: Estimate


@dataclass(frozen=True)
class Ratio:
    """How two ways to choose what is low compare by KL."""

    format: str
    share: float
    what: str
    kl_ratio: Estimate


@dataclass(frozen=True)
class Rerouted:
    """All experts in a format, with some routers."""

    format: str
    routers: str
    kl: Estimate
    agreement: Estimate
    routing_shift: Estimate
    kl_ratio: Estimate  # to the routers as they are


def show(
    rows: Iterable[Row],
    kinds: Iterable[Row],
    mixed: Iterable[Mixed],
    ratios: Iterable[Ratio],
    rerouted: Iterable[Rerouted],
) -> None:
    """Print everything."""
    console = wide_console(120)
    for title, shown in (("Formats", rows), ("What importance is", kinds)):
        table = Table("format", "experts of each layer", "pairs", "KL / 1e-6", "next token as dense", title=title)
        table.add_column("routing shift")
        table.add_column("perplexity")
        for row in shown:
            table.add_row(
                row.format,
                row.chosen if row.share == 1 else f"{row.share:.0%}, {row.chosen}",
                f"{row.low_pairs:.0%}",
                _millionths(row.kl),
                _percent(row.agreement),
                _percent(row.routing_shift),
                f"{row.perplexity_change:+.3%}",
            )
        console.print(table)
    table = Table("format", "half of the pairs low", "KL / 1e-6", "next token as dense", title="Mixed replicas")
    for half in mixed:
        table.add_row(half.format, half.low_half, _millionths(half.kl), _percent(half.agreement))
    console.print(table)
    table = Table("format", "share", "KL of", "ratio", title="Ways to choose what is low")
    for ratio in ratios:
        table.add_row(ratio.format, f"{ratio.share:.0%}", ratio.what, _ratio(ratio.kl_ratio))
    console.print(table)
    table = Table("all experts in", "routers", "KL / 1e-6", "of as they are", "next token as dense", "routing shift")
    table.title = "Routers"
    for one in rerouted:
        table.add_row(
            one.format, one.routers, _millionths(one.kl), _ratio(one.kl_ratio), _percent(one.agreement),
            _percent(one.routing_shift),
        )  # fmt: skip
    console.print(table)


def _millionths(estimate: Estimate) -> str:
    return f"{estimate.mean * 1e6:.1f} +- {estimate.error * 1e6:.1f}"


def _percent(estimate: Estimate) -> str:
    return f"{estimate.mean:.2%} +- {estimate.error:.2%}"


def _ratio(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f} +- {estimate.error:.2f}"


def draw(rows: Sequence[Row], path: str) -> None:
    """KL against bytes, into a PNG."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row.format for row in rows))
    for row in rows:
        colour = f"C{names.index(row.format)}"
        axes.plot(row.expert_bytes / 2**10, row.kl.mean, MARKERS[row.chosen], color=colour, markersize=8)
    for number, name in enumerate(names):
        axes.plot([], [], color=f"C{number}", label=name)
    for chosen, marker in MARKERS.items():
        axes.plot([], [], marker, color="#444444", label=f"{chosen} experts" if chosen != "by chance" else chosen)
    axes.set(yscale="log", xlabel="expert KiB of the model", ylabel="KL to the dense model, nats per token")
    axes.legend(fontsize=8, frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
