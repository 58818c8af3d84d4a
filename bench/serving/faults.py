"""Ranks that die, leave and come back under load: what clients notice, and what it costs to be able to go on.

    python -m bench faults --model runs/demo/model --json OUT.json --png OUT.png
    python -m bench faults --model runs/demo/model --parts kills --kills 4
    python -m bench faults --model runs/demo/model --quick

Parts; `--parts` runs some of them, and keeps the others of an earlier `--json FILE`:

kills    `kill -9` of a rank drawn at random, at a random moment, while clients ask in fp32; the next one when all ranks
         serve again. Every answer is compared with the dense model's, as `soak` does.
moving   The same while the placement is replaced again and again (`bench.serving.restless`).
restart  The same kill with `--on-rank-failure stop` under torchrun's `--max-restarts`: the whole group starts again.
steady   Tokens/s of a server that can go on without a rank, and of one that cannot, in turns.
balance  max/mean of held-out steps by the placement that serves with a rank less, and by a fresh one for those ranks;
         the same with all ranks, before and after.
cycles   Ranks leave and come back by requests, under load: 4 -> 3 -> 2 -> 3 -> 4. What has grown after that?

A pause is the longest time without a token that a stream has in the 5 s after the signal. The streams of the lost rank
are those that the server counts as resumed, and are taken to be the ones that paused longest.
"""

import argparse
import asyncio
import json
import random
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
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
from safetensors.torch import load_file, save_file

from bench.options import bench_parser
from bench.serving.faults_figure import draw
from bench.serving.faults_figures import binned, goals, mean_of_each, pauses_after, spread
from bench.serving.load_generator import TIMEOUT_S, Answer, Job, ask, drive, figures, random_jobs
from bench.serving.parts import read_options, run_parts
from bench.serving.server_process import NAME, rank_processes, server
from bench.serving.soak import dense_answer, is_right
from rq_ep.commands.console import wide_console
from rq_ep.core.placement import Placement
from rq_ep.core.problem import standard_ep_bytes
from rq_ep.core.stats import ExpertStats
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.model.load.whole_model import load_whole_model
from rq_ep.model.model_names import check_folder
from rq_ep.placing.place import place
from rq_ep.sim.simulator import simulate
from rq_ep.solver.migration.members import lowered
from rq_ep.strategies import make_strategy

QUICK = {"kills": 2, "cycles": 1, "rounds": 1, "calibration_tokens": 8192, "requests": 64}
SPARE = 1.5  # bytes of a rank, over those of standard EP, where answers must stay exact with a rank less
CONTINUE = ("--on-rank-failure", "continue", "--max-rank-restarts", "1000")
TIGHT = 1.2  # where some experts have to lose bits with a rank less
SETTLE_S = 2.0  # of load before a kill, at least
BACK_TIMEOUT_S = 120.0
POLL_S = 0.1


def parser() -> argparse.ArgumentParser:
    made = bench_parser("faults", __doc__)
    made.add_argument("--model", required=True, help="directory of the checkpoint")
    made.add_argument("--text", default=None, help="text to calibrate on (default: MODEL/text/train)")
    made.add_argument("--parts", default=",".join(PARTS), help="by commas")
    made.add_argument("--num-ranks", type=int, default=4, help="processes of each server")
    made.add_argument("--kills", type=int, default=30, help="of the part of that name; the others make fewer")
    made.add_argument("--cycles", type=int, default=20, help="of the part of that name")
    made.add_argument("--rounds", type=int, default=5, help="of the part on the steady cost")
    made.add_argument("--requests", type=int, default=256, help="of each round of it")
    made.add_argument("--max-concurrency", type=int, default=16, help="clients that ask at once")
    made.add_argument("--calibration-tokens", type=int, default=65_536, help="of the placements")
    made.add_argument("--seed", type=int, default=0, help="of requests, ranks and moments")
    made.add_argument("--quick", action="store_true", help=f"does it run? {QUICK}")
    made.add_argument("--json", default=None, help="write every figure there")
    made.add_argument("--png", default=None, help="draw tokens/s over a kill and a return there")
    return made


