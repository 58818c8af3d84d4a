"""A picture of ranks that die and come back: tokens/s over time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.layer.figure import COLOURS
from bench.serving.faults_figures import BIN_S
from rq_ep.core.files.documents import replacing

NUM_SHOWN = 3  # kills


def draw(part: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG: tokens/s around the first kills, each from the signal to the rank's return in grey."""
    events = part["events"][:NUM_SHOWN]
    end_s = events[-1]["at_s"] + events[-1]["back_s"] + 3.0
    rates = np.array(part["tokens_by_bin"]) / BIN_S
    begin_s = BIN_S * np.arange(len(rates))
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.step(begin_s, rates, where="post", color=COLOURS[0], linewidth=1.2)
    for event in events:
        axes.axvspan(event["at_s"], event["at_s"] + event["back_s"], color="#eeeeee")
        axes.axvline(event["at_s"], color=COLOURS[1], linewidth=1)
        axes.text(event["at_s"], 1.0, f" rank {event['rank']}", va="bottom", transform=axes.get_xaxis_transform())
    axes.set_xlim(0, end_s)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds (line: kill -9 of a rank; grey: until all ranks serve again)", fontsize=9)
    axes.set_ylabel("tokens/s, all streams", fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
