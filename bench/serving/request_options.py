"""What options of requests cost, and what their likeness saves, on one server.

    python -m bench options --model runs/demo/model --json OUT.json
    python -m bench options --model DIR --num-ranks 2 --parts costs --rounds 40 --json OUT.json

Parts; `--parts` runs some of them, and keeps the others of an earlier `--json FILE`:

costs   Tokens per second, and CPU time of the server per token, of answers that follow a JSON schema and of such as
        come with their routed experts, beside plain ones: as long requests, all of one kind at once, kinds in turns.
        Answers come whole, so that the client takes no time, and ranks have cores of their own where there are enough.
prefix  Time to the first token of a prompt whose prefix an earlier one had, beside new ones, one request at a time over
        one connection.
large   The same on a model whose prompts take time: that of `python -m bench balance`, made on the spot.
n       Tokens of prompts that are computed for one answer and for four, by the routed pairs that the server counts.
masks   CPU time that a JSON schema adds to choosing the tokens of a step, of 150,000 (`grammar_masks`).

Figures are medians over rounds, most of them of the ratio to the plain kind in the same round. In brackets is the
interval in which the median lies with 95 %. One kind is plain a second time: its ratio is the noise, and what costs
less than that interval is wide is not seen.
"""

import argparse
import asyncio
import base64
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from bench.options import bench_parser
from bench.serving.balance import SHAPE, model_config
from bench.serving.grammar_masks import mask_rows
from bench.serving.load_generator import TIMEOUT_S, Job, random_jobs
from bench.serving.local_client import local_client
from bench.serving.parts import read_options, run_parts
from bench.serving.random_checkpoint import random_checkpoint
from bench.serving.server_process import NAME, cpu_s, pinned_apart, server
from rq_ep.commands.console import wide_console
from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer

PARTS = ("costs", "prefix", "large", "n", "masks")
SETTLE_S = 1.3  # until the last steps are reported
MASK_ROUNDS = 10
TAIL_TOKENS = 16  # behind a prefix, of their own in each prompt
# A text that is longer than any answer here, so that all kinds make as many tokens.
SCHEMA = {"type": "object", "properties": {"text": {"type": "string", "minLength": 4096}}, "required": ["text"]}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "routed experts": {"return_routed_experts": True},
    "plain again": {},
    "JSON schema": {
        "ignore_eos": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "text", "schema": SCHEMA}},
    },
}


def parser() -> argparse.ArgumentParser:
    made = bench_parser("options", __doc__)
    made.add_argument("--model", required=True, help="directory of the checkpoint")
    made.add_argument("--num-ranks", type=int, default=1, help="processes of the server")
    made.add_argument("--parts", default=",".join(PARTS), help="by commas")
    made.add_argument("--rounds", type=int, default=40, help="of each part, after one of warm-up")
    made.add_argument("--at-once", type=int, default=8, help="requests of a kind at once")
    made.add_argument("--input-len", type=int, default=64, help="mean tokens of a prompt in the part on costs")
    made.add_argument("--output-len", type=int, default=64, help="tokens of an answer there")
    made.add_argument("--prefix-len", type=int, default=400, help="tokens of a prefix")
    made.add_argument("--text", default=None, help="text that prompts are cut from; default: this program's")
    made.add_argument("--seed", type=int, default=0, help="of the prompts")
    made.add_argument("--json", default=None, help="write every figure there")
    return made


def main(argv: Sequence[str]) -> None:
    """Measure the parts; print the table.

    Raises:
        UserError: an option makes no sense, the server does not start, or a request failed.
    """
    positive = ("num_ranks", "rounds", "at_once", "input_len", "output_len", "prefix_len")
    options, asked = read_options(parser(), argv, PARTS, positive)
    with ExitStack() as stack:

        @cache
        def bench() -> Bench:
            return stack.enter_context(served(options, options.model, options.num_ranks))

        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "costs": lambda: bench().costs(), "prefix": lambda: bench().prefix(), "large": lambda: large(options),
            "n": lambda: bench().several_answers(), "masks": lambda: {"rows": mask_rows(MASK_ROUNDS)},
        }  # fmt: skip
        result = run_parts("options", argv, options, asked, parts)
    table = Table(*HEADER, title="Options of requests")
    for row in goals(result["parts"]):
        table.add_row(*row)
    wide_console().print(table)


@contextmanager
def served(options: argparse.Namespace, model: str, num_ranks: int) -> Iterator["Bench"]:
    """A server of a model."""
    log = Path(mkdtemp(prefix="rq_ep-bench-options-")) / "server.log"
    Console(stderr=True).print(f"starting the server of {model} (log: {log})")
    with server(num_ranks, ["--model", model, "--log-level", "warning"], log) as (url, process):
        yield Bench(url, process, options)


