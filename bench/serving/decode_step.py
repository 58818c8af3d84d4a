"""Where the time of a decode step goes, and what sending rows with their routing saves over gathering counts first.

    torchrun --nproc-per-node 2 -m bench step --model runs/demo/model --pin
    python -m bench step --model runs/demo/model --at-once 1 8 --steps 400 --json OUT.json

The engine runs without HTTP. Its small steps go both ways in turn, one each: `rows to all`, as it does by itself
(`GatheredRows`), and `counts first`, as in larger steps. Both plan exactly and give the same answers. Figures are
medians over steps of rank 0 in milliseconds, the ratio that of neighbouring steps. `CPU` is the time of the engine's
thread. `attention, router, ...` is what the model's forward pass takes besides its MoE layers; `rest` is
transformers' scheduling, sampling and output.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.table import Table

from bench.options import bench_parser, check_positive
from bench.result import result_document
from rq_ep.commands.console import wide_console
from rq_ep.core.cost import LAYER_PHASES
from rq_ep.core.errors import check_integer
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.engine.engine import Engine, EngineConfig
from rq_ep.engine.requests import Output, Request
from rq_ep.engine.servable import choose_cache, set_attention
from rq_ep.engine.step_agreement import Action
from rq_ep.model.load.load_model import load
from rq_ep.model.load.load_report import report_of
from rq_ep.moe import EPExperts, Telemetry
from rq_ep.parallel import TorchGroup
from rq_ep.parallel.host import keep_freed_memory, short_collections
from rq_ep.strategies import make_strategy

WAYS = ("counts first", "rows to all")
PROMPT_TOKENS = 32
WARM_UP_STEPS = 20
TIMEOUT_S = 600


class StepTimes:
    """Times the steps of an engine, which go both ways in turn on all ranks."""

    def __init__(self, engine: Engine, layers: Sequence[EPExperts], telemetry: Telemetry) -> None:
        self._layers = layers
        self._telemetry = telemetry
        self._parts: dict[str, float] = {}
        self._way = ""
        self._num_runs = 0
        self.steps: list[dict[str, Any]] = []
        settings = layers[0].exchange.settings
        self._settings = {WAYS[0]: replace(settings, max_gathered_bytes=-1), WAYS[1]: settings}
        loop: Any = engine._step_loop
        self._act = loop._act
        loop._act = self._act_in_turn
        loop._gather_flags = self._timed("agreement", loop._gather_flags)
        model: Any = engine._manager.model  # type: ignore[union-attr]
        model.forward = self._timed("forward", model.forward)
        self._step = loop._step
        loop._step = self._timed_step

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            result = function(*args, **kwargs)
            self._parts[part] = time.perf_counter() - start_s
            return result

        return call

    def _act_in_turn(self, action: Action, batches: Any) -> bool:
        if action in (Action.RUN, Action.RUN_EMPTY):
            self._num_runs += 1
            self._way = WAYS[self._num_runs % 2]
            for layer in self._layers:
                layer.exchange.settings = self._settings[self._way]
        goes_on: bool = self._act(action, batches)
        return goes_on

    def _timed_step(self, batches: Any) -> bool:
        self._parts, self._way = {}, ""
        self._telemetry.clear()
        start_s, start_cpu_s = time.perf_counter(), time.thread_time()
        goes_on: bool = self._step(batches)
        step = {"step": time.perf_counter() - start_s, "cpu": time.thread_time() - start_cpu_s}
        if self._way and "forward" in self._parts:
            phases = {phase: float(np.nansum(self._telemetry.seconds(phase))) for phase in LAYER_PHASES}
            step |= {"agreement": self._parts["agreement"], **phases}
            step["attention, router, ..."] = self._parts["forward"] - sum(phases.values())
            step["rest"] = step["step"] - self._parts["forward"] - self._parts["agreement"]
            self.steps.append({"way": self._way, **step})
        return goes_on


def rows_of(steps: Sequence[dict[str, Any]], at_once: int) -> list[dict[str, Any]]:
    """The figures of both ways, in milliseconds; ratios are of neighbouring steps."""
    of_way = {way: [step for step in steps if step["way"] == way] for way in WAYS}
    rows = []
    for way, mine in of_way.items():
        row: dict[str, Any] = {"at_once": at_once, "way": way, "num_steps": len(mine)}
        row |= {f"{key}_ms": 1e3 * median(step[key] for step in mine) for key in mine[0] if key != "way"}
        row["p99_ms"] = 1e3 * float(np.percentile([step["step"] for step in mine], 99))
        for key in ("step", "cpu"):
            pairs = zip(mine, of_way[WAYS[0]], strict=False)
            row[f"{key}_ratio"] = median(one[key] / other[key] for one, other in pairs)
        rows.append(row)
    return rows


def run(engine: Engine, at_once: int, num_steps: int, group: TorchGroup, ended: "Ended") -> None:
    """Answer so many requests at once, this rank's share of them, in so many steps."""
    mine = range(group.rank, at_once, group.size)
    ended.begin(len(mine))
    for number in mine:
        prompt_ids = [1 + number % 100] * PROMPT_TOKENS
        engine.submit(Request(f"{at_once} {num_steps} {number}", prompt_ids, num_steps, ignore_eos=True))
    ended.wait()


