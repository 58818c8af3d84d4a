"""What the parts of `bench rebalance` share: texts, statistics and placements, and servers that are watched."""

import argparse
import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import httpx
import psutil
from rich.console import Console

from bench.serving.load_generator import Answer, Job, drive, random_jobs
from bench.serving.local_client import local_client
from bench.serving.rebalance_figures import LoadSample
from bench.serving.server_process import NAME, own_bytes, rank_processes, server
from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.stats import ExpertStats
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.placing.place import place
from rq_ep.sim.simulator import simulate
from rq_ep.strategies import make_strategy

SAMPLE_S = 0.25  # between two looks at a server under load; its ranks report once a second
SETTLE_S = 1.3  # until the last steps are reported
PLANNER_TIMEOUT_S = 120.0  # for a planner process that compiles, once for an installation
IDLE_TIMEOUT_S = 10.0  # for a decision or a migration that is under way when the requests have ended
NUM_TEXTS = 40  # of a domain that prompts are cut out of


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


def warm_up(bench: Workload, served: Served) -> None:
    """A few requests, and what the planner process begins with, so that nothing is done for the first time later."""
    asyncio.run(drive(served.url, NAME, bench.jobs(bench.domains[0], 8, 48, 4), max_concurrency=8))
    time.sleep(SETTLE_S)
    served.wait_for_planner()