def main(argv: Sequence[str]) -> None:
    """Run the parts; print the table.

    Raises:
        UserError: an option makes no sense, or a server does not start.
    """
    positive = ("num_ranks", "kills", "cycles", "rounds", "requests", "max_concurrency")
    options, asked = read_options(parser(), argv, PARTS, positive, QUICK)
    bench = Workload(options)
    result = run_parts("faults", argv, options, asked, {name: partial(part, bench) for name, part in PARTS.items()})
    show(result)
    if options.png and "kills" in result["parts"]:
        draw(result["parts"]["kills"], options.png)


class Workload:
    """What all parts share: requests with the answers of the dense model, statistics, placements, a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.console = Console(stderr=True)
        self.folder = Path(mkdtemp(prefix="rq_ep-bench-faults-"))
        self.model = str(self.folder / "model")
        check_folder(options.model)
        in_fp32(options.model, Path(self.model))
        self.tokenizer = read_tokenizer(self.model)
        self.draw = random.Random(options.seed)
        self._text = Path(options.text or Path(options.model) / "text/train")
        self._expected: dict[Job, list[tuple[int, float]]] = {}
        self._stats: ExpertStats | None = None

    @property
    def stats(self) -> ExpertStats:
        if self._stats is None:
            self.console.print("calibrating")
            self._stats = calibrate(
                self.model, [self._text], max_tokens=self.options.calibration_tokens, sequence_length=256,
                formats=("fp32", "int8"), dtype="float32",
            )  # fmt: skip
        return self._stats

    @property
    def expected(self) -> dict[Job, list[tuple[int, float]]]:
        """Requests of mixed lengths, and the dense model's answers."""
        if not self._expected:
            self.console.print("answering as the dense model")
            model = load_whole_model(self.model, torch.float32, torch.device("cpu"))
            model.generation_config.eos_token_id = None  # clients ask to go on after end tokens
            texts = [self.tokenizer.encode(Path(__file__).read_text())]
            jobs = [*random_jobs(texts, 40, 64, 48, 0), *random_jobs(texts, 10, 200, 16, 1)]
            self._expected = {job: dense_answer(model, job) for job in jobs}
        return self._expected

    def budget(self, share: float) -> int:
        """Bytes of a rank: so many times those of standard EP."""
        return int(share * standard_ep_bytes(self.stats, self.options.num_ranks))

    def saved(self, share: float, *formats: str) -> str:
        """The file of a placement for all ranks, each with so many times the bytes of standard EP."""
        path = self.folder / f"{share}-{'-'.join(formats)}.json"
        if not path.exists():
            place(self.stats, self.options.num_ranks, strategy="rq", formats=formats, budget=self.budget(share)).save(
                path
            )
        return str(path)

    @property
    def exact(self) -> list[str]:
        """Arguments of a server whose experts keep all their bits with a rank less."""
        return ["--placement", self.saved(SPARE, "fp32")]


@dataclass
class Loaded:
    """A server whose clients ask without a break."""

    url: str
    launcher: psutil.Process
    answers: list[Answer] = field(default_factory=list)
    client: httpx.AsyncClient = field(
        # A connection that is kept may be closed by the server just when it is used again.
        default_factory=lambda: httpx.AsyncClient(
            timeout=TIMEOUT_S, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
        )
    )

    async def get(self, path: str) -> Any:
        return (await self.client.get(self.url + path)).json()

    async def state_of_ranks(self) -> list[str]:
        return [row["state"] for row in (await self.get("/v1/ep/ranks"))["ranks"]]

    async def metric(self, name: str) -> dict[str, float]:
        """The samples of a metric, by their labels."""
        text = (await self.client.get(self.url + "/metrics")).text
        rows = (line.rpartition(" ") for line in text.splitlines() if line.startswith(name))
        return {labels.removeprefix(name): float(value) for labels, _, value in rows}

    async def recoveries(self) -> dict[str, tuple[float, float]]:
        """Part of a recovery -> how often there was one, and seconds in all."""
        seconds, numbers = [await self.metric(f"rq_ep_recovery_seconds_{kind}") for kind in ("sum", "count")]
        return {labels.split('part="')[1].split('"')[0]: (numbers[labels], seconds[labels]) for labels in seconds}

    async def until_all_serve(self) -> float:
        """Wait until every rank serves; the seconds that it took."""
        return await self.until(lambda states: set(states) == {"serving"})

    async def until(self, holds: Callable[[list[str]], bool]) -> float:
        started_s = time.perf_counter()
        while not holds(states := await self.state_of_ranks()):
            if time.perf_counter() - started_s > BACK_TIMEOUT_S:
                raise TimeoutError(f"after {BACK_TIMEOUT_S:g} s the ranks are {states}")
            await asyncio.sleep(POLL_S)
        return time.perf_counter() - started_s

    def rank(self, rank: int) -> psutil.Process:
        """The process that computes as this rank."""
        return rank_processes(self.launcher)[rank]


