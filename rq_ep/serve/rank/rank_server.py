"""One rank of the server: load, run the engine, and end when the HTTP process or a signal says so."""

import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple
from typing import Any

from transformers import PreTrainedModel

from rq_ep.config import ServeConfig
from rq_ep.core.errors import UserError
from rq_ep.engine.engine import Engine, EngineConfig
from rq_ep.engine.requests import Output, Request, Sampling
from rq_ep.engine.servable import set_attention
from rq_ep.engine.step_agreement import is_consequence
from rq_ep.model.load.load_model import load
from rq_ep.model.load.load_report import report_of
from rq_ep.model.load.memory import expert_bytes
from rq_ep.parallel import TorchGroup
from rq_ep.parallel.host import keep_freed_memory, short_collections
from rq_ep.serve.control import Link, Message
from rq_ep.serve.rank.check_inputs import check_inputs, choose_max_model_len, chosen_strategy
from rq_ep.serve.rank.http_parent import Front
from rq_ep.serve.rank.load_totals import LoadTotals
from rq_ep.serve.rank.startup import agree, on_every_rank, refuse
from rq_ep.serve.rank.startup_log import document, report
from rq_ep.serve.rank.trace_recording import TraceRecording

TICK_S = 0.2
STATS_EVERY_S = 1.0
VERDICT_TIMEOUT_S = 5.0
EXIT_FAILURE = 1


def serve(config: ServeConfig, front: Front | None, problem: str | None) -> int:
    """Serve until told to stop; every rank calls this. Returns the exit status, the same on every rank.

    A failure while serving ends the process from within: other ranks must not be left waiting in a collective.

    Args:
        config: the same on every rank.
        front: the HTTP process, on rank 0.
        problem: why rank 0 could not start it.
    """
    group = TorchGroup.from_environment(config.device, timeout_s=config.rank_timeout)
    status = 0
    try:
        agree(group, problem)
        address, token = group.all_gather_object(front and (front.address, front.token))[0]
        link = Link(address, group.rank, token) if front is None else front.link
        try:
            RankServer(config, group, link).run()
        finally:
            link.close()
    except UserError as error:
        status = refuse(error, group.rank)
        if front is not None:
            front.close()
        group.barrier()  # launchers end the other ranks once one has left: all leave together, rank 0 having spoken
    finally:
        group.close()
    return status


