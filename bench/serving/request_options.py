"""What options of requests cost, and what their likeness saves, on one server.

    python -m bench options --model runs/demo/model --json OUT.json
    python -m bench options --model DIR --num-ranks 2 --parts costs --rounds 40 --json OUT.json

Three parts; `--parts` runs some of them, and keeps the others of an earlier `--json FILE`:

costs   Tokens per second, and CPU time of the server per token, of answers that follow a JSON schema and of such as
        come with their routed experts, beside plain ones: the same requests, all of one kind at once, kinds in turns.
prefix  Time to the first token of a prompt whose prefix an earlier one had, beside new ones, one request at a time.
n       Tokens of prompts that are computed for one answer and for four, by the routed pairs that the server counts.

Ratios are medians over rounds of the ratio to the plain kind in the same round. One kind is plain a second time: its
ratio is the noise. Client and server share the machine.
"""

import argparse
import asyncio
import base64
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import median
from tempfile import mkdtemp
from typing import Any

import httpx
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from bench.serving.load_generator import TIMEOUT_S, Job, ask, drive, figures, random_jobs
from bench.serving.parts import run_parts
from bench.serving.server_process import NAME, server
from rq_ep.commands.console import wide_console
from rq_ep.core.errors import UserError, check_choice, check_integer
from rq_ep.core.files.documents import check_writable
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer

PARTS = ("costs", "prefix", "n")
SETTLE_S = 1.3  # until the last steps are reported
TAIL_TOKENS = 16  # behind a prefix, of their own in each prompt
# A text that is longer than any answer here, so that all kinds make as many tokens.
SCHEMA = {"type": "object", "properties": {"text": {"type": "string", "minLength": 4096}}, "required": ["text"]}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "plain again": {},
    "JSON schema": {
        "ignore_eos": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "text", "schema": SCHEMA}},
    },
    "routed experts": {"return_routed_experts": True},
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench options", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", required=True, help="directory of the checkpoint")
    made.add_argument("--num-ranks", type=int, default=1, help="processes of the server [1]")
    made.add_argument("--parts", default=",".join(PARTS), help="by commas [all]")
    made.add_argument("--rounds", type=int, default=30, help="of each part, after one of warm-up [30]")
    made.add_argument("--at-once", type=int, default=8, help="requests of a kind at once [8]")
    made.add_argument("--input-len", type=int, default=64, help="mean tokens of a prompt in the part on costs [64]")
    made.add_argument("--output-len", type=int, default=96, help="tokens of an answer there [96]")
    made.add_argument("--prefix-len", type=int, default=400, help="tokens of a prefix [400]")
    made.add_argument("--text", default=None, help="text that prompts are cut from; default: this program's")
    made.add_argument("--seed", type=int, default=0, help="of the prompts [0]")
    made.add_argument("--json", default=None, help="write every figure there")
    return made


def main(argv: Sequence[str]) -> None:
    """Measure the parts; print the table.

    Raises:
        UserError: an option makes no sense, the server does not start, or a request failed.
    """
    options = parser().parse_args(argv)
    asked = [check_choice("part", name, PARTS) for name in options.parts.split(",")]
    for name in ("num_ranks", "rounds", "at_once", "input_len", "output_len", "prefix_len"):
        check_integer(f"--{name.replace('_', '-')}", getattr(options, name), 1)
    if options.json:
        check_writable(options.json)
    log = Path(mkdtemp(prefix="rq_ep-bench-options-")) / "server.log"
    Console(stderr=True).print(f"starting the server (log: {log})")
    arguments = ["--model", options.model, "--log-level", "warning"]
    with server(options.num_ranks, arguments, log) as (url, process):
        bench = Bench(url, process, options)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "costs": bench.costs, "prefix": bench.prefix, "n": bench.several_answers,
        }  # fmt: skip
        result = run_parts("options", argv, options, asked, parts)
    table = Table(*HEADER, title="Options of requests")
    for row in goals(result["parts"]):
        table.add_row(*row)
    wide_console().print(table)