class Ended:
    """Waits for the end of requests, or of the engine."""

    def __init__(self) -> None:
        self._num_left = 0
        self._all = threading.Event()
        self._errors: list[BaseException] = []

    def begin(self, num_requests: int) -> None:
        self._num_left = num_requests
        self._all.clear()
        if not num_requests:
            self._all.set()

    def take(self, outputs: list[Output]) -> None:
        self._num_left -= sum(output.finish_reason is not None for output in outputs)
        if not self._num_left:
            self._all.set()

    def fail(self, error: BaseException) -> None:
        self._errors.append(error)
        self._all.set()

    def wait(self) -> None:
        if not self._all.wait(TIMEOUT_S):
            raise TimeoutError(f"{self._num_left} requests are unanswered")
        if self._errors:
            raise self._errors[0]


def main(argv: Sequence[str]) -> None:
    """Run on this rank of a launcher's group; rank 0 prints the table.

    Raises:
        UserError: an option makes no sense.
    """
    made = bench_parser("step", __doc__)
    made.add_argument("--model", required=True, metavar="DIR", help="checkpoint")
    made.add_argument("--placement", metavar="FILE", help="placement.json (default: the strategy's own)")
    made.add_argument("--strategy", metavar="NAME", help="which serves (default: that of the placement, or standard)")
    made.add_argument("--at-once", nargs="+", type=int, default=[1, 8], metavar="N", help="requests")
    made.add_argument("--steps", type=int, default=300, metavar="N", help="both ways together")
    made.add_argument("--pin", action="store_true", help="bind each rank to a core")
    made.add_argument("--json", metavar="FILE", help="write the figures there, from rank 0")
    options = made.parse_args(argv)
    check_positive(options, "at_once")
    check_integer("--steps", options.steps, 2)
    if options.json:
        check_writable(options.json)
    torch.set_num_threads(1)
    keep_freed_memory()
    group = TorchGroup.from_environment("cpu", timeout_s=TIMEOUT_S)
    if options.pin:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[group.rank % len(os.sched_getaffinity(0))]})
    telemetry = Telemetry()
    strategy = None if options.strategy is None else make_strategy(options.strategy)
    model = load(options.model, options.placement, strategy, group=group, telemetry=telemetry)
    set_attention(model, None)
    layers = [layer for layer in report_of(model).layers if isinstance(layer, EPExperts)]
    ended = Ended()
    config = EngineConfig(cache=choose_cache(model.config))
    engine = Engine(model, layers, group, config, on_outputs=ended.take, on_failure=ended.fail, heartbeat_s=0.02)
    times = StepTimes(engine, layers, telemetry)
    engine.start()
    rows: list[dict[str, Any]] = []
    with short_collections():
        for at_once in options.at_once:
            run(engine, at_once, WARM_UP_STEPS, group, ended)
            times.steps.clear()
            run(engine, at_once, options.steps, group, ended)
            if group.rank == 0:
                rows += rows_of(times.steps, at_once)
    engine.stop()
    num_ranks, strategy_name = group.size, report_of(model).strategy.name
    group.close()
    if group.rank == 0:
        document = result_document("step", argv, options, num_ranks=num_ranks, strategy=strategy_name, rows=rows)
        show(document)
        if options.json:
            write_json(options.json, document)


def show(document: dict[str, Any]) -> None:
    """Print where the time of both ways goes."""
    title = f"a step of {document['num_ranks']} ranks, {document['strategy']}: ms (x counts first)"
    parts = ("agreement", *LAYER_PHASES, "attention, router, ...", "rest")
    table = Table("at once", "way", "step p50", "p99", "CPU", *parts, title=title, box=None)
    for row in document["rows"]:
        totals = [f"{row[f'{key}_ms']:.2f} ({row[f'{key}_ratio']:.2f})" for key in ("step", "cpu")]
        figures = [totals[0], f"{row['p99_ms']:.2f}", totals[1], *(f"{row[f'{part}_ms']:.2f}" for part in parts)]
        table.add_row(str(row["at_once"]), row["way"], *figures)
    wide_console(180).print(table)
