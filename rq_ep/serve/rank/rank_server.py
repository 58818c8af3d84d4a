"""One rank of the server: load, run the engine, and end when the HTTP process or a signal says so."""

import threading
import time
import traceback
from contextlib import suppress
from typing import NoReturn

from rq_ep.config import ServeConfig
from rq_ep.core.errors import UserError
from rq_ep.engine.progress import MoverProgress
from rq_ep.engine.step_agreement import is_consequence
from rq_ep.model.load.memory import free_bytes
from rq_ep.parallel import RankFailure, TorchGroup
from rq_ep.parallel.agreement import report_user_error
from rq_ep.parallel.host import short_collections
from rq_ep.parallel.processes.first_members import FirstMeeting
from rq_ep.parallel.processes.world import RendezvousError
from rq_ep.serve.control import ControlClient
from rq_ep.serve.messages import Abort, DrainRequest, Loaded, MessageError, Stop, ToRank
from rq_ep.serve.process import exit_failed, print_user_error, thread_errors_to
from rq_ep.serve.rank.early_end import EarlyEnd
from rq_ep.serve.rank.group_start import start_group
from rq_ep.serve.rank.loaded_rank import LoadedRank, load_rank
from rq_ep.serve.rank.rank_loader import log_ready, ready_message
from rq_ep.serve.rank.stats_sampler import StatsSampler
from rq_ep.serve.supervisor.rank_start import HubAddress, Rejoin

TICK_S = 0.2
POLL_S = 0.01
REBALANCING_TICK_S = 0.02
STATS_EVERY_S = 1.0


def serve(
    config: ServeConfig,
    hub: HubAddress | None,
    problem: str | None,
    early_end: EarlyEnd,
    rejoin: Rejoin | None = None,
) -> int:
    """Serve until asked to stop; every rank calls this. Returns the exit status, the same on every rank.

    A failure while serving ends the process from within: other ranks must not be left waiting in a collective.

    Args:
        config: the same on every rank.
        hub: the HTTP process, on rank 0.
        problem: why it could not be started.
        early_end: ends this process.
        rejoin: the group serves, and this rank joins it.
    """
    status = 0
    try:
        group, hub, problem, joins_later, meeting = start_group(config, hub, problem, early_end, rejoin)
    except RendezvousError as error:
        return print_user_error(error)
    except RankFailure as error:
        fail(early_end, error)
    try:
        if problem is not None:
            raise UserError(problem)
        assert hub is not None
        client = early_end.client = early_end.client or ControlClient(hub.address, group.rank, hub.token)
        try:
            server = RankServer(config, group, client, hub, early_end, joins_later, meeting)
            with thread_errors_to(server.fail):
                server.run()
        finally:
            client.close()
    except UserError as error:
        if joins_later:  # the others go on: it may be tried again
            early_end.fail(str(error))
        early_end.signals.is_ending = True  # the launcher sends one once another rank has ended by the same error
        status = report_user_error(group, "rq_ep.serve", error)
    finally:
        group.close()
    return status


def fail(early_end: EarlyEnd, error: BaseException) -> NoReturn:
    """End this process with an error, on whichever thread it was raised."""
    consequence = is_consequence(error)
    if not consequence:
        with suppress(OSError):
            traceback.print_exception(error)
    early_end.fail(f"{type(error).__name__}: {error}", consequence)


