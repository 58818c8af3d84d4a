"""Pictures of evaluations."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rq_ep.core.files import replacing
from rq_ep.model.evaluate import Evaluation


def plot_loads(evaluations: Sequence[Evaluation], path: str | Path) -> None:
    """Write a PNG with a panel for each row: how the load of a layer and step spreads over the ranks.

    Ranks are sorted anew in each layer and step: averaged by number, a hot rank that moves about would look balanced.
    """
    figure = Figure(figsize=(2.2 * len(evaluations) + 0.8, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
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
