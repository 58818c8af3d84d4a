"""A picture of re-placement while serving: imbalance over what was served, every commit marked; the longest gaps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.layer.figure import COLOURS
from rq_ep.core.files.documents import replacing


def draw(result: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG: a line for every server, a triangle where a new placement served, the domains above."""
    part, cost = result["parts"]["domains"], result["parts"].get("cost")
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[4, 1])
    for at, (name, rows) in enumerate(part["series"].items()):
        colour = COLOURS[at % len(COLOURS)]
        pairs = np.array([row["pairs"] for row in rows]) / 1e6
        values = np.array([row["load"] for row in rows])
        left.plot(pairs, values, color=colour, label=name, linewidth=1.2)
        marks = np.array([one["pairs"] for one in part["commits"][name]]) / 1e6
        left.plot(marks, np.interp(marks, pairs, values), "^", color=colour, markersize=7)
    for end, name in zip(part["phase_ends"], part["domains"], strict=True):
        left.axvline(end / 1e6, color="#dddddd", linewidth=1)
        left.text(end / 1e6, 1.0, f"{name} ", ha="right", va="bottom", fontsize=9, transform=left.get_xaxis_transform())
    left.set_xlabel("routed pairs served, millions (a triangle: a new placement serves)", fontsize=9)
    left.set_ylabel("max/mean load of ranks, mean of layers", fontsize=9)
    left.legend(fontsize=8)
    if cost is not None:
        names = ("off", "moving", "stop-the-world")
        right.barh(names, [cost["longest_gap_ms"][name] for name in names], color=COLOURS[1])
        right.set_title("longest gap, ms", fontsize=9)
    else:
        right.set_axis_off()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
