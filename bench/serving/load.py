"""A model about as large as the machine: made, calibrated, placed, loaded by several ranks and served.

    python -m bench load --work-dir runs/load --json bench/results/load_cpu2.json
    python -m bench load --work-dir runs/load-quick --quick

The checkpoint has the shape of OLMoE-1B-7B (13.8 GB in bf16) and random weights. It is made once and stays in the work
directory; its files are dropped from the page cache before they are loaded, so that the disk is read. Every stage is
the command that a user would give, in processes of its own.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import OlmoeConfig

from bench.options import bench_parser
from bench.serving.load_generator import Job, ask
from bench.serving.parts import read_options, run_parts
from bench.serving.random_checkpoint import MAX_SHARD_BYTES, random_checkpoint
from bench.serving.server_process import NAME, rank_processes, server
from rq_ep.commands.console import wide_console
from rq_ep.config import child_environment
from rq_ep.core.errors import UserError, check_number
from rq_ep.core.placement import Placement
from rq_ep.engine.kv_cache import kv_bytes_per_token
from rq_ep.model.checkpoint.checkpoint_files import INDEX
from rq_ep.model.text.corpus import write_corpus

SHAPE: dict[str, Any] = {
    "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
    "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
}  # fmt: skip
QUICK: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
QUICK_SHARD_BYTES = 500_000
DTYPE = torch.bfloat16
EMBEDDING_STD = 1.0  # tokens differ enough that every expert is chosen by some
PROMPT_TOKENS = 64
NUM_REQUESTS = 4
KV_TOKENS = 16_384  # the server's default on a CPU
PARTS = ("checkpoint", "calibrate", "place", "serve")
SAMPLE_S = 0.02
BYTES_READ = re.compile(r"rank 0: ([\d,]+) bytes read")  # the others log warnings alone


def parser() -> argparse.ArgumentParser:
    made = bench_parser("load", __doc__)
    made.add_argument("--work-dir", required=True, metavar="DIR", help="for checkpoint, statistics and placement")
    made.add_argument("--num-ranks", type=int, default=2, metavar="N", help="processes that load and serve")
    made.add_argument("--layers", type=int, default=16, metavar="N", help="of the model")
    made.add_argument("--tokens", type=int, default=384, metavar="N", help="to calibrate on")
    made.add_argument("--budget", type=float, default=0.6, metavar="F", help="of the bytes of standard EP")
    made.add_argument("--parts", default=",".join(PARTS), help="by commas, after those before")
    made.add_argument("--quick", action="store_true", help="a tiny shape, in seconds")
    made.add_argument("--json", default=None, metavar="FILE", help="write the figures there, part by part")
    return made


def main(argv: Sequence[str]) -> None:
    """Go through all stages; print the table.

    Raises:
        UserError: an option makes no sense, or a stage fails.
    """
    options, asked = read_options(parser(), argv, PARTS, ("num_ranks", "layers", "tokens"))
    check_number("--budget", options.budget, 0.0)
    work = Work(options, Path(options.work_dir), Console(stderr=True))
    parts: dict[str, Callable[[], dict[str, Any]]] = dict(
        zip(PARTS, (partial(part, work) for part in (checkpoint, calibrate, place, serve)), strict=True)
    )
    show(run_parts("load", argv, options, asked, parts))


@dataclass
class Work:
    """The options, and where things are."""

    options: argparse.Namespace
    folder: Path
    console: Console

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def config(self) -> OlmoeConfig:
        shape = QUICK if self.options.quick else SHAPE
        return OlmoeConfig(**shape, num_hidden_layers=self.options.layers, tie_word_embeddings=False, eos_token_id=None)

    @property
    def expert_bytes(self) -> int:
        """Of one expert, as it is stored."""
        config = self.config
        size: int = 3 * config.hidden_size * config.intermediate_size * DTYPE.itemsize
        return size

    @property
    def total_bytes(self) -> int:
        """Of all tensors, as they are stored."""
        size: int = json.loads((self.model / INDEX).read_text())["metadata"]["total_size"]
        return size

    @property
    def dense_bytes(self) -> int:
        """Of all tensors but the routed experts."""
        return self.total_bytes - self.config.num_hidden_layers * self.config.num_experts * self.expert_bytes

    def run(self, name: str, *arguments: str) -> dict[str, float]:
        """Run a command of `rq-ep`; how long it took, and the memory of its own that it had at most.

        Raises:
            UserError: it fails; its log says why.
        """
        log = self.folder / f"{name}.log"
        self.console.print(f"{name} (log: {log})")
        environment = child_environment() | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
        started_s = time.monotonic()
        with log.open("wb") as file:
            command = [sys.executable, "-m", "rq_ep", name, *arguments]
            process = psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            with watching(lambda: {0: process}) as processes:
                status = process.wait()
        if status:
            raise UserError(f"rq-ep {name} has failed, see {log}")
        return {"command_s": time.monotonic() - started_s, "peak_bytes": processes[0].peak_bytes}


def checkpoint(work: Work) -> dict[str, Any]:
    """Make the checkpoint and its text, unless they are there."""
    max_shard_bytes = QUICK_SHARD_BYTES if work.options.quick else MAX_SHARD_BYTES
    work.console.print(f"making {work.model}, unless it is there")
    is_new = random_checkpoint(work.model, work.config, DTYPE, EMBEDDING_STD, max_shard_bytes)
    write_corpus(work.folder / "text")
    shards = len(list(work.model.glob("*.safetensors")))
    return {"is_new": is_new, "bytes": work.total_bytes, "dense_bytes": work.dense_bytes, "shards": shards}


def calibrate(work: Work) -> dict[str, Any]:
    length = min(work.options.tokens // 4, 128)  # the text has four domains
    drop_from_cache(work.model)
    figures = work.run(
        "calibrate", "--model", str(work.model), "--text", str(work.folder / "text" / "train"),
        "--out", str(work.folder / "stats.safetensors"), "--max-tokens", str(work.options.tokens),
        "--sequence-length", str(length), "--batch-size", "1",
    )  # fmt: skip
    return {"tokens": work.options.tokens, **figures}


def place(work: Work) -> dict[str, Any]:
    config, options = work.config, work.options
    of_rank = -(-config.num_experts // options.num_ranks) * config.num_hidden_layers * work.expert_bytes
    budget = int(options.budget * of_rank)
    path = work.folder / "placement.json"
    figures = work.run(
        "place", "--stats", str(work.folder / "stats.safetensors"), "--num-ranks", str(options.num_ranks),
        "--budget", str(budget), "--formats", "bf16,int8", "--max-low-precision-share", "1", "--no-plot",
        "--out", str(path),
    )  # fmt: skip
    placement = Placement.load(path)
    return {
        **figures,
        "budget_bytes": budget,
        "bytes_R": placement.bytes_R,
        "replicas": sum(len(layer.replicas) for layer in placement.layers),
        "int8": sum(replica.format == "int8" for layer in placement.layers for replica in layer.replicas),
        "predicted": placement.certificate["predicted"],
    }


def serve(work: Work) -> dict[str, Any]:
    """Load onto all ranks, and answer a few requests."""
    options = work.options
    placement = Placement.load(work.folder / "placement.json")
    log = work.folder / "serve.log"
    work.console.print(f"serve (log: {log})")
    arguments = ["--model", str(work.model), "--placement", str(work.folder / "placement.json"), "--device", "cpu"]
    arguments += ["--kv-cache-tokens", str(KV_TOKENS)]
    drop_from_cache(work.model)
    started_s = time.monotonic()
    with watching(started_ranks) as watched, server(options.num_ranks, arguments, log) as (url, _):
        load_s = time.monotonic() - started_s
        ranks = [watched[rank] for rank in range(options.num_ranks)]
        for rank in ranks:
            rank.stop()
        ttft_s = asyncio.run(_first_tokens(url))
    (read,) = BYTES_READ.findall(log.read_text())
    replicas = sum(replica.rank == 0 for layer in placement.layers for replica in layer.replicas)
    rows = [
        {
            "expert_bytes": placement.bytes_R[rank],
            "kv_bytes": KV_TOKENS * kv_bytes_per_token(work.config, DTYPE),
            "peak_bytes": process.peak_bytes,
            "peak_bytes_with_files": process.peak_bytes_with_files,
            "disk_bytes": process.disk_bytes,
            "cpu_s": process.cpu_s,
        }
        for rank, process in enumerate(ranks)
    ]
    return {
        "load_s": load_s,
        "read_of_stored": int(read.replace(",", "")) / (replicas * work.expert_bytes + work.dense_bytes),
        "first_token_s": ttft_s[0],
        "next_first_token_s": median(ttft_s[1:]),
        "ranks": rows,
    }


async def _first_tokens(url: str) -> list[float]:
    """Seconds to the first token of a few requests, one after another."""
    times = []
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        for number in range(NUM_REQUESTS):
            prompt = tuple((number + 7 * position) % 256 for position in range(PROMPT_TOKENS))
            answer = await ask(client, NAME, Job(prompt, 2))
            if answer.error:
                raise UserError(f"a request has failed: {answer.error}")
            times.append(answer.token_s[0] - answer.sent_s)
    return times


class Watched:
    """What a process has held of memory and read from the disk, sampled until `stop`, or until it ends. Linux only."""

    def __init__(self, process: psutil.Process) -> None:
        self.pid = process.pid
        self._proc = Path("/proc") / str(process.pid)
        self._is_stopped = False
        self.peak_bytes = 0  # that nobody else has
        self.peak_bytes_with_files = 0  # with the pages of mapped files, which the system takes back as it needs them
        self.disk_bytes = 0
        self.cpu_s = 0.0

    def sample(self) -> None:
        if self._is_stopped:
            return
        with suppress(OSError):
            status = dict(line.split(":", 1) for line in (self._proc / "status").read_text().splitlines())
            if "RssAnon" not in status:  # it has ended
                return
            sizes = {name: 1024 * int(status[name].split()[0]) for name in ("RssAnon", "RssShmem", "VmHWM")}
            self.peak_bytes = max(self.peak_bytes, sizes["RssAnon"] + sizes["RssShmem"])
            self.peak_bytes_with_files = sizes["VmHWM"]
            counters = dict(line.split(": ") for line in (self._proc / "io").read_text().splitlines())
            self.disk_bytes = int(counters["read_bytes"])
            ticks = (self._proc / "stat").read_text().rpartition(")")[2].split()
            self.cpu_s = sum(map(int, ticks[11:13])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self._is_stopped = True


@contextmanager
def watching(find: Callable[[], Mapping[int, psutil.Process]]) -> Iterator[dict[int, Watched]]:
    """While open, sample processes as they start: by the number that `find` gives each."""
    watched: dict[int, Watched] = {}
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(SAMPLE_S):
            with suppress(psutil.Error):
                for number, process in find().items():
                    if number not in watched or watched[number].pid != process.pid:  # a supervisor was first
                        watched[number] = Watched(process)
            for one in watched.values():
                one.sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield watched
    finally:
        is_over.set()
        thread.join()


def started_ranks() -> dict[int, psutil.Process]:
    """Rank -> its process, of the server that this one is starting."""
    launchers = [one for one in psutil.Process().children() if "torch.distributed.run" in one.cmdline()]
    return rank_processes(launchers[0]) if launchers else {}


def drop_from_cache(folder: Path) -> None:
    """Have the system forget the pages of a checkpoint's files, so that they are read from the disk."""
    os.sync()  # pages that are not written yet would stay
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(result: dict[str, Any]) -> None:
    """Print the table, if all parts have been measured."""
    if len(result["parts"]) < len(PARTS):
        return
    table = Table(title=f"{result['options']['num_ranks']} ranks")
    for name in ("", "goal", "reached"):
        table.add_column(name)
    for row in goals(result["parts"]):
        table.add_row(*row)
    wide_console(140).print(table)


