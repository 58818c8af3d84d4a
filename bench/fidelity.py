"""What low bits do to a model's answers: every format, on the experts chosen by importance, coldness or chance.

    python bench/fidelity.py --model runs/demo/model --text runs/demo/model/text/held-out \
        --calibrate-on runs/demo/model/text/train --json OUT.json --png OUT.png

The experts' weights are replaced by what their packed form gives back: the figures are those of the formats, whatever
computes them. `rq-ep eval` runs a placement through the ranks.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the bench is run from a checkout

from bench.facts import facts
from bench.rounded import RoundedModel
from bench.start import start
from rq_ep.commands.common import quiet_libraries
from rq_ep.commands.progress import progress_bar
from rq_ep.core.files import check_writable, replacing, write_json
from rq_ep.core.stats import ExpertStats
from rq_ep.model.calibrate import calibrate
from rq_ep.model.checkpoint import read_tokenizer
from rq_ep.model.importance import IMPORTANCES
from rq_ep.model.listen import Subject, listen
from rq_ep.model.quality import Estimate, Quality
from rq_ep.model.quantize import MAX_ROWS
from rq_ep.model.windows import make_windows

SHARES = (0.25, 0.5)
NUM_RANDOM = 3
FORMATS = "int8,fp8,int4_g32,int4_g32:calibrated,int4_g128,int4_g128:calibrated,mxfp4"
MARKERS = {"least important": "o", "coldest": "s", "by chance": "x", "all": "*"}


@dataclass(frozen=True)
class Row:
    """One choice of experts, or, for `by chance`, several, in one format."""

    format: str
    chosen: str
    share: float  # of the experts of each layer
    expert_bytes: int  # of the whole model
    low_pairs: float  # share of the routed pairs, by calibration
    kl: Estimate
    agreement: Estimate
    perplexity_change: float


def main() -> None:
    args = _arguments()
    for path in filter(None, (args.json, args.png)):
        check_writable(path)
    quiet_libraries()
    names = args.formats.split(",")
    subject = Subject.open(args.model, torch.float32, "cpu")
    rows, kinds, mixed = [], [], []
    with progress_bar() as bar:
        num_rows = len(names) * (len(SHARES) * 3 + 3) + len(IMPORTANCES) + 1
        task = bar.add_task("calibrating", total=num_rows)

        def advance(what: str) -> None:
            bar.update(task, description=what, advance=1)

        stats = {
            kind: calibrate(
                subject.network, args.calibrate_on, formats=[*dict.fromkeys(map(_base, names))], importance=kind,
                measure_kl=kind == "drop",
            )
            for kind in IMPORTANCES
        }  # fmt: skip
        heard = listen(subject, args.calibrate_on, max_rows=MAX_ROWS)
        windows = make_windows(
            args.text, read_tokenizer(args.model), sequence_length=128, max_tokens=args.max_tokens, batch_size=8
        )
        model = RoundedModel.of(subject, windows.batches, [record.kept_rows() for record in heard.records])
        for name in names:
            for share in SHARES:
                for chosen, orders in _orders(stats["output"], name).items():
                    advance(f"{name}, {chosen}")
                    rows.append(_row(model, stats["output"], name, chosen, share, orders))
            advance(f"{name}, all")
            rows.append(_row(model, stats["output"], name, "all", 1.0, [np.zeros(stats["output"].counts.shape[1:])]))
            for low_half, by_gate in (("lowest gates", True), ("by chance", False)):
                advance(f"{name}, mixed replicas")
                quality = model.half_low(name, by_gate)
                mixed.append({"format": name, "low_half": low_half, **_summary(quality)})
        for kind, order_LE in _kinds(stats, args.importance_format).items():
            advance(f"importance by {kind}")
            kinds.append(_row(model, stats["output"], args.importance_format, kind, args.importance_share, [order_LE]))
    _show(rows, kinds, mixed)
    if args.json:
        document = {
            "command": " ".join(sys.argv), **facts("cpu"), "num_tokens": windows.num_tokens,
            "rows": [asdict(row) for row in rows], "importances": [asdict(row) for row in kinds],
            "mixed_replicas": mixed,
        }  # fmt: skip
        write_json(args.json, document)
    if args.png:
        _draw(rows, args.png)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face checkpoint, a small one")
    parser.add_argument("--text", required=True, type=Path, metavar="DIR", help="held-out text")
    parser.add_argument("--calibrate-on", required=True, type=Path, metavar="DIR", help="other text of the same kinds")
    parser.add_argument(
        "--formats",
        default=FORMATS,
        metavar="NAMES",
        help=f"by commas, `:calibrated` for GPTQ (default: {FORMATS})",
    )
    parser.add_argument("--max-tokens", type=int, default=12_288, metavar="N", help="held-out tokens (default 12288)")
    parser.add_argument(
        "--importance-format", default="int4_g32", metavar="NAME",
        help="format in which definitions of importance are compared (default int4_g32)",
    )  # fmt: skip
    parser.add_argument(
        "--importance-share", type=float, default=0.5, metavar="X", help="of each layer's experts, there (default 0.5)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--png", metavar="FILE", help="draw KL against bytes here")
    return parser.parse_args()


Order = npt.NDArray[np.float64]  # [L, E] the lower, the less an expert would be missed


def _orders(stats: ExpertStats, name: str) -> dict[str, list[Order]]:
    """How the experts to be stored low are chosen: as `place` does, by load, or at random."""
    shape = stats.counts.shape[1:]
    chances = [np.random.default_rng(seed).random(shape) for seed in range(NUM_RANDOM)]
    return {
        "least important": [_damage(stats, name)],
        "coldest": [stats.counts.sum(axis=0).astype(np.float64)],
        "by chance": chances,
    }


def _kinds(stats: Mapping[str, ExpertStats], name: str) -> dict[str, Order]:
    """Definition of importance -> order; `own KL` was measured in the format itself."""
    kl = stats["drop"].kl
    assert kl is not None
    by_kind = {kind: _damage(found, name) for kind, found in stats.items()}
    return by_kind | {"own KL": kl[..., stats["drop"].formats.index(_base(name))]}


def _base(name: str) -> str:
    """The format of a name such as `int4_g32:calibrated`."""
    return name.partition(":")[0]


def _damage(stats: ExpertStats, name: str) -> Order:
    assert stats.importance is not None
    assert stats.error is not None
    damage: Order = stats.importance * stats.error[..., stats.formats.index(_base(name))]
    return damage


def _row(model: RoundedModel, stats: ExpertStats, name: str, chosen: str, share: float, orders: Sequence[Order]) -> Row:
    pairs_LE = stats.counts.sum(axis=0)
    together = Quality()
    low_pairs = 0.0
    for order_LE in orders:
        ranking_LE = np.argsort(np.argsort(order_LE, axis=1, kind="stable"), axis=1)
        low_LE = ranking_LE < round(share * order_LE.shape[1])
        quality = model.low(name, low_LE)
        together.nll += quality.nll
        together.kl += quality.kl
        together.agreement += quality.agreement
        low_pairs += float(pairs_LE[low_LE].sum() / pairs_LE.sum()) / len(orders)
    low_bytes, native_bytes = stats.expert_bytes[_base(name)], stats.expert_bytes[stats.native_format]
    return Row(
        format=name,
        chosen=chosen,
        share=share,
        expert_bytes=int(np.where(low_LE, low_bytes, native_bytes).sum()),
        low_pairs=low_pairs,
        kl=Estimate.of(together.kl),
        agreement=Estimate.of(together.agreement),
        perplexity_change=float(np.exp(np.mean(together.nll) - model.dense_nll) - 1),
    )


def _summary(quality: Quality) -> dict[str, dict[str, float]]:
    return {"kl": asdict(Estimate.of(quality.kl)), "agreement": asdict(Estimate.of(quality.agreement))}


def _show(rows: Sequence[Row], kinds: Sequence[Row], mixed: Sequence[Mapping[str, object]]) -> None:
    console = Console(width=max(120, Console().width))
    for title, shown in (("Formats", rows), ("What importance is", kinds)):
        table = Table("format", "experts of each layer", "pairs", "KL / 1e-6", "next token as dense", "perplexity")
        table.title = title
        for row in shown:
            table.add_row(
                row.format,
                row.chosen if row.share == 1 else f"{row.share:.0%}, {row.chosen}",
                f"{row.low_pairs:.0%}",
                f"{row.kl.mean * 1e6:.1f} +- {row.kl.error * 1e6:.1f}",
                f"{row.agreement.mean:.2%} +- {row.agreement.error:.2%}",
                f"{row.perplexity_change:+.3%}",
            )
        console.print(table)
    table = Table("format", "half of the pairs low", "KL / 1e-6", "next token as dense", title="Mixed replicas")
    for found in mixed:
        kl, agreement = found["kl"], found["agreement"]
        assert isinstance(kl, dict)
        assert isinstance(agreement, dict)
        table.add_row(
            str(found["format"]),
            str(found["low_half"]),
            f"{kl['mean'] * 1e6:.1f} +- {kl['error'] * 1e6:.1f}",
            f"{agreement['mean']:.2%} +- {agreement['error']:.2%}",
        )
    console.print(table)


def _draw(rows: Sequence[Row], path: str) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
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


if __name__ == "__main__":
    start(main, "fidelity")
