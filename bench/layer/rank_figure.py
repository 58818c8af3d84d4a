"""A picture of every rank: its load, and how long its experts compute, side by side for every strategy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.layer.figure import COLOURS
from bench.layer.tables import scenario_title
from rq_ep.core.files.documents import replacing


def draw_ranks(result: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG: a row of two panels for each scenario, bars for ranks, lines at the mean."""
    rows = [row for row in result["rows"] if "pairs_by_rank" in row]
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    figure = Figure(figsize=(10, 2.6 * len(scenarios) + 1.1), layout="constrained")
    panels = figure.subplots(len(scenarios), 2, squeeze=False)
    for (load, latency), scenario in zip(panels, scenarios, strict=True):
        of_scenario = [row for row in rows if row["scenario"] == scenario]
        for at, row in enumerate(of_scenario):
            pairs_R = np.array(row["pairs_by_rank"])
            p50_R, p99_R = (1e3 * np.array(row["compute_s_by_rank"][name]) for name in ("p50", "p99"))
            width = 0.8 / len(pairs_R)
            x_R = at + (np.arange(len(pairs_R)) - (len(pairs_R) - 1) / 2) * width
            colour = COLOURS[at % len(COLOURS)]
            load.bar(x_R, pairs_R / pairs_R.mean(), 0.9 * width, color=colour)
            latency.bar(x_R, p50_R, 0.9 * width, color=colour)
            latency.vlines(x_R, p50_R, p99_R, color="#222222", linewidth=1)
            load.text(at, 0.04, f"max/mean\nof steps\n{row['imbalance_mean']:.3f}", ha="center", fontsize=8)
            slowest = f"slowest\n{1e3 * row['compute_s']['p50']:.0f} ms"
            latency.text(at, 0, slowest, ha="center", va="bottom", fontsize=8)
        load.axhline(1, color="#222222", linewidth=0.8, linestyle=":")
        load.set_ylabel(f"{scenario_title(scenario)}\nload of each rank, all steps; mean = 1")
        latency.set_ylabel("expert compute, ms\n(bar p50, line to p99)")
        for panel in (load, latency):
            panel.set_xticks(range(len(of_scenario)), [row["label"] for row in of_scenario])
            panel.spines[["top", "right"]].set_visible(False)
    shape = result["shape"]
    figure.suptitle(
        f"{result['num_ranks']} ranks, {shape['num_experts']} experts of {shape['hidden_size']} x "
        f"{shape['intermediate_size']}, {rows[0]['tokens_per_rank']:.0f} tokens a rank",
        fontsize=10,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
