"""The HTTP process: started by rank 0, it ends with the ranks. Parsing and streaming never delay a step here."""

import asyncio
import json
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import uvicorn

from rq_ep.config import ServeConfig, from_mapping, shown
from rq_ep.serve.control import Message
from rq_ep.serve.http.app import make_app
from rq_ep.serve.http.history import EVERY_S, History
from rq_ep.serve.http.metrics import Metrics
from rq_ep.serve.http.rank_router import Hub, listen
from rq_ep.serve.http.record_routes import Recorder
from rq_ep.serve.http.service import Served, Service
from rq_ep.serve.leave import leave
from rq_ep.serve.logs import set_up_logging

log = logging.getLogger("rq_ep.serve")

STATS_EVERY_S = 10.0


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: rank 0 says when to end, and uvicorn would re-raise SIGTERM afterwards."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run(config: ServeConfig, num_ranks: int, token: str, http: socket.socket, hub_socket: socket.socket) -> None:
    """Serve until the ranks have ended."""
    checked, ended = asyncio.Event(), asyncio.Event()
    metrics = Metrics(config.model_name, lambda: hub.num_unfinished)

    def on_ready(message: Message) -> None:
        service.served = Served(message["max_model_len"], message["vocab_size"])
        service.info |= message["info"]
        service.placement = message["placement"]
        metrics.weights(message["expert_bytes"])

    def on_stats(rank: int, message: Message) -> None:
        metrics.rank(rank, message)
        if (loads := message.get("loads")) is not None:
            metrics.loads(loads)
            service.balance.add(loads)

    hub = Hub(
        num_ranks,
        token,
        max_queue_size=config.max_queue_size,
        stall_s=config.stall_timeout,
        on_checked=checked.set,
        on_ready=on_ready,
        on_stats=on_stats,
        on_recorded=lambda message: recorder.hear(message),
        on_end=ended.set,
    )
    recorder = Recorder(hub.mark, config.record_dir, config.record_max_tokens)
    service = Service(config.model_name, config.seed, hub, metrics, recorder)
    service.info = {
        "settings": shown(config),
        "num_ranks": num_ranks,
        "versions": {name: version(name) for name in ("rq_ep", "torch", "transformers")},
    }
    app = make_app(service, config.max_body_bytes, config.api_key)
    server = Server(
        uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    )
    await listen(hub, hub_socket)
    serving = asyncio.ensure_future(server.serve(sockets=[http]))
    reporting = asyncio.ensure_future(report(metrics, hub))
    watching = asyncio.ensure_future(hub.watch())
    sampling = asyncio.ensure_future(sample(service.history, hub))
    ending = asyncio.ensure_future(ended.wait())
    checking = asyncio.ensure_future(checked.wait())
    await asyncio.wait({serving, ending, checking}, return_when=asyncio.FIRST_COMPLETED)
    if checked.is_set():
        service.tokenizer = await asyncio.to_thread(load_tokenizer, config.model)
        await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    for task in (checking, ending, reporting, sampling, watching):
        task.cancel()


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint that a rank has found in order."""
    from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer  # slow: /health does not wait for it

    return read_tokenizer(path)


async def sample(history: History, hub: Hub) -> None:
    """Keep the history that the dashboard draws."""
    while True:
        await asyncio.sleep(EVERY_S)
        history.sample(hub.num_unfinished)


async def report(metrics: Metrics, hub: Hub) -> None:
    """One line of figures every ten seconds, only while there is something to tell."""
    told = (0, 0)
    while True:
        await asyncio.sleep(STATS_EVERY_S)
        now = (metrics.num_prompt_tokens, metrics.num_generated_tokens)
        if now != told:
            prompt_rate, rate = ((new - old) / STATS_EVERY_S for new, old in zip(now, told, strict=True))
            balance = "" if metrics.balancedness is None else f", balancedness {metrics.balancedness:.3f}"
            fullest = max(metrics.kv_usage_R.values(), default=0.0)
            log.info(
                "prompt %.1f tokens/s, generated %.1f tokens/s, %d unfinished requests, KV cache %.0f %% full%s",
                prompt_rate, rate, hub.num_unfinished, 100 * fullest, balance,
            )  # fmt: skip
        told = now


def main() -> None:
    # Ctrl-C and a launcher's SIGTERM reach the whole process group; rank 0 alone decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    told = json.load(sys.stdin)
    config = from_mapping(ServeConfig, told["config"])
    set_up_logging(config.log_level)
    http = socket.socket(fileno=told["http_fd"])
    hub = socket.socket(fileno=told["hub_fd"])
    asyncio.run(run(config, told["num_ranks"], told["token"], http, hub))


if __name__ == "__main__":
    main()
    leave(0)
