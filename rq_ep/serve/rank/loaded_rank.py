"""What a rank serves with, from the first check of its files to an engine that has made its cache."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from rq_ep.config import ServeConfig
from rq_ep.core.placement import Placement
from rq_ep.engine.engine import Engine, EngineConfig
from rq_ep.engine.step_agreement import GroupFlags
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.model.load.load_report import report_of
from rq_ep.moe.telemetry import CallRecorder
from rq_ep.parallel import TorchGroup
from rq_ep.parallel.agreement import run_on_all_ranks
from rq_ep.serve.messages import Checked, FromRank, Outputs
from rq_ep.serve.rank.check_inputs import CheckedInputs, check_inputs, choose_max_model_len, with_model_folder
from rq_ep.serve.rank.loads.load_recorders import LoadRecorders
from rq_ep.serve.rank.rank_inbox import RankInbox
from rq_ep.serve.rank.rank_loader import ep_layers, load_served_model, place_first
from rq_ep.serve.rank.rebalance.live_rebalancing import LiveRebalancing
from rq_ep.serve.rank.rebalance.move_inputs import MoveInputs
from rq_ep.serve.rank.rebalance.rebalance_inputs import RebalanceInputs
from rq_ep.serve.rank.recovery.group_recovery import GroupRecovery
from rq_ep.serve.rank.trace_recording import TraceRecording
from rq_ep.solver.migration.recover import warm_up


@dataclass(frozen=True)
class LoadedRank:
    """A model on this rank, the engine that makes its steps, what moves its experts, and what takes messages for them.

    `config` is what was to be served, with the folder of the model, and `checked` what its files say.
    """

    config: ServeConfig
    checked: CheckedInputs
    model: PreTrainedModel
    engine: Engine
    loads: LoadRecorders
    rebalancing: LiveRebalancing | None  # None: no experts move
    recovery: GroupRecovery | None  # None: the group ends with the first rank that fails
    inbox: RankInbox

    def max_model_len(self, group: TorchGroup) -> int:
        """The longest prompt and answer that every rank can take; every rank calls this.

        Raises:
            UserError: it is shorter than the settings say.
        """
        max_tokens_R = group.all_gather_object(self.engine.max_request_tokens)
        max_tokens = min(number for number in max_tokens_R if number is not None)  # None: no member
        return run_on_all_ranks(group, lambda: choose_max_model_len(self.config, self.checked.model_config, max_tokens))

    def stop(self) -> None:
        """Finish what is running, and end; every rank calls this."""
        if self.rebalancing is not None:
            self.rebalancing.stop()
        self.engine.stop()
        if self.rebalancing is not None:
            self.rebalancing.close()


def load_rank(
    config: ServeConfig,
    group: TorchGroup,
    send: Callable[[FromRank], None],
    on_failure: Callable[[BaseException], None],
    *,
    joins_later: bool,
) -> LoadedRank:
    """Load what this rank serves with; every rank of the group calls this.

    Args:
        config: the same on every rank.
        group: the ranks that have met, or this one alone.
        send: sends a message to the HTTP process.
        on_failure: called with an error that ends the engine, on its thread.
        joins_later: the others serve already, and this rank joins them when it has loaded.

    Raises:
        UserError: the checkpoint, the placement or a setting is at fault, on every rank alike.
    """
    config = with_model_folder(config, group)
    checked = run_on_all_ranks(group, lambda: check_inputs(config, group.device.type))
    rebalancing_inputs = run_on_all_ranks(group, lambda: RebalanceInputs.check(config))
    moves = rebalancing_inputs or run_on_all_ranks(group, lambda: MoveInputs.of_survivors(config, group.size))
    leads = group.rank == 0 and not joins_later
    if leads:
        send(Checked(config.model, checked.why_text_only))

    survives = config.on_rank_failure == "continue"
    warming_up = threading.Thread(target=warm_up, name="rq_ep warm-up", daemon=True)
    if survives:
        warming_up.start()  # what plans a recovery is compiled beside the reading of the weights
    loads = LoadRecorders(lambda: group.members, survives=survives, rebalances=rebalancing_inputs is not None)
    model, home = _load_model(config, checked, group, loads.recorder(leads), moves, joins_later)
    report = report_of(model)
    layers = ep_layers(report)

    # The engine is made last. What is made here asks for it only while it makes steps.
    recording = TraceRecording(
        report.placement.model, model, group, lambda: engine.batch, config.record_dir, config.record_max_tokens, send
    )
    rebalancing: LiveRebalancing | None = None
    recovery: GroupRecovery | None = None
    if moves is not None:
        rebalancing = LiveRebalancing(
            moves, report, layers, group, loads.steps, leads, send, wake=lambda: engine.wake(0)
        )
        if survives:
            recovery = GroupRecovery(
                group, layers, home, rebalancing, moves, loads, recording, send, config.rank_timeout
            )

    def on_agreement(flags: GroupFlags) -> None:
        loads.between_steps(flags.any_prefill)
        if rebalancing is not None:
            rebalancing.on_agreement(flags)

    engine = Engine(
        model,
        layers,
        group,
        _engine_config(config, checked),
        on_outputs=lambda outputs: send(Outputs(outputs)),
        on_failure=on_failure,
        on_mark=recording.mark,
        mover_flags=None if rebalancing is None else rebalancing.flags,
        on_agreement=on_agreement,
        recover=recovery,
        read_tokenizer=lambda: read_tokenizer(config.model),
    )
    if survives:
        warming_up.join()
    inbox = RankInbox(engine, rebalancing, recovery)
    return LoadedRank(config, checked, model, engine, loads, rebalancing, recovery, inbox)


def _load_model(
    config: ServeConfig,
    checked: CheckedInputs,
    group: TorchGroup,
    recorder: CallRecorder | None,
    moves: MoveInputs | None,
    joins_later: bool,
) -> tuple[PreTrainedModel, Placement]:
    """The model of a rank, and the placement for all ranks: it may begin without some of them."""
    home: Placement | None = None  # None: that of the model
    placement: Placement | str | None = config.placement
    if len(group.members) < group.size and not joins_later:
        assert moves is not None
        home, placement = run_on_all_ranks(group, lambda: place_first(config, group, moves))
    model = run_on_all_ranks(group, lambda: load_served_model(config, placement, group, recorder, moves, joins_later))
    assert model.generation_config is not None
    model.generation_config.eos_token_id = checked.end_token_ids
    return model, home or report_of(model).placement


def _engine_config(config: ServeConfig, checked: CheckedInputs) -> EngineConfig:
    return EngineConfig(
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.kv_cache_tokens,
        checked.cache,
        config.prefix_caching != "off",
    )