def goals(parts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What is measured, what it is to be, and what it is."""
    calibrated, placed, served = parts["calibrate"], parts["place"], parts["serve"]
    ranks = served["ranks"]
    disk = sum(rank["disk_bytes"] for rank in ranks) / parts["checkpoint"]["bytes"]
    peak = max(rank["peak_bytes"] / (rank["expert_bytes"] + rank["kv_bytes"]) for rank in ranks)
    return [
        ("checkpoint, GB", "", f"{parts['checkpoint']['bytes'] / 1e9:.1f}"),
        (f"calibrate on {calibrated['tokens']} tokens, s", "", f"{calibrated['command_s']:.0f}"),
        ("memory of that, GB", "", f"{calibrated['peak_bytes'] / 1e9:.1f}"),
        ("place, s", "", f"{placed['command_s']:.0f}"),
        ("max/mean load, predicted", "", f"{placed['predicted']:.2f}"),
        ("experts of a rank, GB", "", ", ".join(f"{rank['expert_bytes'] / 1e9:.2f}" for rank in ranks)),
        ("load, s", "", f"{served['load_s']:.0f}"),
        ("read by a rank / stored size of what it holds", "<= 1.02", f"{served['read_of_stored']:.3f}"),
        ("read from the disk by all ranks / checkpoint", "<= 1.02", f"{disk:.3f}"),
        ("KV cache of a rank, GB", "", f"{ranks[0]['kv_bytes'] / 1e9:.2f}"),
        ("peak memory of a rank / its experts and KV cache", "<= 1.10", f"{peak:.3f}"),
        ("first token, s", "", f"{served['first_token_s']:.2f}"),
        ("first token of later requests, s", "", f"{served['next_first_token_s']:.2f}"),
    ]