class Bench:
    """The parts, each on the same server.

    Args:
        url: of the server.
        process: its launcher.
        options: of the bench.
    """

    def __init__(self, url: str, process: psutil.Process, options: argparse.Namespace) -> None:
        self._url = url
        self._process = process
        self._options = options
        self._random = random.Random(options.seed)

    def costs(self) -> dict[str, Any]:
        rows = []
        for number in range(self._options.rounds + 1):
            jobs = self._jobs(number)
            for name in KINDS if number % 2 else reversed([*KINDS]):
                cpu_s = self._cpu_s()
                answers = asyncio.run(
                    drive(self._url, NAME, jobs, max_concurrency=self._options.at_once, more=KINDS[name])
                )
                _check(answer.error for answer in answers)
                of_run = figures(answers)
                row = {"round": number, "kind": name, "tokens_per_s": of_run["output_throughput"]}
                row["cpu_s_per_token"] = (self._cpu_s() - cpu_s) / of_run["total_output"]
                assert of_run["total_output"] == len(jobs) * self._options.output_len, "as many tokens of every kind"
                rows.append(row)
        return {"rows": [row for row in rows if row["round"]]}

    def prefix(self) -> dict[str, Any]:
        """A prompt is new, is new again, or begins as the first one of its round."""
        rows = []
        for number in range(self._options.rounds + 1):
            prefixes = {"new": self._ids(self._options.prefix_len), "new again": self._ids(self._options.prefix_len)}
            for name, prefix in {**prefixes, "repeated": prefixes["new"]}.items():
                job = Job((*prefix, *self._ids(TAIL_TOKENS)), 4)
                rows.append({"round": number, "kind": name, "ttft_s": asyncio.run(self._ttft_s(job))})
        return {"rows": [row for row in rows if row["round"]]}

    async def _ttft_s(self, job: Job) -> float:
        async with httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT_S, trust_env=False) as client:
            answer = await ask(client, NAME, job)
        _check([answer.error])
        return answer.token_s[0] - answer.sent_s

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
        response = httpx.post(f"{self._url}/v1/completions", json=body, timeout=TIMEOUT_S, trust_env=False)
        _check([None if response.status_code == 200 else response.text])
        return response.json()

    def _num_pairs(self) -> float:
        time.sleep(SETTLE_S)
        text = httpx.get(f"{self._url}/metrics", trust_env=False).text
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name == "rq_ep_tokens_routed_total")

    def _cpu_s(self) -> float:
        tree = [self._process, *self._process.children(recursive=True)]
        return float(sum(process.cpu_times().user + process.cpu_times().system for process in tree))

    def _ids(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens that no other prompt begins with."""
        return tuple(self._random.choices(range(32, 127), k=num_tokens))

    def _jobs(self, number: int) -> list[Job]:
        options = self._options
        text = Path(options.text or __file__).read_text(errors="replace")
        ids = read_tokenizer(options.model).encode(text, verbose=False)
        jobs = random_jobs([ids], options.at_once, options.input_len, 1, options.seed + number)
        return [Job(job.prompt_ids, options.output_len) for job in jobs]


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
    if "prefix" in parts:
        rows = parts["prefix"]["rows"]
        cells = (_spread(ratios(rows, "ttft_s", kind, "new")) for kind in ("repeated", "new again"))
        lines.append(("TTFT of a repeated prefix", "0.4 x", *cells))
    if "n" in parts:
        one, four = parts["n"]["rows"]
        reached = f"{four['computed']}, of one {one['computed']}"
        lines.append((f"tokens computed of a prompt of {four['prompt']}, four answers", "once", reached, ""))
    return [(line[0], line[1], line[2], line[3]) for line in lines]


def ratios(rows: Sequence[Mapping[str, Any]], key: str, kind: str, base: str) -> list[float]:
    """The figure of a kind by that of another in the same round."""
    values = {(row["round"], row["kind"]): row[key] for row in rows}
    rounds = dict.fromkeys(row["round"] for row in rows)
    return [values[number, kind] / values[number, base] for number in rounds]


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, high = np.percentile(values, (25, 75))
    return float(low), median(values), float(high)


def _cost(values: Sequence[float], sign: int) -> str:
    """By how many percent something is dearer; in brackets the middle half of the rounds."""
    low, middle, high = sorted(100 * sign * (value - 1) for value in _quartiles(values))
    return f"{middle:+.1f} % ({low:+.1f} .. {high:+.1f})"


def _spread(values: Sequence[float]) -> str:
    low, middle, high = _quartiles(values)
    return f"{middle:.2f} x ({low:.2f} .. {high:.2f})"
