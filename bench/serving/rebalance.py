"""A placement that follows the load, on a real server: what it gains, what it costs, and whether anything is lost.

    python -m bench rebalance --model runs/demo/model --json OUT.json --png OUT.png
    python -m bench rebalance --model runs/demo/model --num-ranks 2 --parts cost --json OUT.json
    python -m bench rebalance --model runs/demo/model --quick

Four parts; `--parts` runs some of them, and keeps the others of an earlier `--json FILE`:

domains  Traffic whose text changes its domain, the same requests to one server after another: `standard`; `rq`
         calibrated on the first domain; the same, and `eplb`, with `--rebalance auto`; `rq` that begins with no
         statistics at all.
armed    A server that plans by the default rule and never moves, in short turns with two that are off: what they
         differ by among themselves is the noise.
cost     Traffic that changes so often that the placement is replaced again and again, on a model of large experts
         (`bench.serving.large_experts`): planning as often and never moving, moving, and the moves made while the
         whole group waits (`bench.serving.stop_the_world`); each in turns with a server that is off.
answers  Greedy answers in fp32 across re-placements, each compared with the dense model's as `soak` does.

The last two let `rq` move every 16 steps to whatever it has planned (`bench.serving.restless`), without its gate.
A server decides on fewer steps here than it would by default (`--window`, `--interval`, and EPLB's in the same
proportion), because a phase has some hundred steps. Of large experts, at most two servers are up at a time.
"""

import argparse
import asyncio
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import mkdtemp
from typing import Any

import httpx
import psutil
import torch
from rich.console import Console
from rich.table import Table

from bench.options import bench_parser
from bench.serving.large_experts import large_experts
from bench.serving.load_generator import Answer, Job, drive, random_jobs
from bench.serving.local_client import local_client
from bench.serving.parts import read_options, run_parts
from bench.serving.rebalance_figure import draw
from bench.serving.rebalance_figures import (
    STEP_TOKENS,
    LoadSample,
    first_within,
    goals,
    imbalance_between,
    latency,
    pairs_at,
    ratio_by_round,
    series,
    share_of_gain,
    spread,
)
from bench.serving.server_process import NAME, own_bytes, rank_processes, server
from bench.serving.soak import dense_answer, is_right
from rq_ep.commands.console import wide_console
from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem, standard_ep_bytes
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.model.load.whole_model import load_whole_model
from rq_ep.placing.place import place
from rq_ep.rebalancing.replan import moved_bytes
from rq_ep.sim.simulator import simulate
from rq_ep.strategies import make_strategy

