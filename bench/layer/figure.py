"""A picture of a result over many scenarios, in the shape of the LLEP paper's Figures 1 and 4."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.layer.published import published
from bench.layer.tables import labels_of
from rq_ep.core.files.documents import replacing

COLOURS = ("#bbbbbb", "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def draw(result: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG: speed-up over the first strategy above, rows of the fullest rank below."""
    rows = [row for row in result["rows"] if "imbalance_mean" in row]
    labels = labels_of(rows)
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    by_name = {(row["scenario"], row["label"]): row for row in rows}
    figure = Figure(figsize=(max(5, 0.95 * len(scenarios) + 1.5), 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    at, width = np.arange(len(scenarios)), 0.8 / len(labels)
    for number, label in enumerate(labels):
        shift = (number - (len(labels) - 1) / 2) * width
        of_label = [by_name[scenario, label] for scenario in scenarios]
        colour = COLOURS[number % len(COLOURS)]
        upper.bar(at + shift, [1 / row["compute_s_ratio"] for row in of_label], width, color=colour, label=label)
        for figure_name, alpha in (("received_bytes_peak", 0.35), ("held_bytes_peak", 1.0)):
            lower.bar(at + shift, [row[figure_name] / 2**20 for row in of_label], width, color=colour, alpha=alpha)
    ideal = [by_name[scenario, labels[0]]["ideal_speed_up"] for scenario in scenarios]
    upper.plot(at, ideal, "_", color="#222222", markersize=22, label="perfect balance")
    theirs = [published(result["shape_name"], scenario).get("speed_up", np.nan) for scenario in scenarios]
    if np.isfinite(theirs).any():
        upper.plot(at, theirs, "x", color="#222222", label="llep, published (whole layer, 8 H200)")
    upper.set_ylabel(f"speed-up over {labels[0]}\nslowest rank's experts, measured")
    figure.legend(fontsize=8, frameon=False, ncols=len(labels) + 2, loc="outside lower center")
    lower.set_ylabel("rows of the fullest rank, MiB\nlight: computed on; dark: others',\nheld at once")
    lower.set_xticks(at, scenarios, rotation=30)
    shape = result["shape"]
    figure.suptitle(
        f"{result['shape_name']}, {result['num_ranks']} ranks ({result['backend']} on {result['device']}), "
        f"D={shape['hidden_size']} F={shape['intermediate_size']}, "
        f"{rows[0]['tokens_per_rank']:g} tokens a rank",
        fontsize=10,
    )
    for panel in (upper, lower):
        panel.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
