"""One rank of the server: load, run the engine, and end when the HTTP process or a signal says so."""

import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from enum import Enum, auto
from typing import Any, NoReturn, assert_never

from rq_ep.config import ServeConfig
from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.engine.engine import Engine, EngineConfig
from rq_ep.engine.progress import MoverProgress
from rq_ep.engine.requests import Output
from rq_ep.engine.step_agreement import GroupFlags, is_consequence
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.model.load.load_report import report_of
from rq_ep.model.load.memory import free_bytes
from rq_ep.moe import EPExperts
from rq_ep.moe.telemetry import CallRecorder
from rq_ep.parallel import RankFailure, TorchGroup
from rq_ep.parallel.agreement import report_user_error, run_on_all_ranks
from rq_ep.parallel.host import short_collections
from rq_ep.parallel.processes.first_members import FirstMeeting
from rq_ep.parallel.processes.world import RendezvousError
from rq_ep.serve.control import ControlClient
from rq_ep.serve.messages import (
    Abort,
    AddRequest,
    BeginMigration,
    Cancel,
    Checked,
    CheckMembers,
    DrainRequest,
    ImageData,
    ImportanceReport,
    Loaded,
    Mark,
    MessageError,
    MigrationGivenUp,
    Outputs,
    PromptPart,
    RebalanceCommand,
    Regroup,
    Stop,
    ToRank,
    Wake,
    images_of,
)
from rq_ep.serve.process import exit_failed, print_user_error, thread_errors_to
from rq_ep.serve.rank.check_inputs import check_inputs, choose_max_model_len, with_model_folder
from rq_ep.serve.rank.early_end import EarlyEnd
from rq_ep.serve.rank.group_start import start_group
from rq_ep.serve.rank.load_totals import LoadTotals
from rq_ep.serve.rank.rank_loader import ep_layers, load_served_model, log_ready, place_first, ready_message
from rq_ep.serve.rank.rebalance.live_rebalancing import GroupChange, LiveRebalancing
from rq_ep.serve.rank.rebalance.move_inputs import MoveInputs
from rq_ep.serve.rank.rebalance.rebalance_inputs import RebalanceInputs
from rq_ep.serve.rank.rebalance.step_loads import StepLoads
from rq_ep.serve.rank.recent_pairs import RecentPairs
from rq_ep.serve.rank.recovery import GroupRecovery
from rq_ep.serve.rank.stats_sampler import StatsSampler
from rq_ep.serve.rank.trace_recording import TraceRecording
from rq_ep.serve.supervisor.rank_start import HubAddress, Rejoin
from rq_ep.solver.migration.recover import warm_up

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


class ServerState(Enum):
    """State of a rank. A failure ends its process at once."""

    LOADING = auto()
    SERVING = auto()
    STOPPING = auto()  # the HTTP process has said so, and its end is expected


