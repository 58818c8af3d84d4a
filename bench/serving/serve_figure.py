"""A picture of a serving benchmark: throughput, and the tails of latency."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.layer.figure import COLOURS
from rq_ep.core.files.documents import replacing

PANELS = {"output_throughput": "output tokens/s", "p99_ttft_ms": "TTFT p99, ms", "p99_itl_ms": "ITL p99, ms"}


def draw(result: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG: a dot for every run, a bar for the median, side by side for the contestants of each load."""
    rows, names = result["rows"], result["contestants"]
    loads = list(dict.fromkeys((row["request_rate"], row["max_concurrency"]) for row in rows))
    figure = Figure(figsize=(4 * len(PANELS), 3.6), layout="constrained")
    width = 0.8 / len(names)
    for axes, (key, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for at, name in enumerate(names):
            shift = (at - (len(names) - 1) / 2) * width
            for place, load in enumerate(loads):
                values = sorted(
                    row[key]
                    for row in rows
                    if row["contestant"] == name
                    and (row["request_rate"], row["max_concurrency"]) == load
                    and key in row
                )
                if not values:
                    continue
                colour = COLOURS[at % len(COLOURS)]
                label = name if place == 0 else None
                axes.bar(place + shift, values[len(values) // 2], width, color=colour, label=label)
                axes.plot([place + shift] * len(values), values, ".", color="black", markersize=3)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(loads)), [f"rate {rate:g}\n{most} at once" for rate, most in loads], fontsize=8)
        axes.set_ylim(bottom=0)
    figure.axes[0].legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
