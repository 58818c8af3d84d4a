"""Serving under every strategy: the same requests to a server of each, in turn.

    python -m bench serve --model runs/demo/model --num-ranks 4 --placement rq=runs/demo/placement.rq.json
    python -m bench serve --model DIR --num-ranks 2 --strategies standard,rq --placement rq=FILE --request-rate inf,8 \\
        --max-concurrency 16 --runs 5 --json OUT.json --png OUT.png
    python -m bench serve --model DIR --num-ranks 2 --peers transformers --dtype float32

All servers stay up, idle ones asleep; in each run the strategies take turns, A B C and then C B A. Figures bear the
names of `vllm bench serve` and are medians over runs; ratios are medians over runs of the ratio to the first strategy
in the same run. Client and servers share the machine.
"""

import argparse
import asyncio
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.options import bench_parser, check_positive
from bench.result import result_document
from bench.serving.load_generator import Job, drive, figures, random_jobs
from bench.serving.serve_figure import draw
from bench.serving.served_loads import SETTLED_S, ServedLoads
from bench.serving.server_process import NAME, pin_ranks, server
from bench.serving.transformers_serving import TransformersServing
from rq_ep.commands.console import wide_console
from rq_ep.config import CACHES
from rq_ep.core.errors import UserError, check_choice, check_number
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.strategies import strategy_class

SHOWN = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms", "median_tpot_ms")
PEERS = ("transformers",)


def parser() -> argparse.ArgumentParser:
    made = bench_parser("serve", __doc__)
    made.add_argument("--model", required=True, help="directory of the checkpoint")
    made.add_argument("--num-ranks", type=int, default=2, help="processes of each server")
    made.add_argument("--strategies", default="standard,rq", help="by commas; ratios are to the first")
    made.add_argument(
        "--placement", action="append", default=[], metavar="NAME=FILE", help="placement.json of a strategy; repeatable"
    )
    made.add_argument("--peers", default="", help=f"by commas, offline at infinite rate: {', '.join(PEERS)}")
    made.add_argument("--cache", default="", help="as of the server; by commas, a server of every strategy with each")
    made.add_argument("--dtype", default="auto", help="as of the server")
    made.add_argument("--device", default="auto", help="as of the server")
    made.add_argument("--pin", action="store_true", help="bind each rank to a core")
    made.add_argument("--text", default=None, help="text that prompts are cut from; default: this program's")
    made.add_argument("--num-prompts", type=int, default=64, help="requests of a run")
    made.add_argument("--random-input-len", type=int, default=64, help="mean tokens of a prompt, +- half")
    made.add_argument("--random-output-len", type=int, default=32, help="mean tokens of an answer, +- half")
    made.add_argument("--request-rate", default="inf", help="requests per second, by commas; inf: no waiting")
    made.add_argument("--max-concurrency", default="16", help="requests under way at once, by commas")
    made.add_argument("--max-num-seqs", type=int, default=64, help="as of the server")
    made.add_argument("--max-num-batched-tokens", type=int, default=1024, help="as of the server")
    made.add_argument("--runs", type=int, default=3, help="each after one of warm-up")
    made.add_argument("--seed", type=int, default=0, help="of requests and gaps")
    made.add_argument("--json", default=None, help="write every figure of every run there")
    made.add_argument("--png", default=None, help="draw throughput and tails there")
    return made


