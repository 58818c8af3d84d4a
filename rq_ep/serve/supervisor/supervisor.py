"""The supervisor of a rank: starts the rank's process, watches it, starts it again, and outlives it.

Launchers end all processes that they have started when one of them ends: this one does not end when the rank does. It
imports neither torch nor transformers.
"""

import logging
import queue
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from math import inf

from rq_ep.config import Environment, ServeConfig
from rq_ep.core.errors import UserError
from rq_ep.serve.control import ControlClient
from rq_ep.serve.frames import Role
from rq_ep.serve.messages import StartRank
from rq_ep.serve.process import EXIT_FAILURE, print_error, signals_to, thread_errors_to, watch_launcher
from rq_ep.serve.supervisor.http_parent import HttpProcess
from rq_ep.serve.supervisor.rank_child import RANK_PROCESS, RankChild
from rq_ep.serve.supervisor.rank_start import EndFailed, HubAddress, Leave, PassSignal, RankStart, Rejoin
from rq_ep.serve.supervisor.supervision import (
    Action,
    CannotGoOn,
    Connect,
    Event,
    Exit,
    HubClosed,
    KillProcess,
    RankExited,
    RankPhase,
    SignalReceived,
    StartProcess,
    Supervision,
)

log = logging.getLogger("rq_ep.serve")


class Supervisor:
    """Runs what `Supervision` decides, for one rank.

    Args:
        config: what to serve.
        environment: of this rank.
        command: the rank's process.
        on_serving: called when the rank serves, with where its group can be joined.
        joined: such a place; the group goes on without this rank, which joins it. None: the group starts.
    """

    def __init__(
        self,
        config: ServeConfig,
        environment: Environment,
        command: Sequence[str] = RANK_PROCESS,
        on_serving: Callable[[HubAddress], None] = lambda hub: None,
        joined: HubAddress | None = None,
    ) -> None:
        self._config = config
        self._environment = environment
        self._command = command
        self._on_serving = on_serving
        self._joined = joined
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._supervision = Supervision(
            environment.rank,
            config.max_rank_restarts,
            config.shutdown_timeout,
            RankPhase.BEGINNING if joined is None else RankPhase.REMOVED,
        )
        self._hub: HubAddress | None = None
        self._client: ControlClient | None = None
        self._child: RankChild | None = None

    def run(self) -> int:
        """Supervise until the group ends. Returns the exit status.

        Raises:
            UserError: the HTTP process cannot be started.
        """
        with (
            signals_to(lambda name: self._events.put(SignalReceived(name))),
            watch_launcher(self._fail, self._environment.has_launcher),
            thread_errors_to(lambda error: self._fail(f"its supervisor: {type(error).__name__}: {error}")),
            # Last, so that a launcher's signal cannot change the exit status while the HTTP process ends.
            ExitStack() as cleanup,
        ):
            cleanup.callback(self._part)
            if self._joined is None:
                self._begin(cleanup)
            else:
                self._connect(self._joined)
                self._events.put(StartRank())
            while True:
                for action in self._next_actions():
                    if isinstance(action, Exit):
                        if action.reason is not None:
                            print_error(action.reason)
                        return action.status
                    self._do(action)

    def _begin(self, cleanup: ExitStack) -> None:
        """Start the rank of a group that starts and, beside rank 0, the HTTP process."""
        problem = None
        # The port is bound before anything slow: a clash shows at once, and /health answers while the model loads.
        if self._environment.rank == 0:
            try:
                http = HttpProcess(self._config, self._environment, Role.SUPERVISOR)
                cleanup.callback(http.close)
                self._adopt(http.hub, http.client)
            except UserError as error:
                if self._environment.is_one_node:  # its launcher ends the other ranks
                    raise
                problem = str(error)  # raised once the ranks have met, on all of them
        self._child = self._started(RankStart(self._config, self._hub, problem))

    def _next_actions(self) -> Sequence[Action]:
        """Wait for an event, or until something is due."""
        due_s = self._supervision.due_s
        try:
            event = self._events.get(timeout=None if due_s == inf else max(due_s - time.monotonic(), 0))
        except queue.Empty:
            return self._supervision.on_time(time.monotonic())
        return self._supervision.on_event(event, time.monotonic())

    def _do(self, action: Action) -> None:
        match action:
            case StartProcess():
                assert self._hub is not None
                rejoin = Rejoin(self._hub, action.num_restarts)
                try:
                    self._child = self._started(RankStart(self._config, rejoin=rejoin))
                except OSError as error:  # no memory, say: later there may be some
                    log.warning("rank %d cannot be started: %s", self._environment.rank, error)
                    self._events.put(RankExited(EXIT_FAILURE))
            case KillProcess():
                assert self._child is not None
                self._child.kill()
            case PassSignal() | Leave() | EndFailed():
                assert self._child is not None
                self._child.send(action)
            case Connect():
                self._on_serving(action.hub)
                if self._client is None:
                    self._connect(action.hub)
            case Exit():
                raise AssertionError
            case _:
                if self._client is not None:
                    self._client.send(action)

    def _started(self, start: RankStart) -> RankChild:
        return RankChild(start, self._events.put, self._command)

    def _connect(self, hub: HubAddress) -> None:
        try:
            self._adopt(hub, ControlClient(hub.address, self._environment.rank, hub.token, Role.SUPERVISOR))
        except OSError:
            self._events.put(HubClosed())

    def _adopt(self, hub: HubAddress, client: ControlClient) -> None:
        """Take commands of the HTTP process from now on."""
        self._hub, self._client = hub, client
        client.listen(
            self._events.put,
            lambda: self._events.put(HubClosed()),
            lambda error: self._fail(f"the HTTP process sent {error}"),
        )

    def _part(self) -> None:
        if self._child is not None:
            self._child.kill()  # it has ended, unless this process ends by an error of its own
        if self._client is not None:
            self._client.close()

    def _fail(self, reason: str) -> None:
        self._events.put(CannotGoOn(reason))