AUTO = ("--rebalance", "auto")
NEVER = ("--rebalance-min-gain", "1000")
PARTS = ("domains", "armed", "cost", "answers")
STOP_THE_WORLD = "bench.serving.stop_the_world"
RESTLESS = "bench.serving.restless:Restless"
LARGE_TOKENS = 2048  # of the calibration of large experts
LARGE_WINDOW = 64  # steps that their placements are planned for: in fewer, few of many experts have tokens
NUM_MIGRATIONS = 20  # that are to happen beside the requests
MORE_ROUNDS = 8  # times as many rounds as asked for, at most, until they have
STRETCHES = 8  # of the part on cost: how often the domain changes in a run
SAMPLE_S = 0.25  # between two looks at a server under load; its ranks report once a second
SETTLE_S = 1.3  # until the last steps are reported
PLANNER_TIMEOUT_S = 120.0  # for a planner process that compiles, once for an installation
IDLE_TIMEOUT_S = 10.0  # for a decision or a migration that is under way when the requests have ended
NUM_TEXTS = 40  # of a domain that prompts are cut out of
SLACK = 0.02  # within which a placement counts as good as the calibrated one
QUICK = {
    "num_ranks": 2, "domains": "code,table", "num_prompts": 48, "turns": 2, "rounds": 1, "num_requests": 200,
    "calibration_tokens": 8192, "num_experts": 8, "intermediate_size": 512,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = bench_parser("rebalance", __doc__)
    made.add_argument("--model", required=True, help="directory of the checkpoint")
    made.add_argument("--text", default=None, help="with a folder for each domain (default: MODEL/text/train)")
    made.add_argument("--domains", default="code,prose,c,table", help="by commas; the first is calibrated on")
    made.add_argument("--parts", default=",".join(PARTS), help="by commas")
    made.add_argument("--num-ranks", type=int, default=4, help="processes of each server")
    made.add_argument("--formats", default="bf16,int8", help="of rq, the native one first")
    made.add_argument("--window", type=int, default=32, help="steps that rq decides on")
    made.add_argument("--interval", type=int, default=16, help="steps between its decisions")
    made.add_argument("--eplb-window", type=int, default=63, help="steps that eplb decides on: 1000 / 16")
    made.add_argument("--eplb-interval", type=int, default=188, help="steps between its decisions: 3000 / 16")
    made.add_argument("--num-prompts", type=int, default=320, help="requests of a domain")
    made.add_argument("--turns", type=int, default=40, help="of each server in the part on a server that is armed")
    made.add_argument(
        "--rounds",
        type=int,
        default=3,
        help=f"of the part on cost; where experts move, until they have {NUM_MIGRATIONS} times",
    )
    made.add_argument("--num-requests", type=int, default=2000, help="of the part on answers")
    made.add_argument("--calibration-tokens", type=int, default=32_768, help="of each domain")
    made.add_argument("--num-experts", type=int, default=256, help="of a layer, in the part on cost")
    made.add_argument("--intermediate-size", type=int, default=4096, help="of experts in the part on cost")
    made.add_argument("--seed", type=int, default=0, help="of the requests")
    made.add_argument("--quick", action="store_true", help=f"does it run? {QUICK}")
    made.add_argument("--json", default=None, help="write every figure there")
    made.add_argument("--png", default=None, help="draw imbalance over what was served there")
    return made


def main(argv: Sequence[str]) -> None:
    """Run the parts; print the table.

    Raises:
        UserError: an option makes no sense, or a server does not start.
    """
    positive = ("num_ranks", "num_prompts", "turns", "rounds", "num_requests")
    options, asked = read_options(parser(), argv, PARTS, positive, QUICK)
    bench = Workload(options)
    parts = {"domains": domains, "armed": armed, "cost": cost, "answers": answers}
    result = run_parts("rebalance", argv, options, asked, {name: partial(parts[name], bench) for name in PARTS})
    show(result)
    if options.png and "domains" in result["parts"]:
        draw(result, options.png)


class Workload:
    """What all parts share: the texts, the statistics, the placements, and a folder for them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.console = Console(stderr=True)
        self.folder = Path(mkdtemp(prefix="rq_ep-bench-rebalance-"))
        self.domains = options.domains.split(",")
        if len(self.domains) < 2:
            raise UserError(f"--domains {options.domains}: name two or more, so that the load changes")
        self.formats = tuple(options.formats.split(","))
        self.native = self.formats[0]
        self.tokenizer = read_tokenizer(options.model)
        root = Path(options.text or Path(options.model) / "text/train")
        self._paths = {name: root / name for name in self.domains}
        for name, path in self._paths.items():
            if not path.is_dir():
                raise UserError(f"--domains {name}: there is no folder {path}; --text names the folder of all domains")
        self._stats: dict[str, ExpertStats] = {}

    def stats(self, domain: str) -> ExpertStats:
        """Of a domain's text."""
        if domain not in self._stats:
            self._stats[domain] = self.calibrate(
                self.options.model, domain, self.formats, self.options.calibration_tokens
            )
        return self._stats[domain]

    def calibrate(self, model: str | Path, domain: str, formats: Sequence[str], max_tokens: int) -> ExpertStats:
        """Statistics of a model on so much of a domain's text."""
        self.console.print(f"calibrating {model} on {domain}")
        return calibrate(
            model, [self._paths[domain]], max_tokens=max_tokens, sequence_length=256, formats=tuple(formats)
        )

    def halves(self, domain: str) -> tuple[ExpertStats, list[Any]]:
        """The domain's prefill steps: statistics of every other one, and the counts of the rest."""
        stats = self.stats(domain)
        assert stats.phase is not None
        steps = [at for at, phase in enumerate(stats.phase) if phase == 0]
        planned = replace(stats, counts=stats.counts[steps[::2]], phase=None, tokens=None, domain=None, domains=())
        return planned, list(stats.counts[steps[1::2]])

    def jobs(self, domain: str, number: int, input_len: int, output_len: int, seed: int = 0) -> list[Job]:
        """Requests with prompts of the domain."""
        texts = self._texts(domain, input_len + input_len // 2)
        return random_jobs(texts, number, input_len, output_len, self.options.seed + seed)

    def _texts(self, domain: str, longest: int) -> list[list[int]]:
        files = sorted(file for file in self._paths[domain].rglob("*") if file.is_file())
        some = files[:: max(len(files) // NUM_TEXTS, 1)]  # all kinds, as in calibration
        texts = [self.tokenizer.encode(file.read_text(errors="replace")[:20_000]) for file in some]
        texts = [text for text in texts if len(text) >= longest]
        if not texts:
            raise UserError(f"--text {self._paths[domain]}: no text of {longest} tokens there")
        return texts

    def place(self, strategy: str, stats: ExpertStats, formats: Sequence[str] | None = None) -> Placement:
        formats = formats or (self.formats if strategy == "rq" else self.formats[:1])
        return place(stats, self.options.num_ranks, strategy=strategy, formats=tuple(formats))

    def calibrated(self, strategy: str, formats: Sequence[str] | None = None) -> str:
        """The file of a placement for the first domain."""
        path = self.folder / f"{strategy}.{'-'.join(formats or ())}.json"
        if not path.exists():
            self.place(strategy, self.stats(self.domains[0]), formats).save(path)
        return str(path)

    def imbalance(self, strategy: str, placement: Placement, counts: Sequence[Any]) -> float:
        """max/mean of these steps as the strategy would split them, mean over steps and layers."""
        return float(simulate(make_strategy(strategy), placement, counts, self.native).imbalances.mean())

    @contextmanager
    def start(self, name: str, model: str, *arguments: str, module: str = "rq_ep.serve") -> Iterator["Served"]:
        """Start a server of a checkpoint."""
        log = self.folder / f"{name.replace(' ', '-')}.log"
        self.console.print(f"starting {name} (log: {log})")
        settings = ["--model", model, "--device", "cpu", *arguments]
        with server(self.options.num_ranks, settings, log, module) as (url, process), local_client(url, 30) as client:
            yield Served(name, url, process, tuple(rank_processes(process).values()), client)


@dataclass
class Served:
    """A server, and what was recorded of it."""

    name: str
    url: str
    process: psutil.Process
    ranks: tuple[psutil.Process, ...]
    client: httpx.Client
    samples: list[LoadSample] = field(default_factory=list)
    placements: list[tuple[float, Placement]] = field(default_factory=list)  # seconds since the epoch; the first serves
    answers: list[Answer] = field(default_factory=list)
    planner_s: float = 0.0  # CPU time of its planner process while requests were under way
    busy_s: float = 0.0  # in which requests were under way
    peak_bytes: int = 0  # of its own that any of its ranks had while requests were under way

    def ask(self, jobs: Sequence[Job], max_concurrency: int) -> list[Answer]:
        """Send the requests, and record the server meanwhile."""
        self._look()
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,))
        cpu_s, started_s = self._planner_cpu_s(), time.monotonic()
        watch.start()
        try:
            answers = asyncio.run(drive(self.url, NAME, jobs, max_concurrency=max_concurrency))
        finally:
            over.set()
            watch.join()
        self.busy_s += time.monotonic() - started_s
        time.sleep(SETTLE_S)
        end_s = time.monotonic() + IDLE_TIMEOUT_S
        while self.state().get("state", "off") not in ("off", "idle", "loading") and time.monotonic() < end_s:
            time.sleep(SAMPLE_S)
        self.planner_s += self._planner_cpu_s() - cpu_s
        self._look()
        self.answers += answers
        return answers

    def wait_for_planner(self) -> None:
        """Wait until its planner process, if it has one, rests: at first it imports and compiles what it needs."""
        before_s, end_s = -1.0, time.monotonic() + PLANNER_TIMEOUT_S
        while (cpu_s := self._planner_cpu_s()) > before_s and time.monotonic() < end_s:
            before_s = cpu_s
            time.sleep(SETTLE_S)

    def state(self) -> dict[str, Any]:
        """What `/v1/ep/rebalance` says."""
        state: dict[str, Any] = self._get("/v1/ep/rebalance")
        return state

    @property
    def commits(self) -> list[dict[str, Any]]:
        """The placements that have replaced another."""
        commits: list[dict[str, Any]] = self.state().get("commits", [])
        return commits

    @property
    def num_committed(self) -> int:
        return int(self.state().get("results", {}).get("committed", 0))

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(SAMPLE_S):
            self._look()

    def _look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, *map(own_bytes, self.ranks))
        total = self._get("/v1/ep/load")["total"]
        if total is not None:
            sample = LoadSample.of(time.time(), total)
            if not self.samples or sample.num_pairs > self.samples[-1].num_pairs:
                self.samples.append(sample)
        commits = self.commits
        if not self.placements or (commits and commits[-1]["time"] > self.placements[-1][0]):
            at_s = commits[-1]["time"] if commits else time.time()
            self.placements.append((at_s, Placement.from_dict(self._get("/v1/ep/placement"))))

    def _get(self, path: str) -> Any:
        return self.client.get(path).json()

    def _planner_cpu_s(self) -> float:
        for child in self.process.children(recursive=True):
            if any("planner_process" in word for word in child.cmdline()):
                times = child.cpu_times()
                return float(times.user + times.system)
        return 0.0


def domains(bench: Workload) -> dict[str, Any]:
    """Traffic that changes its domain, to one server after another."""
    options, first = bench.options, bench.domains[0]
    stats_file = bench.folder / "first.safetensors"
    bench.stats(first).save(stats_file)
    rq = ["--strategy", "rq", "--placement", bench.calibrated("rq")]
    eplb = ["--strategy", "eplb", "--placement", bench.calibrated("eplb")]

    def live(window: int, interval: int) -> list[str]:
        return [*AUTO, "--rebalance-window", str(window), "--rebalance-interval", str(interval)]

    follows = live(options.window, options.interval)
    jobs = {
        domain: bench.jobs(domain, options.num_prompts, 160, 16, seed=number)
        for number, domain in enumerate(bench.domains)
    }
    rows: list[dict[str, Any]] = []
    ends: dict[str, list[int]] = {}
    states: dict[str, dict[str, Any]] = {}
    servers: dict[str, Served] = {}
    for name, arguments in {
        "standard": ["--strategy", "standard"],
        "rq": rq,
        "eplb live": [*eplb, *live(options.eplb_window, options.eplb_interval)],
        "rq live": [*rq, "--formats", options.formats, "--stats", str(stats_file), *follows],
        "rq live from nothing": ["--strategy", "rq", "--formats", options.formats, *follows],
    }.items():
        with bench.start(name, options.model, *arguments) as served:
            servers[name], ends[name] = served, []
            warm_up(bench, served)
            for domain in bench.domains:
                rows.append({"server": name, "domain": domain, **phase(served, jobs[domain])})
                ends[name].append(served.samples[-1].num_pairs - served.samples[0].num_pairs)
                bench.console.print(f"{name}: {domain}: {brief(rows[-1])}")
            states[name] = served.state()
    moving = [state for state in states.values() if state.get("moved_bytes")]
    sent = sum(state["moved_bytes"] for state in moving)
    planned = sum(one["moved_bytes"] or 0 for state in moving for one in state["commits"])
    nothing = "rq live from nothing"
    return {
        "domains": bench.domains,
        "rows": rows,
        "phase_ends": ends["standard"],
        "series": {name: series(served.samples) for name, served in servers.items()},
        "commits": {
            name: [{**one, "pairs": pairs_at(servers[name].samples, one["time"])} for one in state.get("commits", ())]
            for name, state in states.items()
        },
        "results": {name: state.get("results", {}) for name, state in states.items()},
        "sent_by_planned": sent / planned if planned else 1.0,
        "value": value_after_change(bench, servers["rq live"], rows, ends["rq live"][-2]),
        "from_nothing": way_from_nothing(bench, servers[nothing], ends[nothing][0]),
    }


def phase(served: Served, jobs: Sequence[Job]) -> dict[str, Any]:
    """The figures of a server that gets these requests."""
    first_sample, committed = max(len(served.samples) - 1, 0), len(served.commits)
    found = latency(served.ask(jobs, 16))
    new = served.commits[committed:]
    imbalance = imbalance_between(served.samples[first_sample:])
    moved = sum(one["moved_bytes"] or 0 for one in new)
    return {**found, "imbalance": imbalance, "num_committed": len(new), "moved_bytes": moved}


def value_after_change(
    bench: Workload, served: Served, rows: Sequence[Mapping[str, Any]], change_pairs: float
) -> dict[str, Any]:
    """What the live placement has gained after the last change of domain, for which bytes (R4)."""
    before_domain, domain = bench.domains[-2:]
    planned, held_out = bench.halves(domain)
    moved_by_phase = [row["moved_bytes"] for row in rows if row["server"] == served.name]
    placements = [placement for _, placement in served.placements]
    is_before = [pairs_at(served.samples, at_s) <= change_pairs for at_s, _ in served.placements]
    before, after = placements[max(is_before.count(True) - 1, 0)], placements[-1]
    best = bench.place("rq", planned)
    eplb = [bench.place("eplb", bench.halves(name)[0]) for name in (before_domain, domain)]
    num_ranks = bench.options.num_ranks
    budget_bytes_R = (standard_ep_bytes(planned, num_ranks),) * num_ranks
    problem = PlacementProblem(planned, Topology(num_ranks), budget_bytes_R, bench.formats)
    eplb_bytes = moved_bytes(problem, *eplb)
    figures = [bench.imbalance("rq", placement, held_out) for placement in (before, after, best)]
    return {
        "from": before_domain, "to": domain, "before": figures[0], "after": figures[1], "best": figures[2],
        "share_of_gain": share_of_gain(*figures), "moved_bytes": moved_by_phase[-1], "eplb_bytes": eplb_bytes,
        "fresh_bytes": moved_bytes(problem, before, best),
        "share_of_bytes": moved_by_phase[-1] / eplb_bytes,
        "eplb": [bench.imbalance("eplb", placement, held_out) for placement in eplb],
    }  # fmt: skip


def way_from_nothing(bench: Workload, served: Served, end_pairs: float) -> dict[str, Any]:
    """How soon a server without statistics comes as near to balance as the calibrated placement, in its first phase."""
    planned, held_out = bench.halves(bench.domains[0])
    calibrated = bench.imbalance("rq", bench.place("rq", planned), held_out)
    points = [
        (pairs_at(served.samples, at_s), bench.imbalance("rq", placement, held_out))
        for at_s, placement in served.placements
    ]
    points = [(0.0, points[0][1]), *(point for point in points[1:] if point[0] <= end_pairs)]
    reached = first_within(points, calibrated, SLACK)
    pairs_per_token = (planned.top_k or 1) * planned.num_layers
    return {
        "calibrated": calibrated, "points": points, "last": points[-1][1],
        "steps_of_4096": None if reached is None else reached / pairs_per_token / STEP_TOKENS,
    }  # fmt: skip


def armed(bench: Workload) -> dict[str, Any]:
    """A server that is ready to move, and stays, in short turns with two that are off."""
    options, draw_order = bench.options, random.Random(bench.options.seed)
    rq = ["--strategy", "rq", "--placement", bench.calibrated("rq", bench.formats[:1])]
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        settings = {"off": [], "off again": [], "armed": [*AUTO, *NEVER]}
        servers = [stack.enter_context(bench.start(name, options.model, *rq, *more)) for name, more in settings.items()]
        for served in servers:
            warm_up(bench, served)
        for number in range(options.turns):
            jobs = bench.jobs(bench.domains[number % len(bench.domains)], 32, 24, 32, seed=number)
            for served in draw_order.sample(servers, len(servers)):
                rows.append({"server": served.name, "round": number, **latency(served.ask(jobs, 16))})
                bench.console.print(f"turn {number}: {served.name}: {brief(rows[-1])}")
        last = servers[-1]
        return {
            "rows": rows,
            "ratios": {
                figure: {name: ratio_by_round(rows, figure, name, "off") for name in settings}
                for figure in ("p99_itl_ms", "median_itl_ms", "output_throughput")
            },
            "results": last.state()["results"],
            "planner_share": last.planner_s / last.busy_s,
            "num_lost": sum(row["num_lost"] for row in rows),
        }


def cost(bench: Workload) -> dict[str, Any]:
    """Traffic that has the placement replaced again and again, each server in turns with one that never moves.

    Short prompts, as the prefill of long ones reads all experts: a step would take as long as a few moves.
    """
    options = bench.options
    large, placement = bench.folder / "large", bench.folder / "large.json"
    large_experts(large, options.num_experts, options.intermediate_size)
    native = bench.formats[:1]  # low bits may have to move, whatever it gains, when they exceed their cap
    stats = bench.calibrate(large, bench.domains[0], native, LARGE_TOKENS)
    bench.place("rq", stats, native).save(placement)
    rq, restless = (["--strategy", name, "--placement", str(placement)] for name in ("rq", RESTLESS))
    plans_often = [*restless, *AUTO, "--rebalance-window", str(LARGE_WINDOW)]
    ends = (bench.domains[0], bench.domains[-1])
    jobs = [
        job
        for stretch in range(STRETCHES)
        for job in bench.jobs(ends[stretch % 2], max(options.num_prompts // 40, 1), 8, 40, seed=stretch)
    ]
    rows: list[dict[str, Any]] = []
    states: dict[str, dict[str, Any]] = {}
    planner_share: dict[str, float] = {}
    peak_bytes: dict[str, int] = {}
    with bench.start("off", str(large), *rq) as off:
        warm_up(bench, off)
        for name, arguments, module in (
            ("planning", [*plans_often, *NEVER], "rq_ep.serve"),
            ("moving", plans_often, "rq_ep.serve"),
            ("stop-the-world", plans_often, STOP_THE_WORLD),
        ):
            with bench.start(name, str(large), *arguments, module=module) as served:
                warm_up(bench, served)
                for number in range(options.rounds * MORE_ROUNDS):
                    if number >= options.rounds and (name != "moving" or served.num_committed >= NUM_MIGRATIONS):
                        break
                    for one in (off, served) if number % 2 == 0 else (served, off):
                        found = latency(one.ask(jobs, 4))
                        rows.append({"server": one.name, "beside": name, "round": number, **found})
                        bench.console.print(f"{name}, round {number}: {one.name}: {brief(rows[-1])}")
                states[name] = served.state()
                planner_share[name] = served.planner_s / served.busy_s
                peak_bytes[name] = served.peak_bytes
    ratios = {
        figure: {
            name: ratio_by_round([row for row in rows if row["beside"] == name], figure, name, "off") for name in states
        }
        for figure in ("p99_itl_ms", "median_itl_ms", "output_throughput")
    }
    offs = [row for row in rows if row["server"] == "off"]
    return {
        "rows": rows,
        "results": {name: state["results"] for name, state in states.items()},
        "num_committed": {name: state["results"].get("committed", 0) for name, state in states.items()},
        "moved_bytes": {name: state["moved_bytes"] for name, state in states.items()},
        "ratios": ratios,
        "noise": {figure: spread([row[figure] for row in offs]) for figure in ratios},
        "longest_gap_ms": {
            name: median(row["longest_gap_ms"] for row in rows if row["server"] == name) for name in ("off", *states)
        },
        "planner_share": planner_share,
        "peak_bytes": peak_bytes,
        "room_bytes": max(stats.expert_bytes.values()),
        "num_lost": sum(row["num_lost"] for row in rows),
    }


def answers(bench: Workload) -> dict[str, Any]:
    """Greedy answers in fp32 across re-placements, compared with the dense model's."""
    options = bench.options
    model = load_whole_model(options.model, torch.float32, torch.device("cpu"))
    model.generation_config.eos_token_id = None  # clients ask to go on after end tokens
    ends = (bench.domains[0], bench.domains[-1])
    kinds = {name: bench.jobs(name, max(min(options.num_requests // 40, 50), 1), 24, 12) for name in ends}
    bench.console.print("answering as the dense model")
    expected = {job: dense_answer(model, job) for jobs in kinds.values() for job in jobs}
    draw_job, stretch = random.Random(options.seed), max(options.num_requests // 40, 1)
    jobs = [draw_job.choice(kinds[ends[at // stretch % 2]]) for at in range(options.num_requests)]
    settings = ["--dtype", "float32", "--strategy", RESTLESS, "--formats", "fp32", "--rebalance", "auto"]
    with bench.start("answers", options.model, *settings) as served:
        got = served.ask(jobs, 16)
        wrong = [answer for answer in got if answer.is_complete and not is_right(answer, expected, bench.tokenizer)]
        return {
            "num_requests": len(jobs), "num_committed": served.num_committed,
            "num_lost": sum(not answer.is_complete for answer in got), "num_wrong": len(wrong),
            "results": served.state().get("results", {}), "moved_bytes": served.state().get("moved_bytes", 0),
            **latency(got),
        }  # fmt: skip


def warm_up(bench: Workload, served: Served) -> None:
    """A few requests, and what the planner process begins with, so that nothing is done for the first time later."""
    asyncio.run(drive(served.url, NAME, bench.jobs(bench.domains[0], 8, 48, 4), max_concurrency=8))
    time.sleep(SETTLE_S)
    served.wait_for_planner()


def brief(row: Mapping[str, Any]) -> str:
    shown = f"{row['output_throughput']:.0f} tokens/s, ITL p99 {row['p99_itl_ms']:.0f} ms, longest gap "
    shown += f"{row['longest_gap_ms']:.0f} ms, {row['num_lost']} lost"
    if "imbalance" in row:
        shown = f"max/mean {row['imbalance']:.3f}, {shown}, {row['num_committed']} re-placements"
    return shown


def show(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    parts = result["parts"]
    console = wide_console(140)
    if "domains" in parts:
        table = Table(title="by domain: max/mean, tokens/s, ITL ms p50 / p99 / longest, re-placements")
        for name in ("server", *parts["domains"]["domains"]):
            table.add_column(name)
        for name in parts["domains"]["series"]:
            table.add_row(name, *(cell(row) for row in parts["domains"]["rows"] if row["server"] == name))
        console.print(table)
    table = Table(title=f"{result['options']['num_ranks']} ranks")
    for name in ("", "goal", "reached", "peers"):
        table.add_column(name)
    for goal in goals(parts):
        table.add_row(*goal)
    console.print(table)


def cell(row: Mapping[str, Any]) -> str:
    """The figures of a server in a domain."""
    return (
        f"{row['imbalance']:.3f}, {row['output_throughput']:.0f}, {row['median_itl_ms']:.0f} / {row['p99_itl_ms']:.0f} "
        f"/ {row['longest_gap_ms']:.0f}, {row['num_committed']}"
    )
