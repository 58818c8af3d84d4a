"""A server under many clients that come and go: nothing lost, nothing wrong, nothing leaked.

    python -m bench soak --model runs/demo/model --num-ranks 4
    python -m bench soak --model DIR --placement FILE --num-requests 2000 --max-concurrency 64 --json OUT.json

Requests of mixed lengths in fp32, greedy; a third of the clients leave in the middle of their answer. Every answer is
compared with the dense model's `generate`, those of clients that left as far as they were received. A difference is
wrong where the dense model prefers its own token by more than 1e-3; after a smaller margin answers may part. Memory is
the resident size of all of the server's processes, as medians over a tenth of the requests: after the first three
tenths, when allocators have grown to what mixed batches take, and at the end.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.options import bench_parser, check_positive
from bench.result import result_document
from bench.serving.load_generator import Answer, Job, drive, random_jobs
from bench.serving.local_client import local_client
from bench.serving.server_process import NAME, server
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.model.load.whole_model import load_whole_model

MARGIN = 1e-3  # of logits
NUM_KINDS = 100  # different requests; the dense model answers each once
WARM_UP = 0.3  # of the requests
MAX_GROWTH = 0.03


def parser() -> argparse.ArgumentParser:
    made = bench_parser("soak", __doc__)
    made.add_argument("--model", required=True, help="directory of the checkpoint")
    made.add_argument("--num-ranks", type=int, default=4, help="processes of the server")
    made.add_argument("--strategy", default=None, help="as of the server; default: the placement's, or standard")
    made.add_argument("--placement", default=None, help="placement.json in native formats; default: the strategy's own")
    made.add_argument("--num-requests", type=int, default=2000, help="in all")
    made.add_argument("--max-concurrency", type=int, default=64, help="requests under way at once")
    made.add_argument("--input-len", type=int, default=64, help="mean tokens of a prompt")
    made.add_argument("--output-len", type=int, default=24, help="mean tokens of an answer")
    made.add_argument("--seed", type=int, default=0, help="of the requests")
    made.add_argument("--json", default=None, help="write the findings there")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the soak; 0 if all is well, 1 if not.

    Raises:
        UserError: an option makes no sense, or the server does not start.
    """
    options = parser().parse_args(argv)
    check_positive(options, "num_ranks", "num_requests", "max_concurrency", "input_len", "output_len")
    if options.json:
        check_writable(options.json)
    findings = run(options)
    if options.json:
        write_json(options.json, result_document("soak", argv, options, **findings))
    print(json.dumps(findings, indent=1))
    return 0 if findings["is_well"] else 1


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Start a server, send all requests, and return the findings."""
    tokenizer = read_tokenizer(options.model)
    model = load_whole_model(options.model, torch.float32, torch.device("cpu"))
    model.generation_config.eos_token_id = None  # clients ask to go on after end tokens
    kinds = kinds_of(tokenizer, NUM_KINDS, options.input_len, options.output_len, options.seed)
    expected = {job: dense_answer(model, job) for job in kinds}
    placed = [] if options.placement is None else ["--placement", options.placement]
    placed += [] if options.strategy is None else ["--strategy", options.strategy]
    arguments = ["--model", options.model, "--dtype", "float32", "--device", "cpu", *placed]
    log = Path(mkdtemp(prefix="rq_ep-bench-soak-")) / "server.log"
    with server(options.num_ranks, arguments, log) as (url, process):
        jobs = jobs_of(kinds, options.num_requests, options.seed)
        return soak(url, NAME, process, jobs, expected, tokenizer, options.max_concurrency)


def soak(
    url: str,
    name: str,
    process: psutil.Process,
    jobs: Sequence[Job],
    expected: dict[Job, list[tuple[int, float]]],
    tokenizer: PreTrainedTokenizerBase,
    max_concurrency: int,
) -> dict[str, Any]:
    """Send all requests to a server and return the findings.

    Args:
        url: of the server, which computes in fp32.
        name: of its model.
        process: its launcher, whose children are counted.
        jobs: what to ask.
        expected: the dense model's answer to each job whose client stays: tokens, and how clearly it prefers each.
        tokenizer: of the model.
        max_concurrency: requests under way at once.
    """
    num_processes = len(process.children(recursive=True))
    sizes: list[int] = []

    def weigh(_: Answer) -> None:
        if len(sizes) % 10 == 0:
            print(f"{len(sizes)} of {len(jobs)} requests", end="\r", file=sys.stderr, flush=True)
        sizes.append(sum(child.memory_info().rss for child in process.children(recursive=True)))

    start_s = time.monotonic()
    answers = asyncio.run(drive(url, name, jobs, max_concurrency=max_concurrency, on_answer=weigh))
    duration_s = time.monotonic() - start_s
    lost = [answer for answer in answers if answer.error or not (answer.is_complete or answer.left)]
    wrong = [answer for answer in answers if not is_right(answer, expected, tokenizer)]
    tenth = max(len(jobs) // 10, 1)
    warm = int(WARM_UP * len(jobs))
    before, after = statistics.median(sizes[warm : warm + tenth]), statistics.median(sizes[-tenth:])
    findings: dict[str, Any] = {
        "num_requests": len(jobs),
        "num_left": sum(answer.left for answer in answers),
        "num_lost": len(lost),
        "num_wrong": len(wrong),
        "errors": sorted({answer.error for answer in lost if answer.error})[:3],
        "num_tokens": sum(len(answer.token_s) for answer in answers),
        "duration_s": duration_s,
        "memory_bytes": {"after warm-up": before, "at the end": after, "growth": after / before - 1},
        "num_processes": [num_processes, len(process.children(recursive=True))],
        "num_unfinished": _unfinished(url),
    }
    is_well = not lost and not wrong and after / before - 1 <= MAX_GROWTH
    return {
        **findings,
        "is_well": is_well and num_processes == findings["num_processes"][1] and not findings["num_unfinished"],
    }


def kinds_of(
    tokenizer: PreTrainedTokenizerBase, num_kinds: int, input_len: int, output_len: int, seed: int
) -> list[Job]:
    """Different jobs, with prompts cut out of this program."""
    return random_jobs([tokenizer.encode(Path(__file__).read_text())], num_kinds, input_len, output_len, seed)


def jobs_of(kinds: Sequence[Job], num_jobs: int, seed: int) -> list[Job]:
    """Jobs drawn from the kinds; the clients of a third of them leave before the end, if there is a before."""
    draw = random.Random(seed + 1)
    jobs = [draw.choice(kinds) for _ in range(num_jobs)]
    leaving = set(draw.sample(range(num_jobs), num_jobs // 3))
    return [
        replace(job, leaves_after=draw.randint(1, max(job.max_tokens - 1, 1))) if at in leaving else job
        for at, job in enumerate(jobs)
    ]


@torch.no_grad()
def dense_answer(model: PreTrainedModel, job: Job) -> list[tuple[int, float]]:
    """The dense model's greedy tokens, each with the margin of its logit over the next best."""
    prompt = torch.tensor([job.prompt_ids])
    generating: Any = model  # whose `generate` has no types
    out = generating.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=job.max_tokens, do_sample=False,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.stack(out.logits, 1)[0].topk(2, dim=-1).values
    tokens = out.sequences[0, len(job.prompt_ids) :].tolist()
    return list(zip(tokens, (best[:, 0] - best[:, 1]).tolist(), strict=True))


def is_right(answer: Answer, expected: dict[Job, list[tuple[int, float]]], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether an answer, as far as it was received, is the dense model's up to the first token of doubtful margin."""
    dense = expected[replace(answer.job, leaves_after=None)]
    if answer.is_complete and answer.num_tokens != len(dense):
        return False
    certain = next((at for at, (_, margin) in enumerate(dense) if margin <= MARGIN), len(dense))
    whole = str(tokenizer.decode([token for token, _ in dense], skip_special_tokens=True))
    sure = str(tokenizer.decode([token for token, _ in dense[:certain]], skip_special_tokens=True)).rstrip("\ufffd")
    if certain == len(dense):
        return whole == answer.text if answer.is_complete else whole.startswith(answer.text)
    length = min(len(sure), len(answer.text))
    return answer.text[:length] == sure[:length]


def _unfinished(url: str) -> int:
    """Requests left in the server a second after the last client has gone."""
    time.sleep(1)
    with local_client(url) as client:
        lines = client.get("/metrics").text.splitlines()
    values = [line.rpartition(" ")[2] for line in lines if line.startswith("rq_ep_num_requests_unfinished{")]
    return int(float(values[0]))
