"""The report of a placement on one screen, and as a picture: predicted balance, its bound, and what binds it."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from rq_ep.core.placement import Placement
    from rq_ep.core.stats import ExpertStats

MAX_ROWS = 8  # of layers, and of ranks; those furthest from even are shown

BINDING = {
    "mean": "perfect balance is not excluded: the bound is the mean alone",
    "bytes": "the bytes of the budget keep the bound above the mean",
    "replicas": "the rules allow the hot experts no more replicas",
    "whole experts": "an active expert is read whole by some rank, and experts do not divide by ranks",
    "hot expert": "no byte is left for a replica of the hottest expert",
    "time": "--time-limit was over before more than the mean could be shown",
}


def report(placement: "Placement") -> None:
    """Print the certificate of a placement."""
    from rq_ep.commands.console import wide_console

    console = wide_console()
    certificate = placement.certificate
    _print_summary(console, placement)
    console.print(_formats_table(certificate["formats"], certificate["replicas_by_format"]))
    console.print(_layers_table(placement))
    console.print(_ranks_table(placement))
    for row in certificate.get("what_if", ()):
        held_out = f", {row['held_out']:.3f} on the other half" if "held_out" in row else ""
        text = f"what if: {row['change']}: predicted {row['predicted']:.3f}{held_out}, bound {row['bound']:.3f}"
        console.print(text, soft_wrap=True)
    for warning in certificate.get("warnings", ()):
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def _print_summary(console: "Console", placement: "Placement") -> None:
    from rq_ep.solver.objective.step_balance import SPLITS

    certificate = placement.certificate
    num_layers = len(placement.layers)
    console.print(
        f"Balance: {certificate['objective']} ({certificate['steps']} steps, {num_layers} layers)", soft_wrap=True
    )
    lines = [
        ("predicted", certificate["predicted"], f"split: {SPLITS[certificate['split']]}"),
        (
            "worst tenth",
            certificate["cvar90"],
            f"{_tail_note(certificate['tail_weight'])}p90 {certificate['p90']:.3f}, worst step "
            f"{certificate['worst']:.3f}",
        ),
        (
            "bound",
            certificate["bound"],
            f"{certificate['bound_holds_for']}; gap {certificate['gap']:.1%}; {BINDING[certificate['binding']]}",
        ),
        (
            "standard EP",
            certificate["standard"],
            f"on the same steps; the busiest rank here has {certificate['of_standard']:.1%} of its load",
        ),
        ("first half", certificate["halves"][0], f"of the steps; {certificate['halves'][1]:.3f} on the second"),
    ]
    if certificate["unseen"]:
        lines.append(
            (
                "unseen",
                certificate["unseen"]["predicted"],
                f"on {certificate['unseen']['steps']} other steps of the record",
            )
        )
    for name, value, note in lines:
        console.print(f"  {name:<12}{value:7.3f}  {note}", markup=False, soft_wrap=True)
    if placement.low_precision_cap is not None:
        console.print(
            f"  {'low pairs':<12}{placement.low_precision_planned:7.1%}  of the calibration pairs in low precision "
            f"(cap {placement.low_precision_cap:.0%})",
            soft_wrap=True,
        )
    for name, value in certificate.items():
        if name in ("importance", "layers_without_replica", "searched_from"):
            console.print(f"  {name.replace('_', ' ')}: {value}", markup=False, soft_wrap=True)
    if replaced := certificate.get("replaced"):
        console.print(f"  {'current':<12}{_migration_summary(replaced)}", markup=False, soft_wrap=True)


def _tail_note(tail_weight: float) -> str:
    return f"weighs {tail_weight:g} in what was searched for; " if tail_weight else ""


def _migration_summary(replaced: "dict[str, Any]") -> str:
    staying = (
        f"cannot stay ({replaced['refused']})"
        if replaced["staying"] is None
        else f"staying predicted {replaced['staying']:.3f}"
    )
    whole = replaced["moving_all"]
    return (
        f"{replaced['choice']}, {replaced['moved_bytes']:,} bytes; {staying}; moving all {whole['predicted']:.3f} for "
        f"{whole['moved_bytes']:,} bytes"
    )


def _formats_table(formats: "dict[str, dict[str, float]]", replicas: "dict[str, int]") -> Any:
    """Of each allowed format, what it stores and the damage that is expected of that."""
    from rich.table import Table

    measured = [key for key in ("error", "kl") if any(key in row for row in formats.values())]
    table = Table("format", "experts", "replicas", "pairs", *measured, "", title="Formats", box=None, padding=(0, 1))
    for name, row in formats.items():
        damage = (f"{row[key]:.2e}" if key in row else "-" for key in measured)
        note = "" if row["experts"] else "allowed, never used"
        table.add_row(name, str(row["experts"]), str(replicas.get(name, 0)), f"{row['pairs']:.1%}", *damage, note)
    return table


def _layers_table(placement: "Placement") -> Any:
    from rich.table import Table

    shown = sorted(placement.layers, key=lambda layer: -(layer.predicted or 0))[:MAX_ROWS]
    title = "Layers" if len(shown) == len(placement.layers) else f"Worst {len(shown)} of {len(placement.layers)} layers"
    table = Table("layer", "predicted", "bound", "gap", "binding", "replicas", title=title, box=None, padding=(0, 1))
    for layer in sorted(shown, key=lambda layer: layer.index) if len(shown) == len(placement.layers) else shown:
        table.add_row(
            str(layer.index),
            *("-" if value is None else f"{value:.3f}" for value in (layer.predicted, layer.bound)),
            "-" if layer.gap is None else f"{layer.gap:.1%}",
            layer.binding or "-",
            _format_counts(layer.replicas.formats_P),
        )
    if len(shown) < len(placement.layers):
        values = [layer.predicted or 1.0 for layer in placement.layers]
        every = [name for layer in placement.layers for name in layer.replicas.formats_P]
        table.add_row("all", f"{sum(values) / len(values):.3f}", "", "", "", _format_counts(every))
    return table


def _format_counts(names: "tuple[str, ...] | list[str]") -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(Counter(names).items()))


def _ranks_table(placement: "Placement") -> Any:
    from rich.table import Table

    num_ranks = placement.topology.num_ranks
    load_R = placement.certificate["load"]
    by_format = placement.certificate["bytes_by_format"]
    order = sorted(range(num_ranks), key=lambda rank: -load_R[rank])
    shown = range(num_ranks) if num_ranks <= MAX_ROWS else [*order[: MAX_ROWS // 2], *order[-MAX_ROWS // 2 :]]
    title = "Ranks, all layers together" if num_ranks <= MAX_ROWS else f"Busiest and idlest of {num_ranks} ranks"
    table = Table("rank", "load", "expert bytes", "budget", "used", *by_format, title=title, box=None, padding=(0, 1))
    for rank in shown:
        used, budget = placement.bytes_R[rank], placement.budget_bytes_R[rank] if placement.budget_bytes_R else None
        table.add_row(
            str(rank),
            f"{load_R[rank]:.3f}",
            f"{used:,}",
            "-" if budget is None else f"{budget:,}",
            "-" if not budget else f"{used / budget:.1%}",
            *(f"{sizes[rank]:,}" for sizes in by_format.values()),
        )
    return table


def draw(placement: "Placement", stats: "ExpertStats", path: Path) -> None:
    """Write a PNG: planned load of every rank and layer, and the replicas of every layer by format."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from rq_ep.core.files.documents import replacing

    num_ranks = placement.topology.num_ranks
    rows = []
    for layer, loads_E in zip(placement.layers, stats.counts.sum(axis=0), strict=True):
        load_R = layer.loads_R(loads_E, num_ranks)
        rows.append(load_R / max(load_R.mean(), 1e-300))
    names = [str(layer.index) for layer in placement.layers]
    figure = Figure(figsize=(10, min(1.5 + 0.3 * max(len(names), 6), 20)), layout="constrained")
    heat, bars = figure.subplots(1, 2)
    image = heat.imshow(np.array(rows), aspect="auto", cmap="coolwarm", vmin=0.5, vmax=1.5)
    figure.colorbar(image, ax=heat, label="planned load / mean")
    certificate = placement.certificate
    summary = "load of every rank"
    if "bound" in certificate:
        summary = f"max/mean predicted {certificate['predicted']:.3f}, bound {certificate['bound']:.3f}"
    heat.set(xlabel="rank", ylabel="layer", title=f"{placement.strategy}: {summary}", yticks=range(len(names)))
    heat.set_yticklabels(names)
    heat.xaxis.set_major_locator(MaxNLocator(integer=True))
    left = np.zeros(len(names))
    for name in placement.formats:
        numbers = np.array([layer.replicas.formats_P.count(name) for layer in placement.layers])
        bars.barh(range(len(names)), numbers, left=left, label=name)
        left += numbers
    bars.set(xlabel="replicas", ylabel="layer", title="replicas by format", yticks=range(len(names)))
    bars.set_yticklabels(names)
    bars.xaxis.set_major_locator(MaxNLocator(integer=True))
    bars.invert_yaxis()
    figure.legend(loc="outside lower right", ncols=len(placement.formats))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