class RankServer:
    """A rank whose group has met: its engine, and its line to the HTTP process."""

    def __init__(self, config: ServeConfig, group: TorchGroup, link: Link) -> None:
        self.config = config
        self.group = group
        self.link = link
        self.loads = LoadTotals() if group.rank == 0 else None
        self.told_steps = (0, 0.0)
        self.stop = threading.Event()
        self.num_signals = 0
        self.engine: Engine | None = None

    def run(self) -> None:
        """Load and serve until told to stop.

        Raises:
            UserError: the checkpoint, the placement or a setting does not do, on every rank alike.
        """
        self.link.listen(self.hear, self.lose_front)
        try:
            engine = self.engine = self._start()
            with self._signals(), short_collections():
                self._attend()
                engine.stop()
        except UserError:
            raise
        except BaseException as error:
            self.fail(error)

    def _start(self) -> Engine:
        started_s = time.monotonic()
        model_config = on_every_rank(self.group, lambda: check_inputs(self.config))
        self.link.send({"kind": "checked"})
        model = on_every_rank(self.group, self._load)
        loaded = report_of(model)
        recording = TraceRecording(
            model,
            self.group,
            lambda: engine.batch,
            self.config.record_dir,
            self.config.record_max_tokens,
            self.link.send,
        )
        engine = Engine(
            model,
            loaded.layers,
            self.group,
            EngineConfig(self.config.max_num_seqs, self.config.max_num_batched_tokens, self.config.kv_cache_tokens),
            on_outputs=self.tell,
            on_failure=self.fail,
            on_mark=recording.mark,
        )
        rooms = self.group.all_gather_object(engine.max_request_tokens)
        max_model_len = on_every_rank(self.group, lambda: choose_max_model_len(self.config, model_config, min(rooms)))
        engine.start()
        if self.group.rank == 0:
            layout = loaded.layers[0].family.layout
            bytes_R = [expert_bytes(loaded.placement, layout, [rank]) for rank in range(self.group.size)]
            report(model, self.group, bytes_R, max_model_len, time.monotonic() - started_s)
            vocab_size = model.get_input_embeddings().weight.shape[0]
            self.link.send(
                {
                    "kind": "ready",
                    "max_model_len": max_model_len,
                    "vocab_size": vocab_size,
                    "expert_bytes": bytes_R,
                    "placement": document(loaded.placement),
                    "info": {
                        "backend": self.group.backend,
                        "device": str(self.group.device),
                        "dtype": str(model.dtype),
                    },
                }
            )
        return engine

    def _load(self) -> PreTrainedModel:
        config = self.config
        if self.group.device.type == "cpu":
            keep_freed_memory()
        model = load(
            config.model,
            config.placement,
            chosen_strategy(config),
            group=self.group,
            dtype=config.dtype,
            packed_experts=config.experts,
            machine=config.machine,
            telemetry=self.loads,
            max_tokens=config.max_num_batched_tokens,
            max_dispatch_bytes=config.max_dispatch_bytes,
        )
        set_attention(model, config.attn_implementation)
        return model

    def _attend(self) -> None:
        """Wait for the end; meanwhile pass on signals and figures."""
        asked = False
        told_s = 0.0
        while not self.stop.wait(TICK_S):
            if self.num_signals and not asked:
                asked = True
                self.link.send({"kind": "drain", "timeout_s": self.config.shutdown_timeout})
            if time.monotonic() - told_s >= STATS_EVERY_S:
                told_s = time.monotonic()
                self._send_stats()

    def _send_stats(self) -> None:
        assert self.engine is not None
        engine, told = self.engine, self.told_steps
        self.told_steps = engine.steps
        stats: Message = {
            "num_running": engine.num_running,
            "num_waiting": engine.num_waiting,
            "kv_cache_usage": engine.kv_cache_usage,
            "place": asdict(engine.progress),
            "num_steps": self.told_steps[0] - told[0],
            "steps_s": self.told_steps[1] - told[1],
        }
        if self.loads is not None:
            stats["loads"] = self.loads.take()
        self.link.send({"kind": "stats", **stats})

    # On the engine's thread

    def tell(self, outputs: list[Output]) -> None:
        self.link.send({"kind": "outputs", "outputs": [astuple(output) for output in outputs]})

    def fail(self, error: BaseException) -> None:
        """End this process, and with it the group. Who is to blame, the HTTP process knows: `hear` gets its answer."""
        consequence = is_consequence(error)
        if not consequence:
            traceback.print_exception(error)
        text = f"{type(error).__name__}: {error}"
        self.link.send({"kind": "failed", "text": text, "is_consequence": consequence})
        time.sleep(VERDICT_TIMEOUT_S)
        end(f"rank {self.group.rank}: {text}")

    def abort(self, signal_name: str) -> None:
        """End at once, as asked by a second signal; clients are told that, and not that a rank died."""
        self.link.send({"kind": "aborted", "signal": signal_name})
        end(f"rank {self.group.rank}: aborted by a second {signal_name}")

    # On the link's thread

    def hear(self, message: Message) -> None:
        if message["kind"] == "abort":
            end(None)
        if message["kind"] == "stop":
            self.stop.set()
        engine = self.engine
        if engine is None:
            return
        if message["kind"] == "add":
            fields = message["request"]
            engine.submit(Request(**{**fields, "sampling": Sampling(**fields["sampling"])}))
        if message["kind"] == "mark":
            engine.mark(message["number"])
        if message["kind"] == "cancel":
            engine.cancel(message["id"])
        if "num_announced" in message:
            engine.wake(message["num_announced"])

    def lose_front(self) -> None:
        if not self.stop.is_set():
            end(f"rank {self.group.rank}: the HTTP process has died" if self.group.rank == 0 else None)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT asks to drain, whichever rank it reaches; the second one aborts."""

        def handle(number: int, frame: Any) -> None:
            self.num_signals += 1
            if self.num_signals > 1:
                # On a thread: this one may hold the link's lock just now.
                threading.Thread(target=self.abort, args=(signal.Signals(number).name,), daemon=True).start()

        if threading.current_thread() is not threading.main_thread():
            yield  # a caller that runs us elsewhere keeps its signals
            return
        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def end(reason: str | None) -> None:
    """End this process at once, as the rest of it may be stuck in a collective."""
    if reason is not None:
        os.write(2, f"rq_ep.serve: error: {reason}\n".encode())
    os._exit(EXIT_FAILURE)
