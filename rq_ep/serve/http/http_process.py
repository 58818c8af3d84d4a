"""The HTTP process: started by rank 0, it ends with the ranks. Parsing and streaming never delay a step here."""

import asyncio
import gc
import json
import logging
import signal
import socket
import sys
from collections.abc import Mapping
from importlib.metadata import version

from rq_ep.config import ServeConfig, from_mapping, shown
from rq_ep.serve.http import connections
from rq_ep.serve.http.app import make_app
from rq_ep.serve.http.connections import ConnectionLimits, Server, choose_max_connections
from rq_ep.serve.http.metrics import Metrics
from rq_ep.serve.http.ranks import rank_connections
from rq_ep.serve.http.ranks.member_states import MemberState
from rq_ep.serve.http.ranks.rank_router import RankRouter
from rq_ep.serve.http.recording_controller import RecordingController
from rq_ep.serve.http.served_model import ModelLimits, read_served_model
from rq_ep.serve.http.service import Service
from rq_ep.serve.http.views.history import EVERY_S
from rq_ep.serve.http.views.membership_view import MembershipView
from rq_ep.serve.http.views.rebalance_view import RebalanceView
from rq_ep.serve.messages import (
    Checked,
    MigrationPlanned,
    PlacementServed,
    RankStats,
    Ready,
    RebalanceAnswer,
    RebalanceStatus,
    Recorded,
    RecordingFailed,
    RoundServed,
)
from rq_ep.serve.process import exit_quickly, log_repeats_once_a_minute, set_up_logging

log = logging.getLogger("rq_ep.serve")

LOG_EVERY_S = 10.0