@asynccontextmanager
async def asking(bench: Workload, url: str, launcher: psutil.Process) -> AsyncIterator[Loaded]:
    """Clients that ask one request after another, until the block ends and their last ones are answered."""
    over = asyncio.Event()
    loaded = Loaded(url, launcher)
    jobs = list(bench.expected)
    draws = random.Random(bench.options.seed)

    async def ask_on() -> None:
        while not over.is_set():
            loaded.answers.append(await ask(client, NAME, draws.choice(jobs)))

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=bench.options.max_concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:
        clients = [asyncio.ensure_future(ask_on()) for _ in range(bench.options.max_concurrency)]
        try:
            yield loaded
        finally:
            over.set()
            await asyncio.gather(*clients)
            await loaded.client.aclose()


def kills(bench: Workload) -> dict[str, Any]:
    """A rank after another dies at a random moment, and comes back."""
    return killed(bench, "kills", bench.options.kills, ["--dtype", "float32", *bench.exact])


def moving(bench: Workload) -> dict[str, Any]:
    """The same while experts move all the time."""
    settings = ["--strategy", "bench.serving.restless:Restless", "--formats", "fp32", "--rebalance", "auto"]
    number = max(bench.options.kills // 3, 1)
    return killed(bench, "moving", number, ["--dtype", "float32", *settings])


def killed(bench: Workload, name: str, number: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Kill ranks of a server one after another; the figures of each, and the answers' fate."""
    options = bench.options
    _ = bench.expected
    settings = ["--model", bench.model, "--device", "cpu", *CONTINUE, *arguments]
    with server(options.num_ranks, settings, bench.folder / f"{name}.log") as (url, launcher):
        rows, answers = asyncio.run(_kill_ranks(bench, url, launcher, number))
    wrong = [
        answer for answer in answers if answer.is_complete and not is_right(answer, bench.expected, bench.tokenizer)
    ]
    failed = [answer for answer in answers if not answer.is_complete]
    first_s = min((answer.sent_s for answer in answers), default=0.0)
    return {
        "rows": rows,
        "num_answers": len(answers),
        "num_failed": len(failed),
        "num_wrong": len(wrong),
        "errors": sorted({str(answer.error) for answer in failed})[:3],
        "pauses_s": {who: spread([p for row in rows for p in row[who]]) for who in ("survivors", "lost")},
        "parts_s": _parts(rows),
        "back_s": spread([row["back_s"] for row in rows]),
        "tokens_by_bin": binned([token_s - first_s for answer in answers for token_s in answer.token_s]),
        "events": [{"at_s": row["at_s"] - first_s, "back_s": row["back_s"], "rank": row["rank"]} for row in rows],
    }


async def _kill_ranks(
    bench: Workload, url: str, launcher: psutil.Process, number: int
) -> tuple[list[dict[str, Any]], list[Answer]]:
    rows: list[dict[str, Any]] = []
    async with asking(bench, url, launcher) as loaded:
        for at in range(number):
            await asyncio.sleep(SETTLE_S + bench.draw.random() * 2)
            rank = bench.draw.randrange(bench.options.num_ranks)
            resumed = sum((await loaded.metric("rq_ep_requests_resumed_total")).values())
            before = await loaded.recoveries()
            loaded.rank(rank).send_signal(signal.SIGKILL)
            at_s = time.perf_counter()
            await loaded.until(lambda states: states[rank] != "serving")  # noqa: B023
            back_s = await loaded.until_all_serve()
            num_resumed = int(sum((await loaded.metric("rq_ep_requests_resumed_total")).values()) - resumed)
            parts = mean_of_each(before, await loaded.recoveries())
            rows.append({"rank": rank, "at_s": at_s, "back_s": back_s, "num_resumed": num_resumed, "parts": parts})
            bench.console.print(f"kill {at + 1} of {number}: rank {rank}, back after {back_s:.1f} s")
    for row in rows:
        pauses = sorted(pauses_after(loaded.answers, row["at_s"]))
        num_lost = min(row["num_resumed"], len(pauses))
        row["survivors"], row["lost"] = pauses[: len(pauses) - num_lost], pauses[len(pauses) - num_lost :]
    return rows, loaded.answers


def restart(bench: Workload) -> dict[str, Any]:
    """The whole group starts again: until it is well, and until it has answered."""
    options = bench.options
    number = min(options.kills, 3)
    settings = ["--model", bench.model, "--device", "cpu", "--dtype", "float32", "--on-rank-failure", "stop"]
    rows = []
    with server(options.num_ranks, [*settings, *bench.exact], bench.folder / "restart.log", max_restarts=number) as (
        url,
        launcher,
    ):
        job = next(iter(bench.expected))
        for _ in range(number):
            asyncio.run(drive(url, NAME, [job], max_concurrency=1))
            Loaded(url, launcher).rank(bench.draw.randrange(options.num_ranks)).send_signal(signal.SIGKILL)
            killed_s = time.perf_counter()
            time.sleep(1.0)  # the old server answers until it has noticed
            while True:
                (answer,) = asyncio.run(drive(url, NAME, [job], max_concurrency=1))
                if answer.is_complete:
                    rows.append(answer.token_s[0] - killed_s)
                    break
                time.sleep(POLL_S)
    return {"interruption_s": spread(rows)}


def steady(bench: Workload) -> dict[str, Any]:
    """What it costs to be able to go on, while nothing happens."""
    options = bench.options
    jobs = list(bench.expected) * (options.requests // len(bench.expected) + 1)
    settings = ["--model", bench.model, "--device", "cpu", "--dtype", "float32", *bench.exact, "--on-rank-failure"]
    rows: list[dict[str, Any]] = []
    with (
        server(options.num_ranks, [*settings, "continue"], bench.folder / "continue.log") as (able, _),
        server(options.num_ranks, [*settings, "stop"], bench.folder / "stop.log") as (unable, _),
    ):
        urls = {"continue": able, "stop": unable}
        for number in range(-1, options.rounds):  # the first one warms up
            for name in sorted(urls, reverse=number % 2 == 1):
                answers = asyncio.run(
                    drive(urls[name], NAME, jobs[: options.requests], max_concurrency=options.max_concurrency)
                )
                if number >= 0:
                    found = figures(answers)
                    keys = ("output_throughput", "median_itl_ms", "p99_itl_ms")
                    rows.append({"server": name, "round": number, **{key: found[key] for key in keys}})
    by_name = {name: [row["output_throughput"] for row in rows if row["server"] == name] for name in urls}
    ratios = [able / unable for able, unable in zip(by_name["continue"], by_name["stop"], strict=True)]
    noise = max(max(values) / min(values) for values in by_name.values())
    return {"rows": rows, "tokens_ratio": median(ratios), "ratios": ratios, "noise": noise}


def balance(bench: Workload) -> dict[str, Any]:
    """max/mean of held-out steps, with a rank less and with all again."""
    options = bench.options
    settings = ["--model", bench.model, "--device", "cpu", "--dtype", "float32", *CONTINUE]
    path = bench.saved(TIGHT, "fp32", "int8")
    before = Placement.load(path)
    lost = options.num_ranks - 1
    stats = bench.folder / "stats.safetensors"
    bench.stats.save(stats)
    settings += ["--placement", path, "--stats", str(stats)]
    with server(options.num_ranks, settings, bench.folder / "balance.log") as (url, launcher):
        loaded = Loaded(url, launcher)

        async def placements() -> tuple[Placement, Placement]:
            body = {"remove": [lost], "requests": "move"}
            (await loaded.client.post(url + "/v1/ep/ranks", json=body)).raise_for_status()
            await loaded.until(lambda states: states[lost] == "removed")
            await asyncio.sleep(15.0)  # the balance comes beside the steps
            fewer = Placement.from_dict(await loaded.get("/v1/ep/placement"))
            (await loaded.client.post(url + "/v1/ep/ranks", json={"add": [lost]})).raise_for_status()
            await loaded.until_all_serve()
            await asyncio.sleep(15.0)
            return fewer, Placement.from_dict(await loaded.get("/v1/ep/placement"))

        fewer, after = asyncio.run(placements())
    members = range(lost)
    fresh = place(bench.stats, lost, strategy="rq", formats=("fp32", "int8"), budget=bench.budget(TIGHT))
    return {
        "with_fewer": _imbalance(bench, lowered(fewer, members)),
        "fresh": _imbalance(bench, fresh),
        "before": _imbalance(bench, before),
        "after": _imbalance(bench, after),
    }


def _imbalance(bench: Workload, placement: Placement) -> float:
    """max/mean of the recorded steps as `rq` splits them, mean over steps and layers."""
    counts = list(bench.stats.counts)
    return float(simulate(make_strategy("rq"), placement, counts, "fp32").imbalances.mean())


def cycles(bench: Workload) -> dict[str, Any]:
    """Ranks leave and come back; what the processes hold at the end and after the first cycle."""
    options = bench.options
    settings = ["--model", bench.model, "--device", "cpu", "--dtype", "float32", *CONTINUE]
    settings += ["--placement", bench.saved(2.2, "fp32")]  # half of the ranks hold all
    with server(options.num_ranks, settings, bench.folder / "cycles.log") as (url, launcher):
        held, answers = asyncio.run(_cycle(bench, url, launcher))
    wrong = [
        answer for answer in answers if answer.is_complete and not is_right(answer, bench.expected, bench.tokenizer)
    ]
    return {
        "held": held,
        "growth": {name: held[-1][name] / held[0][name] - 1 for name in held[0]},
        "num_answers": len(answers),
        "num_failed": sum(not answer.is_complete for answer in answers),
        "num_wrong": len(wrong),
    }


async def _cycle(bench: Workload, url: str, launcher: psutil.Process) -> tuple[list[dict[str, int]], list[Answer]]:
    held = []
    leaving = list(range(bench.options.num_ranks))[-2:]
    async with asking(bench, url, launcher) as loaded:
        for number in range(bench.options.cycles):
            for action, rank in [*(("remove", r) for r in reversed(leaving)), *(("add", r) for r in leaving)]:
                (await loaded.client.post(url + "/v1/ep/ranks", json={action: [rank]})).raise_for_status()
                state = "removed" if action == "remove" else "serving"
                await loaded.until(lambda states: states[rank] == state)  # noqa: B023
            held.append(_held(loaded.rank(0)))
            bench.console.print(f"cycle {number + 1} of {bench.options.cycles}: {held[-1]}")
    return held, loaded.answers


def _held(process: psutil.Process) -> dict[str, int]:
    """What a process holds."""
    return {"bytes": process.memory_info().rss, "fds": process.num_fds(), "threads": process.num_threads()}


def in_fp32(model: str, out: Path) -> None:
    """Write a checkpoint of the same weights in fp32, the format in which experts then are by default."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors*", "text"))
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(Path(model).glob("*.safetensors")):
        tensors |= {name: tensor.float() for name, tensor in load_file(path).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=1))


PARTS: Mapping[str, Callable[[Workload], dict[str, Any]]] = {
    "kills": kills,
    "moving": moving,
    "restart": restart,
    "steady": steady,
    "balance": balance,
    "cycles": cycles,
}


def _parts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = sorted({part for row in rows for part in row["parts"]})
    return {name: spread([row["parts"][name] for row in rows if name in row["parts"]]) for name in names}


def show(result: Mapping[str, Any]) -> None:
    """Print the table."""
    parts = result["parts"]
    table = Table(title=f"{result['options']['num_ranks']} ranks")
    for name in ("", "goal", "reached", "peers"):
        table.add_column(name)
    for row in goals(parts):
        table.add_row(*row)
    wide_console(140).print(table)