class RankServer:
    """The life of a rank whose group has met, as the HTTP process sees it.

    Args:
        config: the same on every rank.
        group: the ranks that have met, or this one alone.
        client: the connection to the HTTP process.
        hub: where it leads.
        early_end: ends this process.
        joins_later: the others serve already, and this rank joins them when it has loaded.
        meeting: where ranks come that the group does not wait for; None: it has waited for all.
    """

    def __init__(
        self,
        config: ServeConfig,
        group: TorchGroup,
        client: ControlClient,
        hub: HubAddress,
        early_end: EarlyEnd,
        joins_later: bool = False,
        meeting: FirstMeeting | None = None,
    ) -> None:
        self._config = config
        self._group = group
        self._client = client
        self._hub = hub
        self._early_end = early_end
        self._joins_later = joins_later
        self._meeting = meeting
        self._rank: LoadedRank | None = None
        self._is_stopping = threading.Event()  # the HTTP process has said so: its end, and the others', are expected

    def run(self) -> None:
        """Load and serve until asked to stop.

        Raises:
            UserError: the checkpoint, the placement or a setting is at fault, on every rank alike.
        """
        self._client.listen(self._handle, self._on_close, self._on_malformed)
        try:
            rank = self._start()
            with short_collections():
                if self._joins_later:
                    self._offer_to_join(rank)
                self._serve(rank)
                rank.stop()
        except UserError:
            raise
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End this process with an error; another rank that ends as the server stops is none."""
        if not (self._is_stopping.is_set() and is_consequence(error)):
            fail(self._early_end, error)

    def _start(self) -> LoadedRank:
        """Load the model, and start to make steps with the ranks of the group."""
        started_s = time.monotonic()
        group = self._group
        # Messages are taken before the ranks meet below: once one says that all are ready, requests may come to any.
        rank = self._rank = load_rank(self._config, group, self._client.send, self.fail, joins_later=self._joins_later)
        if rank.recovery is not None and not self._joins_later:
            self._send_loaded()
        max_model_len = rank.max_model_len(group)
        rank.engine.start()
        self._early_end.serving(self._hub)
        if group.rank == 0 and not self._joins_later:
            ready = ready_message(rank.model, group, max_model_len, rank.engine.routes_evenly)
            log_ready(ready, rank.model, group, rank.checked.cache, time.monotonic() - started_s, rank.engine.warmup_s)
            self._client.send(ready)
            if self._meeting is not None:
                self._meeting.invite()
        return rank

    def _offer_to_join(self, rank: LoadedRank) -> None:
        """Say that the others may take this rank in: from then on they wait for whatever it still has to do."""
        while rank.engine.progress.step == 0:
            time.sleep(POLL_S)
        self._send_loaded()

    def _send_loaded(self) -> None:
        self._client.send(Loaded(self._group.open_store(), free_bytes(self._group.device)))

    def _serve(self, rank: LoadedRank) -> None:
        """Wait for the end; meanwhile pass on a signal, have experts moved, and send statistics."""
        rebalancing = rank.rebalancing
        mover = MoverProgress if rebalancing is None else rebalancing.progress
        sampler = StatsSampler(rank.engine, rank.loads.totals, self._group.device, mover)
        tick_s = TICK_S if rank.loads.steps is None else REBALANCING_TICK_S
        has_asked, sampled_s = False, 0.0
        while not self._is_stopping.wait(tick_s):
            if rebalancing is not None:
                rebalancing.tick()
            if self._early_end.signals.are_received and not has_asked:
                has_asked = True
                self._client.send(DrainRequest(self._config.shutdown_timeout))
            if time.monotonic() - sampled_s >= STATS_EVERY_S:
                sampled_s = time.monotonic()
                self._client.send(sampler.sample())

    # On the thread of the connection

    def _handle(self, message: ToRank) -> None:
        match message:
            case Abort():
                exit_failed(None)
            case Stop():
                self._is_stopping.set()
                if self._rank is not None and self._rank.recovery is not None:
                    self._rank.recovery.stop()
            case _:
                if self._rank is None:
                    raise MessageError("a message for the model before there is one")
                self._rank.inbox.take(message)

    def _on_close(self) -> None:
        if not self._is_stopping.is_set() and not self._early_end.is_failing:
            exit_failed(f"rank {self._group.rank}: the HTTP process has died" if self._group.rank == 0 else None)

    def _on_malformed(self, error: MessageError) -> None:
        exit_failed(f"rank {self._group.rank}: the HTTP process sent {error}")