class ServingProcess:
    """The parts of the HTTP process, wired together; the observer of its ranks.

    Args:
        config: what is served.
        num_ranks: size of the group.
        token: the secret that ranks show when they connect.
    """

    def __init__(self, config: ServeConfig, num_ranks: int, token: str) -> None:
        self.config = config
        self.num_ranks = num_ranks
        self.checked: asyncio.Future[Checked] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()
        self.router = RankRouter(
            num_ranks,
            token,
            self,
            max_queue_size=config.max_queue_size,
            stall_s=config.stall_timeout,
            survives=config.on_rank_failure == "continue",
        )
        self.metrics = Metrics(config.model_name, lambda: self.router.num_unfinished)
        self.recording = RecordingController(self.router.mark, config.record_dir, config.record_max_tokens)
        is_rebalancing = config.rebalance == "auto"
        self.rebalancing = RebalanceView(self.router.rebalance if is_rebalancing else None)
        if is_rebalancing:
            self.metrics.add_rebalancing(lambda: self.rebalancing.seconds_since_progress)
        members = MembershipView(self.router.membership, self.router)
        self.metrics.count_ranks((state.value for state in MemberState), members.count)
        versions = {name: version(name) for name in ("rq_ep", "torch", "transformers")}
        self.service = Service(
            config.model_name,
            config.seed,
            self.router,
            self.metrics,
            self.recording,
            self.rebalancing,
            members,
            model_root=config.model,
            info={"settings": shown(config), "num_ranks": num_ranks, "versions": versions},
        )

    # What the ranks report

    def on_checked(self, checked: Checked) -> None:
        self.checked.set_result(checked)

    def on_ready(self, ready: Ready) -> None:
        limits = ModelLimits(ready.max_model_len, ready.vocab_size, self.config.max_queue_size, ready.routes_evenly)
        self.service.begin(limits, ready.placement, ready.info)
        self.metrics.weights(ready.expert_bytes)

    def on_stats(self, rank: int, stats: RankStats) -> None:
        self.metrics.rank(rank, stats)
        self.rebalancing.on_progress(rank, stats.mover)
        if stats.loads is not None:
            self.metrics.loads(stats.loads)
            self.service.load_view.add(stats.loads)

    def on_recorded(self, result: Recorded | RecordingFailed) -> None:
        self.recording.end(result)

    def on_rebalance(self, message: RebalanceStatus | RebalanceAnswer) -> None:
        self.rebalancing.take(message)
        if isinstance(message, RebalanceStatus):
            self.metrics.rebalancing(message)

    def on_placement(self, message: MigrationPlanned | RoundServed | PlacementServed) -> None:
        self.service.placement.take(message)
        if isinstance(message, PlacementServed):
            self.rebalancing.on_commit(message.generation)
            self.metrics.weights(message.expert_bytes)

    def on_rank_lost(self, rank: int, was_member: bool) -> None:
        self.metrics.rank_lost(rank, was_member)
        self.rebalancing.forget(rank)

    def on_recovery(self, seconds: Mapping[str, float]) -> None:
        self.metrics.recovery(seconds)

    def on_resumption(self) -> None:
        self.metrics.request_resumed()

    def on_end(self) -> None:
        self.ended.set()

    # The life of the process

    async def run(self, http: socket.socket, control: socket.socket) -> None:
        """Serve until the ranks have ended.

        Args:
            http: bound, for clients.
            control: bound, for ranks.
        """
        config = self.config
        app = make_app(self.service, config.max_body_bytes, config.api_key or (), config.allowed_origins or ())
        max_connections = choose_max_connections(config.max_queue_size, 2 * self.num_ranks)
        server = Server(app, ConnectionLimits(max_connections, config.http_timeout))
        ranks_server = await self.router.listen(control)
        serving = asyncio.ensure_future(server.serve(sockets=[http]))
        ending = asyncio.ensure_future(self.ended.wait())
        for work in (self._read_model(), self._log(), self._sample(), self.router.watch()):
            self.router.tasks.start(work)
        await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
        ending.cancel()
        self.router.tasks.cancel()
        ranks_server.close()

    async def _read_model(self) -> None:
        """Read what requests need of a checkpoint once a rank has found it in order."""
        self.service.take_model(await read_served_model(await self.checked, self.config))
        gc.freeze()  # a collection walks what requests have made, not all modules

    async def _sample(self) -> None:
        """Keep the history that the dashboard draws, and log what is stuck."""
        while True:
            await asyncio.sleep(EVERY_S)
            self.rebalancing.log_stall()
            self.service.history.sample(self.router.num_unfinished)

    async def _log(self) -> None:
        """Log one line of figures every ten seconds, only while tokens come."""
        metrics = self.metrics
        before = (0, 0)
        while True:
            await asyncio.sleep(LOG_EVERY_S)
            now = (metrics.num_prompt_tokens, metrics.num_generated_tokens)
            if now != before:
                prompt_rate, rate = ((new - old) / LOG_EVERY_S for new, old in zip(now, before, strict=True))
                balance = "" if metrics.balancedness is None else f", balancedness {metrics.balancedness:.3f}"
                fullest = max(metrics.kv_usage_R.values(), default=0.0)
                log.info(
                    "prompt %.1f tokens/s, generated %.1f tokens/s, %d unfinished requests, KV cache %.0f %% full%s",
                    prompt_rate, rate, self.router.num_unfinished, 100 * fullest, balance,
                )  # fmt: skip
            before = now


async def serve(config: ServeConfig, num_ranks: int, token: str, http: socket.socket, control: socket.socket) -> None:
    """Serve on bound sockets until the ranks have ended."""
    await ServingProcess(config, num_ranks, token).run(http, control)


def main() -> None:
    # Ctrl-C and a launcher's SIGTERM reach the whole process group; rank 0 alone decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    settings = json.load(sys.stdin)
    config = from_mapping(ServeConfig, settings["config"])
    set_up_logging(config.log_level)
    log_repeats_once_a_minute("uvicorn.error", "asyncio", connections.__name__, rank_connections.__name__)
    http = socket.socket(fileno=settings["http_fd"])
    control = socket.socket(fileno=settings["control_fd"])
    asyncio.run(serve(config, settings["num_ranks"], settings["token"], http, control))


if __name__ == "__main__":
    main()
    exit_quickly(0)