def main(argv: Sequence[str]) -> None:
    """Serve under all strategies; print the table.

    Raises:
        UserError: an option makes no sense, or a server does not start.
    """
    options = parser().parse_args(argv)
    result = result_document("serve", argv, options, **run(options))
    show(result)
    if options.json:
        write_json(options.json, result)
    if options.png:
        draw(result, options.png)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start the servers, drive them, and return the figures of all runs.

    Raises:
        UserError: an option does not do, or a server does not start.
    """
    strategies = options.strategies.split(",")
    for name in strategies:
        strategy_class(name)
    named = [check_choice("cache", name, CACHES) for name in filter(None, options.cache.split(","))]
    caches: list[str | None] = [*named] or [None]
    peers = [check_choice("peer", name, PEERS) for name in filter(None, options.peers.split(","))]
    placements = dict(text.partition("=")[::2] for text in options.placement)
    for name in placements:
        check_choice("strategy of --placement", name, strategies)
    check_positive(options, "num_prompts", "runs", "num_ranks", "random_input_len", "random_output_len")
    for path in filter(None, (options.json, options.png)):
        check_writable(path)
    loads = [
        (_number("--request-rate", rate), int(_number("--max-concurrency", concurrency)))
        for rate in options.request_rate.split(",")
        for concurrency in options.max_concurrency.split(",")
    ]
    jobs = jobs_of(options)
    console = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        logs = Path(mkdtemp(prefix="rq_ep-bench-serve-"))
        contestants: dict[str, Any] = {}
        for strategy, cache in product(strategies, caches):
            name = strategy if len(caches) == 1 else f"{strategy} {cache}"
            console.print(f"starting {name} (log: {logs / name}.log)")
            arguments = _arguments(options, strategy, placements.get(strategy), cache)
            url, launcher = stack.enter_context(server(options.num_ranks, arguments, logs / f"{name}.log"))
            contestants[name] = url
            if options.pin:
                pin_ranks(launcher)
        for name in peers:
            console.print(f"starting {name} (log: {logs / name}.log)")
            contestants[name] = stack.enter_context(TransformersServing(options, logs / f"{name}.log"))
        for number in range(options.runs + 1):
            order = list(contestants) if number % 2 else list(reversed(contestants))
            for rate, concurrency in loads:
                for name in order:
                    run_figures = measure(
                        contestants[name], jobs, rate, concurrency, options.seed, has_begun=number > 0
                    )
                    if run_figures is None:
                        continue
                    console.print(
                        f"run {number}: {name}, rate {rate:g}, concurrency {concurrency}: {_brief(run_figures)}"
                    )
                    if number:
                        load = {"request_rate": rate, "max_concurrency": concurrency}
                        rows.append({"contestant": name, "run": number, **load, **run_figures})
    return {"contestants": list(contestants), "rows": rows}


def measure(
    contestant: Any, jobs: Sequence[Job], rate: float, concurrency: int, seed: int, has_begun: bool
) -> dict[str, Any] | None:
    """The figures of one run, with the loads of a server that has answered requests before; None: no rates known.

    Raises:
        UserError: a request failed.
    """
    if isinstance(contestant, TransformersServing):
        return contestant.run(jobs, concurrency) if math.isinf(rate) else None
    limit = None if math.isinf(rate) else rate
    before = ServedLoads.read(contestant) if has_begun else None
    answers = asyncio.run(drive(contestant, NAME, jobs, max_concurrency=concurrency, rate=limit, seed=seed))
    if failed := [answer.error for answer in answers if answer.error]:
        raise UserError(f"{len(failed)} of {len(jobs)} requests failed: {failed[0]}")
    time.sleep(SETTLED_S)
    loads = {} if before is None else ServedLoads.read(contestant).since(before)
    return figures(answers) | loads


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """The requests: prompts cut out of a text."""
    path = Path(options.text or __file__)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    tokenizer = read_tokenizer(options.model)
    texts = [tokenizer.encode(file.read_text(errors="replace")[:200_000]) for file in files if file.is_file()]
    longest = options.random_input_len + options.random_input_len // 2
    texts = [text for text in texts if len(text) >= longest]
    if not texts:
        raise UserError(f"--text {path}: no text of {longest} tokens there: lower --random-input-len")
    return random_jobs(texts, options.num_prompts, options.random_input_len, options.random_output_len, options.seed)


def medians(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each load and contestant the medians over runs, and of the ratios to the first contestant."""
    first = result["contestants"][0]
    rows = result["rows"]
    loads = list(dict.fromkeys((row["request_rate"], row["max_concurrency"]) for row in rows))
    entries = []
    for load in loads:
        of_load = [row for row in rows if (row["request_rate"], row["max_concurrency"]) == load]
        base = {row["run"]: row for row in of_load if row["contestant"] == first}
        for name in dict.fromkeys(row["contestant"] for row in of_load):
            mine = [row for row in of_load if row["contestant"] == name]
            entry: dict[str, Any] = {"contestant": name, "request_rate": load[0], "max_concurrency": load[1]}
            for key in (key for key in SHOWN if key in mine[0]):
                entry[key] = statistics.median(row[key] for row in mine)
                entry[f"{key}_ratio"] = statistics.median(row[key] / base[row["run"]][key] for row in mine)
            entries.append(entry)
    return entries


def show(result: Mapping[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"medians of {result['options']['runs']} runs; ms, and the ratio to {result['contestants'][0]}")
    for name in (
        "rate",
        "at once",
        "strategy",
        "output tokens/s",
        "TTFT ms p50",
        "p99",
        "ITL ms p50",
        "p99",
        "TPOT p50",
    ):
        table.add_column(name, justify="left" if name == "strategy" else "right")
    for entry in medians(result):
        cells = [f"{entry[key]:.1f} ({entry[f'{key}_ratio']:.2f})" if key in entry else "" for key in SHOWN]
        load = f"{entry['request_rate']:g}", str(entry["max_concurrency"])
        table.add_row(*load, entry["contestant"], *cells)
    wide_console(140).print(table)


def _arguments(options: argparse.Namespace, strategy: str, placement: str | None, cache: str | None) -> list[str]:
    names = ("model", "dtype", "device", "max_num_seqs", "max_num_batched_tokens")
    settings = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    placed = [] if placement is None else ["--placement", placement]
    cached = [] if cache is None else ["--cache", cache]
    # All runs send the same prompts, which are to be computed each time.
    return [*settings, "--strategy", strategy, *placed, *cached, "--prefix-caching", "off", "--log-level", "warning"]


def _number(flag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{flag}: expected numbers by commas, not {text!r}") from None
    return value if math.isinf(value) else check_number(flag, value, 1e-3)


def _brief(run_figures: Mapping[str, Any]) -> str:
    tails = f", ITL p99 {run_figures['p99_itl_ms']:.1f} ms" if "p99_itl_ms" in run_figures else ""
    return f"{run_figures['output_throughput']:.0f} output tokens/s{tails}"