class RankServer:
    """A rank whose group has met: its engine, and its connection to the HTTP process.

    Args:
        config: the same on every rank.
        group: the ranks that have met, or this one alone.
        client: the connection.
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
        self._state = ServerState.LOADING
        self._stop = threading.Event()  # set in the state STOPPING
        self._engine: Engine | None = None
        self._survives = config.on_rank_failure == "continue"
        self._pairs = RecentPairs()
        # Of the group, where this rank leads it
        self._loads = LoadTotals(lambda: group.members, self._survives, self._pairs)
        self._step_loads: StepLoads | None = None  # where the group rebalances
        self._rebalancing: LiveRebalancing | None = None  # None: no experts move, or the model is loading
        self._recovery: GroupRecovery | None = None  # None: the group ends with the first rank that fails
        self._prompt_parts: dict[str, list[int]] = {}  # of requests that are still to come
        self._image_parts: dict[str, list[ImageData]] = {}

    def run(self) -> None:
        """Load and serve until asked to stop.

        Raises:
            UserError: the checkpoint, the placement or a setting is at fault, on every rank alike.
        """
        self._client.listen(self._handle, self._on_close, self._on_malformed)
        try:
            engine = self._start_engine()
            with short_collections():
                if self._joins_later:
                    self._offer_to_join(engine)
                rebalancing = self._rebalancing
                mover = MoverProgress if rebalancing is None else rebalancing.progress
                self._wait(StatsSampler(engine, self._loads, self._group.device, mover))
                if rebalancing is not None:
                    rebalancing.stop()
                engine.stop()
                if rebalancing is not None:
                    rebalancing.close()
        except UserError:
            raise
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End this process with an error; another rank that ends as the server stops is none."""
        if self._state is not ServerState.STOPPING or not is_consequence(error):
            fail(self._early_end, error)

    def _start_engine(self) -> Engine:
        group = self._group
        started_s = time.monotonic()
        config = with_model_folder(self._config, group)
        checked = run_on_all_ranks(group, lambda: check_inputs(config, group.device.type))
        rebalances = run_on_all_ranks(group, lambda: RebalanceInputs.check(config))
        moves = rebalances or run_on_all_ranks(group, lambda: MoveInputs.of_survivors(config, group.size))
        if self._is_first:
            self._client.send(Checked(config.model, checked.why_text_only))
        self._step_loads = None if rebalances is None else StepLoads(self._loads)
        warming_up = threading.Thread(target=warm_up, name="rq_ep warm-up", daemon=True)
        if self._survives:
            warming_up.start()  # beside the reading of the weights
        recorder = self._recorder(self._is_first)
        begins_with_some = len(group.members) < group.size and not self._joins_later
        placement: Placement | str | None = config.placement
        home: Placement | None = None
        if begins_with_some:
            assert moves is not None
            home, placement = run_on_all_ranks(group, lambda: place_first(config, group, moves))
        model = run_on_all_ranks(
            group, lambda: load_served_model(config, placement, group, recorder, moves, self._joins_later)
        )
        assert model.generation_config is not None
        model.generation_config.eos_token_id = checked.end_token_ids
        report = report_of(model)
        recording = TraceRecording(
            report.placement.model, model, group, lambda: engine.batch, config.record_dir, config.record_max_tokens,
            self._client.send,
        )  # fmt: skip
        layers = ep_layers(report)
        if moves is not None:
            leading = self._step_loads if self._is_first else None
            self._rebalancing = LiveRebalancing(moves, report, layers, group, leading, self._client.send, self._wake)
            if self._survives:
                self._recovery = self._make_recovery(home or report.placement, layers, moves, recording)
        engine = Engine(
            model,
            layers,
            group,
            EngineConfig(
                config.max_num_seqs,
                config.max_num_batched_tokens,
                config.kv_cache_tokens,
                checked.cache,
                config.prefix_caching != "off",
            ),
            on_outputs=self._send_outputs,
            on_failure=self.fail,
            on_mark=recording.mark,
            read_tokenizer=lambda: read_tokenizer(config.model),
            **self._engine_hooks(),
        )
        # Set before the ranks meet below: once rank 0 has said that all are ready, requests may come to any of them.
        self._engine = engine
        if self._recovery is not None and not self._joins_later:
            self._send_loaded()
        max_tokens = min(number for number in group.all_gather_object(engine.max_request_tokens) if number is not None)
        max_model_len = run_on_all_ranks(group, lambda: choose_max_model_len(config, checked.model_config, max_tokens))
        if warming_up.ident is not None:
            warming_up.join()
        engine.start()
        self._state = ServerState.SERVING
        self._early_end.serving(self._hub)
        if self._is_first:
            ready = ready_message(model, group, max_model_len, engine.routes_evenly)
            log_ready(ready, model, group, checked.cache, time.monotonic() - started_s, engine.warmup_s)
            self._client.send(ready)
            if self._meeting is not None:
                self._meeting.invite()
        return engine

    def _offer_to_join(self, engine: Engine) -> None:
        """Say that the others may take this rank in: from then on they wait for whatever it still has to do."""
        while engine.progress.step == 0:
            time.sleep(POLL_S)
        self._send_loaded()

    def _send_loaded(self) -> None:
        self._client.send(Loaded(self._group.open_store(), free_bytes(self._group.device)))

    def _engine_hooks(self) -> dict[str, Any]:
        rebalancing = self._rebalancing
        if rebalancing is None:
            return {}

        def on_agreement(flags: GroupFlags) -> None:
            self._loads.between_steps()
            rebalancing.on_agreement(flags)

        return {"mover_flags": rebalancing.flags, "on_agreement": on_agreement, "recover": self._recovery}

    @property
    def _is_first(self) -> bool:
        """Whether this rank speaks for the group at its start."""
        return self._group.rank == 0 and not self._joins_later

    def _recorder(self, leads: bool) -> CallRecorder | None:
        """Counts the load of the group on the rank that leads it; others count what they need to lead it later."""
        if leads:
            return self._step_loads or self._loads
        return self._pairs if self._survives else None

    def _make_recovery(
        self, home: Placement, layers: Sequence[EPExperts], moves: MoveInputs, recording: TraceRecording
    ) -> GroupRecovery:
        rebalancing = self._rebalancing
        assert rebalancing is not None

        def counts_LE() -> IntArray | None:
            return self._pairs.counts_LE(len(layers))

        def end_step(is_cut_off: bool) -> None:
            if is_cut_off:
                for layer in layers:
                    layer.discard_step()
                self._loads.discard()
            else:
                self._loads.between_steps()
            if self._step_loads is not None:
                self._step_loads.discard()

        def on_change(change: GroupChange, mark: int) -> None:
            leads = change.leader == self._group.rank
            for layer in layers:
                layer.telemetry = self._recorder(leads) or layer.telemetry
            rebalancing.regroup(change, leads, self._step_loads, counts_LE())
            if leads:
                rebalancing.served(change)
            recording.regroup(mark, leads)

        return GroupRecovery(
            self._group, layers, home, rebalancing, moves, self._client.send, counts_LE, end_step,
            on_change, self._config.rank_timeout,
        )  # fmt: skip

    def _wait(self, sampler: StatsSampler) -> None:
        """Wait for the end; meanwhile pass on a signal, and send statistics."""
        has_asked = False
        sampled_s = 0.0
        while not self._stop.wait(TICK_S if self._step_loads is None else REBALANCING_TICK_S):
            if self._rebalancing is not None:
                self._rebalancing.tick()
            if self._early_end.signals.are_received and not has_asked:
                has_asked = True
                self._client.send(DrainRequest(self._config.shutdown_timeout))
            if time.monotonic() - sampled_s >= STATS_EVERY_S:
                sampled_s = time.monotonic()
                self._client.send(sampler.sample())

    # On the engine's thread

    def _send_outputs(self, outputs: list[Output]) -> None:
        self._client.send(Outputs(outputs))

    # On the mover's thread

    def _wake(self) -> None:
        if self._engine is not None:
            self._engine.wake(0)

    # On the control connection's thread

    def _handle(self, message: ToRank) -> None:
        match message:
            case Abort():
                exit_failed(None)
            case Stop():
                self._state = ServerState.STOPPING
                if self._recovery is not None:
                    self._recovery.stop()
                self._stop.set()
            case PromptPart():
                self._prompt_parts.setdefault(message.id, []).extend(message.token_ids)
            case ImageData():
                self._image_parts.setdefault(message.id, []).append(message)
            case AddRequest():
                begun = self._prompt_parts.pop(message.request.id, [])
                images = images_of(self._image_parts.pop(message.request.id, []))
                request = replace(message.request, prompt_ids=begun + message.request.prompt_ids, images=images)
                self._loaded_engine().submit(request)
                self._loaded_engine().wake(message.num_announced)
            case Mark():
                self._loaded_engine().mark(message.number)
            case BeginMigration() | RebalanceCommand() | MigrationGivenUp() | ImportanceReport():
                if self._rebalancing is None:
                    raise MessageError("a message on rebalancing, which is off")
                self._rebalancing.handle(message)
                if not isinstance(message, ImportanceReport):
                    self._loaded_engine().wake(0)
            case Regroup():
                if self._recovery is None:
                    raise MessageError("a message on the members of the group, which cannot change")
                self._recovery.announce(message)
                self._loaded_engine().regroup(message.generation)
            case CheckMembers():
                if self._recovery is None:
                    raise MessageError("a question on the members of the group, which cannot change")
                # On a thread: it takes as long as the plan of a recovery, and requests come meanwhile.
                threading.Thread(target=self._recovery.check, args=(message,), name="rq_ep check", daemon=True).start()
            case Cancel():
                self._prompt_parts.pop(message.id, None)
                self._image_parts.pop(message.id, None)
                self._loaded_engine().cancel(message.id)
            case Wake():
                self._loaded_engine().wake(message.num_announced)
            case _:
                assert_never(message)

    def _loaded_engine(self) -> Engine:
        if self._engine is None:
            raise MessageError("a message for the engine before there is one")
        return self._engine

    def _on_close(self) -> None:
        if self._state is not ServerState.STOPPING and not self._early_end.is_failing:
            exit_failed(f"rank {self._group.rank}: the HTTP process has died" if self._group.rank == 0 else None)

    def _on_malformed(self, error: MessageError) -> None:
        exit_failed(f"rank {self._group.rank}: the HTTP process sent {error}")
