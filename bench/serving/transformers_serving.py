"""Transformers' own continuous batching over its own tensor and expert parallelism, as a peer of the server.

It has no HTTP server that spans ranks: it gets lists of requests and returns its throughput. Each rank of its
group holds a part of every layer's attention heads and experts, and all of them step through one batch.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from bench.serving.load_generator import Job, latencies_ms
from bench.serving.server_process import pin_ranks
from rq_ep.config import child_environment
from rq_ep.core.errors import UserError

TIMEOUT_S = 120.0
ROOT = Path(__file__).resolve().parents[2]  # of the checkout


class TransformersServing:
    """A group of processes under torchrun, which answer lists of jobs.

    Args:
        options: of `python -m bench serve`.
        log: where the group's output goes.
    """

    def __init__(self, options: argparse.Namespace, log: Path) -> None:
        self._options = options
        self._log = log

    def __enter__(self) -> Self:
        names = ("model", "dtype", "max_num_seqs", "max_num_batched_tokens")
        settings = [
            text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(self._options, name)))
        ]
        with socket.create_server(("127.0.0.1", 0)) as listener, self._log.open("wb") as log:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [
                f"--nproc-per-node={self._options.num_ranks}",
                "-m",
                "bench.serving.transformers_serving",
                *settings,
            ]
            command += ["--port", str(listener.getsockname()[1])]
            environment = {"OMP_NUM_THREADS": "1", **child_environment()}
            paths = [str(ROOT), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # the group may be started from anywhere
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            listener.settimeout(TIMEOUT_S)
            try:
                self._socket = listener.accept()[0]
            except TimeoutError:
                self._process.kill()
                raise UserError(f"--peers transformers: it does not start, see {self._log}") from None
        if self._options.pin:
            pin_ranks(psutil.Process(self._process.pid))
        self._socket.settimeout(TIMEOUT_S)
        self._file = self._socket.makefile("rw")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.terminate()

    def run(self, jobs: Sequence[Job], max_concurrency: int) -> dict[str, Any]:
        """Throughput of all jobs, of which so many are under way at once, and times to their first tokens.

        Raises:
            UserError: the group has ended.
        """
        requests = [[list(job.prompt_ids), job.max_tokens] for job in jobs]
        self._file.write(json.dumps([max_concurrency, requests]) + "\n")
        self._file.flush()
        line = self._file.readline()
        if not line:
            raise UserError(f"--peers transformers: it has ended, see {self._log}")
        duration_s, total_output, ttft_s = json.loads(line)
        total_input = sum(len(job.prompt_ids) for job in jobs)
        return {
            "duration": duration_s,
            "completed": len(jobs),
            "total_input": total_input,
            "total_output": total_output,
            "request_throughput": len(jobs) / duration_s,
            "output_throughput": total_output / duration_s,
            "total_token_throughput": (total_input + total_output) / duration_s,
            **latencies_ms("ttft", [1e3 * seconds for seconds in ttft_s]),
        }


def main() -> None:
    """One rank: answer lists of jobs until the connection ends."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
    from transformers.distributed.configuration_utils import DistributedConfig

    made = argparse.ArgumentParser()
    for name in ("--model", "--dtype"):
        made.add_argument(name, required=True)
    for name in ("--max-num-seqs", "--max-num-batched-tokens", "--port"):
        made.add_argument(name, type=int, required=True)
    options = made.parse_args()
    num_ranks = int(child_environment()["WORLD_SIZE"])
    torch.set_num_threads(1)
    layout = DistributedConfig(tp_size=num_ranks, ep_size=num_ranks, ep_implementation="all_to_all")
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=options.dtype, distributed_config=layout, attn_implementation="sdpa"
    )
    batching = ContinuousBatchingConfig(
        page_size=32,
        num_blocks=512,
        max_batch_tokens=options.max_num_batched_tokens,
        max_requests_per_batch=options.max_num_seqs,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,
        allow_block_sharing=False,
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)
    control = dist.new_group(backend="gloo")  # the managers' threads use the others
    with ExitStack() as stack:
        file: Any = None
        if dist.get_rank() == 0:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", options.port)))
            file = stack.enter_context(connection.makefile("rw"))
        while True:
            message = [file.readline() if file else None]
            dist.broadcast_object_list(message, group=control)
            if not message[0]:
                break
            # A new manager for each list: left idle, one was seen to hang on its next request.
            manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=batching)
            manager.start()
            if file:
                file.write(json.dumps(answer(manager, *json.loads(message[0]))) + "\n")
                file.flush()
            dist.barrier(group=control)
            manager.stop(block=True)
    dist.destroy_process_group()


def answer(manager: Any, max_concurrency: int, jobs: Sequence[Sequence[Any]]) -> tuple[float, int, list[float]]:
    """Seconds and tokens of all jobs, and the seconds to the first token of each."""
    start_s = time.perf_counter()
    waiting = iter(enumerate(jobs))
    sent_s: dict[str, float] = {}

    def submit_next() -> None:
        for number, (prompt_ids, max_tokens) in islice(waiting, 1):
            sent_s[str(number)] = time.perf_counter()
            manager.add_request(prompt_ids, str(number), max_tokens, record_timestamps=True)

    for _ in range(max_concurrency):
        submit_next()
    num_tokens = 0
    ttft_s = []
    for _ in jobs:
        result = manager.get_result(timeout=TIMEOUT_S)
        assert result is not None
        assert result.error is None, result.error
        num_tokens += len(result.generated_tokens)
        ttft_s.append(result.timestamps[0] - sent_s[result.request_id])
        submit_next()
    return time.perf_counter() - start_s, num_tokens, ttft_s


if __name__ == "__main__":
    main()