def large(options: argparse.Namespace) -> dict[str, Any]:
    """The part on prefixes, on a model of one rank whose prompts take time."""
    config = model_config(SHAPE, 2, 2 * (options.prefix_len + TAIL_TOKENS))
    with TemporaryDirectory(prefix="rq_ep-bench-options-") as folder:
        random_checkpoint(Path(folder), config, torch.float32)
        with served(options, folder, 1) as bench:
            return bench.prefix()


class Bench:
    """The parts, each on the same server.

    Args:
        url: of the server.
        process: its launcher.
        options: of the bench.
    """

    def __init__(self, url: str, process: psutil.Process, options: argparse.Namespace) -> None:
        self._url = url
        self._client = local_client(url, TIMEOUT_S)
        self._process = process
        self._options = options
        self._random = random.Random(options.seed)

    def costs(self) -> dict[str, Any]:
        with pinned_apart(self._process) as is_pinned:
            rows = asyncio.run(self._cost_rows())
        return {"rows": [row for row in rows if row["round"]], "is_pinned": is_pinned}

    async def _cost_rows(self) -> list[dict[str, Any]]:
        rows = []
        async with httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT_S, trust_env=False) as client:
            for number in range(self._options.rounds + 1):
                for name in KINDS if number % 2 else reversed([*KINDS]):
                    jobs = self._jobs(number, name)
                    before_s, start_s = cpu_s(self._process), time.perf_counter()
                    answers = await asyncio.gather(*(self._whole(client, job, KINDS[name]) for job in jobs))
                    seconds = time.perf_counter() - start_s
                    num_tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
                    assert num_tokens == len(jobs) * self._options.output_len, "as many tokens of every kind"
                    cpu_s_per_token = (cpu_s(self._process) - before_s) / num_tokens
                    rows.append({
                        "round": number, "kind": name, "tokens_per_s": num_tokens / seconds,
                        "cpu_s_per_token": cpu_s_per_token,
                    })  # fmt: skip
        return rows

    async def _whole(self, client: httpx.AsyncClient, job: Job, more: Mapping[str, Any]) -> Any:
        body = {
            "model": NAME, "prompt": job.prompt_ids, "max_tokens": job.max_tokens, "temperature": 0,
            "ignore_eos": True, **more,
        }  # fmt: skip
        response = await client.post("/v1/completions", json=body)
        _check([None if response.status_code == 200 else response.text])
        return response.json()

    def prefix(self) -> dict[str, Any]:
        """A prompt is new, is new again, or begins as the first one of its round."""
        rows = []
        with closing(HTTPConnection(urlsplit(self._url).netloc, timeout=TIMEOUT_S)) as connection:
            for number in range(self._options.rounds + 1):
                prefixes = {name: self._ids(self._options.prefix_len) for name in ("new", "new again")}
                for name, prefix in {**prefixes, "repeated": prefixes["new"]}.items():
                    ttft_s = _ttft_s(connection, (*prefix, *self._ids(TAIL_TOKENS)))
                    rows.append({"round": number, "kind": name, "ttft_s": ttft_s})
        return {"rows": [row for row in rows if row["round"]]}

    def several_answers(self) -> dict[str, Any]:
        """How many tokens of prompts a request computes, whose answers have some tokens each."""
        num_tokens = 8
        body = {"model": NAME, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 1.0, "seed": 0}
        shape = self._post({**body, "prompt": [1], "return_routed_experts": True})["choices"][0]["routed_experts"]
        num_layers, top_k = np.load(BytesIO(base64.b64decode(shape))).shape[1:]
        rows = []
        for num_answers in (1, 4):
            prompt = self._ids(self._options.prefix_len + TAIL_TOKENS)
            before = self._num_pairs()
            self._post({**body, "prompt": prompt, "n": num_answers})
            computed = (self._num_pairs() - before) / (num_layers * top_k)
            rows.append({
                "n": num_answers, "prompt": len(prompt),
                "computed": round(computed) - num_answers * (num_tokens - 1),
            })  # fmt: skip
        return {"rows": rows}

    def _post(self, body: Mapping[str, Any]) -> Any:
        response = self._client.post("/v1/completions", json=body)
        _check([None if response.status_code == 200 else response.text])
        return response.json()

    def _num_pairs(self) -> float:
        time.sleep(SETTLE_S)
        text = self._client.get("/metrics").text
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name == "rq_ep_tokens_routed_total")

    def _ids(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens that no other prompt begins with."""
        return tuple(self._random.choices(range(32, 127), k=num_tokens))

    def _jobs(self, number: int, kind: str) -> list[Job]:
        """The requests of a round; each kind has a first token of its own, as a cached prompt would save time."""
        options, first = self._options, 1 + list(KINDS).index(kind)
        text = Path(options.text or __file__).read_text(errors="replace")
        ids = read_tokenizer(options.model).encode(text, verbose=False)
        jobs = random_jobs([ids], options.at_once, options.input_len, 1, options.seed + number)
        return [Job((first, *job.prompt_ids[1:]), options.output_len) for job in jobs]


def _ttft_s(connection: HTTPConnection, prompt_ids: Sequence[int]) -> float:
    """Seconds until the first token of an answer is here, by a client that does little itself."""
    body = {"model": NAME, "prompt": prompt_ids, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "stream": True}
    encoded = json.dumps(body)
    start_s = time.perf_counter()
    connection.request("POST", "/v1/completions", encoded, {"Content-Type": "application/json"})
    response = connection.getresponse()
    line = response.readline()
    seconds = time.perf_counter() - start_s
    rest = response.read()
    _check([None if response.status == 200 else (line + rest).decode()])
    return seconds


def _check(errors: Iterable[str | None]) -> None:
    if failed := [error for error in errors if error]:
        raise UserError(f"a request failed: {failed[0]}")


HEADER = ("", "goal", "reached", "noise")


def goals(parts: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """What is to be reached, what was, and the same of requests that do not differ."""
    lines = []
    if "costs" in parts:
        rows = parts["costs"]["rows"]
        for kind, goal in (("JSON schema", "10 %"), ("routed experts", "2 %")):
            for name, key, sign in (("tokens/s", "tokens_per_s", -1), ("CPU time", "cpu_s_per_token", 1)):
                cells = (_cost(ratios(rows, key, one, "plain"), sign) for one in (kind, "plain again"))
                lines.append((f"{kind}: {name}", f"costs at most {goal}" if sign < 0 else "", *cells))
    for part, model in (("prefix", "this model"), ("large", "prompts that take time")):
        if part in parts:
            rows = parts[part]["rows"]
            cells = (_spread(ratios(rows, "ttft_s", kind, "new")) for kind in ("repeated", "new again"))
            new_ms = 1e3 * median(row["ttft_s"] for row in rows if row["kind"] == "new")
            lines.append((f"TTFT of a repeated prefix, {model} ({new_ms:.0f} ms new)", "0.4 x", *cells))
    if "n" in parts:
        one, four = parts["n"]["rows"]
        reached = f"{four['computed']}, of one {one['computed']}"
        lines.append((f"tokens computed of a prompt of {four['prompt']}, four answers", "once", reached, ""))
    for row in parts["masks"]["rows"] if "masks" in parts else ():
        name = f"JSON schema of {row['vocab_size']:,} tokens, {row['at_once']} at once: CPU time of a step"
        free_s = row["free_s"]
        added, noise = (f"{1e3 * (row[kind] - free_s):+.2f} ms" for kind in ("grammar_s", "again_s"))
        lines.append((name, "", f"{added} ({1e3 * free_s:.2f} without)", noise))
    return [(line[0], line[1], line[2], line[3]) for line in lines]


def ratios(rows: Sequence[Mapping[str, Any]], key: str, kind: str, base: str) -> list[float]:
    """The figure of a kind by that of another in the same round."""
    values = {(row["round"], row["kind"]): row[key] for row in rows}
    rounds = dict.fromkeys(row["round"] for row in rows)
    return [values[number, kind] / values[number, base] for number in rounds]


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, between the ends of the interval that it lies in with 95 %, whatever the values are drawn from.

    So many of the values lie below the median as of coins show heads; few values give the smallest and the largest.
    """
    ordered = sorted(values)
    at = max(int(len(ordered) / 2 - 0.98 * len(ordered) ** 0.5), 0)
    return ordered[at], median(ordered), ordered[-1 - at]


def _cost(values: Sequence[float], sign: int) -> str:
    """By how many percent something is dearer."""
    low, middle, high = sorted(100 * sign * (value - 1) for value in median_interval(values))
    return f"{middle:+.1f} % ({low:+.1f} .. {high:+.1f})"


def _spread(values: Sequence[float]) -> str:
    low, middle, high = median_interval(values)
    return f"{middle:.2f} x ({low:.2f} .. {high:.2f})"
