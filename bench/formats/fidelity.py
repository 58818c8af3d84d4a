"""What low bits do to a model's answers: every format, on the experts chosen by importance, coldness or chance.

    python -m bench fidelity --model runs/demo/model --text runs/demo/model/text/held-out \
        --calibrate-on runs/demo/model/text/train --json OUT.json --png OUT.png

The experts' weights are replaced by what their packed form gives back: the figures are those of the formats, whatever
computes them. `rq-ep eval` runs a placement through the ranks. Standard errors are over windows of text, those of a
choice by chance over its draws.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.formats.fidelity_tables import Mixed, Ratio, Rerouted, Row, draw, show
from bench.formats.fitted_routers import fitted_anew, routers_of
from bench.formats.rounded_model import Answers, RoundedModel
from bench.options import bench_parser
from bench.result import result_document
from rq_ep.commands.common import quiet_libraries
from rq_ep.commands.progress_bar import progress_bar
from rq_ep.core.arrays import FloatArray
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.core.stats import ExpertStats
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.model.calibration.forward_stats import collect_forward_stats, find_windows
from rq_ep.model.calibration.loaded_model import LoadedModel
from rq_ep.model.calibration.quantize import MAX_ROWS
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.model.evaluation.quality import Estimate
from rq_ep.model.settings import IMPORTANCES, WindowSettings
from rq_ep.model.text.windows import WindowBatch, make_windows

SHARES = (0.25, 0.5)
NUM_RANDOM = 16  # draws of `by chance`
FORMATS = (
    "int8,fp8,fp8_g128,int4_g32,int4_g32:calibrated,int4_g64,int4_g64:calibrated,int4_g128,int4_g128:calibrated,mxfp4"
)


def main(argv: Sequence[str]) -> None:
    """Evaluate all formats; print the tables."""
    args = _arguments(argv)
    for path in filter(None, (args.json, args.png)):
        check_writable(path)
    quiet_libraries()
    names = args.formats.split(",")
    loaded = LoadedModel.open(Path(args.model), torch.float32, "cpu")
    rows: list[Row] = []
    kinds: list[Row] = []
    mixed: list[Mixed] = []
    ratios: list[Ratio] = []
    rerouted: list[Rerouted] = []
    with progress_bar() as bar:
        num_rows = len(names) * (len(SHARES) * 3 + 4) + len(IMPORTANCES) + 1
        task = bar.add_task("calibrating", total=num_rows)

        def advance(what: str) -> None:
            bar.update(task, description=what, advance=1)

        stats = {
            kind: calibrate(
                loaded.model, args.calibrate_on, formats=[*dict.fromkeys(map(_base, names))], importance=kind,
                measure_kl=kind == "drop",
            )
            for kind in IMPORTANCES
        }  # fmt: skip
        forward_stats = collect_forward_stats(loaded, find_windows(loaded.model, args.calibrate_on), max_rows=MAX_ROWS)
        windows = make_windows(args.text, read_tokenizer(args.model), WindowSettings(max_tokens=args.max_tokens))
        model = RoundedModel.of(loaded, windows.batches, [record.kept_rows() for record in forward_stats.records])
        by_output = stats["output"]
        every = np.zeros(by_output.counts.shape[1:])
        for name in names:
            for share in SHARES:
                kl_W = {}
                for chosen, orders in _orders(by_output, name).items():
                    advance(f"{name}, {chosen}")
                    row, kl_W[chosen] = _row(model, by_output, name, chosen, share, orders)
                    rows.append(row)
                of_important_W = kl_W.pop("least important")
                ratios += [Ratio(name, share, f"{chosen} / least important", _ratio(other_W, of_important_W))
                           for chosen, other_W in kl_W.items()]  # fmt: skip
            advance(f"{name}, all")
            rows.append(_row(model, by_output, name, "all", 1.0, [every])[0])
            kl_W = {}
            for low_half, by_gate in (("lowest gates", True), ("by chance", False)):
                advance(f"{name}, mixed replicas")
                answers = model.half_low(name, by_gate)
                kl_W[low_half] = np.array(answers.kl)
                mixed.append(Mixed(name, low_half, Estimate.of(answers.kl), Estimate.of(answers.agreement)))
            ratios.append(Ratio(name, 0.5, "lowest gates / by chance, mixed replicas", _ratio(*kl_W.values())))
            advance(f"{name}, routers")
            rerouted += _rerouted(model, name, forward_stats.windows.batches)
        for kind, order_LE in _kinds(stats, args.importance_format).items():
            advance(f"importance by {kind}")
            row, _ = _row(model, by_output, args.importance_format, kind, args.importance_share, [order_LE])
            kinds.append(row)
    show(rows, kinds, mixed, ratios, rerouted)
    if args.json:
        tables: dict[str, Sequence[Any]] = {
            "rows": rows, "importances": kinds, "mixed_replicas": mixed, "ratios": ratios, "routers": rerouted,
        }  # fmt: skip
        figures: dict[str, Any] = {title: [asdict(row) for row in table] for title, table in tables.items()}
        figures |= {"num_tokens": windows.num_tokens, "num_draws": NUM_RANDOM, "output_error": _errors(by_output)}
        write_json(args.json, result_document("fidelity", argv, args, **figures))
    if args.png:
        draw(rows, args.png)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = bench_parser("fidelity", __doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face checkpoint, a small one")
    parser.add_argument("--text", required=True, type=Path, metavar="DIR", help="held-out text")
    parser.add_argument("--calibrate-on", required=True, type=Path, metavar="DIR", help="other text of the same kinds")
    parser.add_argument(
        "--formats",
        default=FORMATS,
        metavar="NAMES",
        help="by commas, `:calibrated` for GPTQ",
    )
    parser.add_argument("--max-tokens", type=int, default=12_288, metavar="N", help="held-out tokens")
    parser.add_argument(
        "--importance-format", default="int4_g32", metavar="NAME",
        help="format in which definitions of importance are compared",
    )  # fmt: skip
    parser.add_argument(
        "--importance-share", type=float, default=0.5, metavar="X", help="of each layer's experts, there"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--png", metavar="FILE", help="draw KL against bytes here")
    return parser.parse_args(argv)


Order = FloatArray  # [L, E] the lower, the less an expert would be missed


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
    by_kind = {kind: _damage(kind_stats, name) for kind, kind_stats in stats.items()}
    return by_kind | {"own KL": kl[..., stats["drop"].formats.index(_base(name))]}


def _errors(stats: ExpertStats) -> dict[str, float]:
    """Format -> output error of an expert, rounded to the nearest, on average: what `rq-ep calibrate` prints."""
    assert stats.error is not None
    errors: list[float] = stats.error.mean(axis=(0, 1)).tolist()
    return dict(zip(stats.formats, errors, strict=True))


def _base(name: str) -> str:
    """The format of a name such as `int4_g32:calibrated`."""
    return name.partition(":")[0]


def _damage(stats: ExpertStats, name: str) -> Order:
    assert stats.importance is not None
    assert stats.error is not None
    damage: Order = stats.importance * stats.error[..., stats.formats.index(_base(name))]
    return damage


def _row(
    model: RoundedModel, stats: ExpertStats, name: str, chosen: str, share: float, orders: Sequence[Order]
) -> tuple[Row, FloatArray]:
    """What a choice of experts costs, or several on average, and its KL window by window."""
    pairs_LE = stats.counts.sum(axis=0)
    draws: list[Answers] = []
    low_pairs = 0.0
    for order_LE in orders:
        ranking_LE = np.argsort(np.argsort(order_LE, axis=1, kind="stable"), axis=1)
        low_LE = ranking_LE < round(share * order_LE.shape[1])
        draws.append(model.low(name, low_LE))
        low_pairs += float(pairs_LE[low_LE].sum() / pairs_LE.sum()) / len(orders)
    low_bytes, native_bytes = stats.expert_bytes[_base(name)], stats.expert_bytes[stats.native_format]
    row = Row(
        format=name,
        chosen=chosen,
        share=share,
        expert_bytes=int(np.where(low_LE, low_bytes, native_bytes).sum()),
        low_pairs=low_pairs,
        kl=_estimate([answers.kl for answers in draws]),
        agreement=_estimate([answers.agreement for answers in draws]),
        routing_shift=_estimate([answers.shift for answers in draws]),
        perplexity_change=float(np.exp(np.mean([answers.nll for answers in draws]) - model.dense_nll) - 1),
    )
    return row, np.mean([answers.kl for answers in draws], axis=0)


def _estimate(by_draw: Sequence[Sequence[float]]) -> Estimate:
    """The mean, with its error over windows where there is one draw, and else over draws."""
    return Estimate.of(by_draw[0]) if len(by_draw) == 1 else Estimate.of([float(np.mean(draw)) for draw in by_draw])


def _ratio(above_W: FloatArray, below_W: FloatArray) -> Estimate:
    """Ratio of two means over the same windows, and its error by the delta method."""
    ratio = above_W.mean() / below_W.mean()
    return Estimate(float(ratio), Estimate.of((above_W - ratio * below_W) / below_W.mean()).error)


def _rerouted(model: RoundedModel, name: str, batches: Sequence[WindowBatch]) -> list[Rerouted]:
    """All experts in a format: with the routers as they are, fitted anew, and with the dense model's choices."""
    every = np.ones((len(model.experts), model.experts[0].num_experts), bool)
    by_routers = {"as they are": model.low(name, every)}
    routers = routers_of(model.network, model.experts)
    with fitted_anew(model.network, routers, partial(model.while_low, name, every), batches):
        by_routers["fitted anew"] = model.low(name, every)
    by_routers["dense model's choices"] = model.all_low_on_dense_routes(name)
    before_W = np.array(by_routers["as they are"].kl)
    return [
        Rerouted(
            name, routers, Estimate.of(answers.kl), Estimate.of(answers.agreement), Estimate.of(answers.shift),
            _ratio(np.array(answers.kl), before_W),
        )
        for routers, answers in by_routers.items()
    ]  # fmt: skip
