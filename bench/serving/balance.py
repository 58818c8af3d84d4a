"""What balance is worth end to end: prompts through HTTP, under every strategy, on experts that dominate a step.

    python -m bench balance --work-dir runs/balance --json bench/results/balance_cpu2.json
    python -m bench balance --work-dir runs/balance-quick --quick

The model is made on the spot: random weights in fp32, with the skew that random routers have by themselves. It is
calibrated, placed in the bytes of standard EP, and served by `python -m bench serve` with every rank on a core of its
own. A request asks for one token, so that prompts are all there is to compute.

`allowed` is the speed-up of perfect balance: the run of `standard` without the time that its slowest ranks take longer
in their experts than a mean one, by the max/mean of each layer and step and rank 0's own time in its experts.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PretrainedConfig

from bench.options import bench_parser, check_positive
from bench.result import result_document
from bench.serving import serve
from bench.serving.random_checkpoint import random_checkpoint
from rq_ep.commands.console import wide_console
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.model.text.corpus import write_corpus
from rq_ep.placing.place import place

SHAPE: dict[str, Any] = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 16, "num_hidden_layers": 4}
QUICK: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 8, "num_hidden_layers": 2}
HEAD_SIZE = 64
FORMATS = ("fp32", "int8")
PLACED = ("eplb", "rq")
STRATEGIES = ("standard", "eplb", "llep", "rq")
PEERS = ("transformers",)


def parser() -> argparse.ArgumentParser:
    made = bench_parser("balance", __doc__)
    made.add_argument("--work-dir", required=True, metavar="DIR", help="for checkpoint and placements")
    made.add_argument("--num-ranks", type=int, default=2, metavar="N", help="processes of each server")
    made.add_argument("--strategies", default=",".join(STRATEGIES), help="by commas")
    made.add_argument("--peers", default=",".join(PEERS), help="as of `serve`; '' for none")
    made.add_argument("--top-k", type=int, default=2, metavar="K", help="experts of a token")
    made.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="mean of a prompt, +- half")
    made.add_argument("--num-prompts", type=int, default=32, metavar="N", help="of a run")
    made.add_argument("--at-once", type=int, default=8, metavar="N", help="requests under way")
    made.add_argument("--runs", type=int, default=4, metavar="N", help="after one of warm-up")
    made.add_argument("--quick", action="store_true", help="a tiny model")
    made.add_argument("--json", default=None, metavar="FILE", help="write every figure of every run there")
    return made


def main(argv: Sequence[str]) -> None:
    """Make the model, place it, and serve it; print the table.

    Raises:
        UserError: an option makes no sense, or a server does not start.
    """
    options = parser().parse_args(argv)
    check_positive(options, "num_ranks", "top_k", "prompt_tokens", "num_prompts", "at_once", "runs")
    if options.json:
        check_writable(options.json)
    folder = Path(options.work_dir)
    placements = prepare(options, folder)
    served = serve.parser().parse_args(
        [
            "--model", str(folder / "model"), "--text", str(folder / "text" / "held-out"), "--dtype", "float32",
            "--num-ranks", str(options.num_ranks), "--strategies", options.strategies, "--peers", options.peers,
            *(text for name, path in placements.items() for text in ("--placement", f"{name}={path}")),
            "--num-prompts", str(options.num_prompts), "--random-input-len", str(options.prompt_tokens),
            "--random-output-len", "1", "--max-concurrency", str(options.at_once), "--runs", str(options.runs),
            "--device", "cpu", "--pin",
        ]
    )  # fmt: skip
    result = result_document("balance", argv, options, **serve.run(served))
    if options.json:
        write_json(options.json, result)
    show(result)


def model_config(shape: Mapping[str, Any], top_k: int, max_positions: int) -> PretrainedConfig:
    """The model of a shape; its tokens are bytes."""
    heads = shape["hidden_size"] // HEAD_SIZE
    return AutoConfig.for_model(
        "qwen3_moe", vocab_size=260, **shape, num_experts_per_tok=top_k, head_dim=HEAD_SIZE, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=max_positions, eos_token_id=None,
    )  # fmt: skip


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Make the model and its text, calibrate and place. Returns strategy -> its placement."""
    config = model_config(QUICK if options.quick else SHAPE, options.top_k, 4 * options.prompt_tokens)
    Console(stderr=True).print(f"making and placing {folder / 'model'}")
    random_checkpoint(folder / "model", config, torch.float32)
    write_corpus(folder / "text")
    stats = calibrate(folder / "model", folder / "text" / "train", formats=FORMATS[1:], max_tokens=16_384)
    paths = {name: folder / f"placement.{name}.json" for name in PLACED if name in options.strategies.split(",")}
    for name, path in paths.items():
        formats = FORMATS if name == "rq" else FORMATS[:1]
        place(stats, options.num_ranks, "ep", strategy=name, formats=formats).save(path)
    return paths


def summary(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each contestant: medians over runs, and ratios to the first one in the same run."""
    first = {row["run"]: row for row in result["rows"] if row["contestant"] == result["contestants"][0]}
    rows = []
    for name in result["contestants"]:
        mine = [row for row in result["rows"] if row["contestant"] == name]
        speed_ups = [first[row["run"]]["duration"] / row["duration"] for row in mine]
        shown: dict[str, Any] = {
            "contestant": name,
            "prompt_tokens_per_s": median(row["total_input"] / row["duration"] for row in mine),
            "speed_up": median(speed_ups),
        }
        for figure in ("median_ttft_ms", "p99_ttft_ms"):
            shown[figure] = median(row[figure] for row in mine)
            shown[f"{figure}_ratio"] = median(row[figure] / first[row["run"]][figure] for row in mine)
        if "imbalance" in mine[0]:
            shown["imbalance"] = median(row["imbalance"] for row in mine)
        rows.append(shown)
    allowed = {run: allowed_speed_up(row) for run, row in first.items()}
    for shown in rows:
        mine = [row for row in result["rows"] if row["contestant"] == shown["contestant"]]
        shown["of_allowed"] = median(
            first[row["run"]]["duration"] / row["duration"] / allowed[row["run"]] for row in mine
        )
    rows.append({"contestant": "perfect balance", "speed_up": median(allowed.values()), "imbalance": 1.0})
    return rows


def allowed_speed_up(row: Mapping[str, Any]) -> float:
    """Of a run, by perfect balance of its experts: all else takes as long as before."""
    speed_up: float = row["duration"] / (row["duration"] - (row["slowest_compute_s"] - row["mean_compute_s"]))
    return speed_up


def cells(shown: Mapping[str, Any]) -> list[str]:
    """A row of the table."""

    def cell(name: str, digits: int, *, ratio: str | None = None) -> str:
        if name not in shown:
            return ""
        return f"{shown[name]:,.{digits}f}" + (f" ({shown[ratio]:.2f})" if ratio else "")

    return [
        shown["contestant"],
        cell("imbalance", 2),
        cell("prompt_tokens_per_s", 0),
        cell("speed_up", 2),
        cell("of_allowed", 2),
        cell("median_ttft_ms", 0, ratio="median_ttft_ms_ratio"),
        cell("p99_ttft_ms", 0, ratio="p99_ttft_ms_ratio"),
    ]


HEADER = ("contestant", "max/mean", "prompt tokens/s", "speed-up", "of what balance allows", "TTFT p50, ms", "p99, ms")


def show(result: Mapping[str, Any]) -> None:
    """Print the table."""
    table = Table(*HEADER, title=f"medians of {result['options']['runs']} runs; in brackets the ratio to the first")
    for shown in summary(result):
        table.add_row(*cells(shown))
    wide_console(140).print(table)
