"""The messages that a rank sends to the HTTP process."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

from rq_ep.engine.progress import MoverProgress, Progress
from rq_ep.engine.requests import Output

NO_MOVER = MoverProgress()


@dataclass(frozen=True)
class Checked:
    """Rank 0: the checkpoint is in order, and is about to be loaded."""

    model: str  # its folder on rank 0's machine
    why_text_only: str | None = None  # None: it takes images


@dataclass(frozen=True)
class Ready:
    """Rank 0: every rank can serve that the group begins with."""

    max_model_len: int
    vocab_size: int
    expert_bytes: list[dict[str, int]]  # of each rank, by weight format
    placement: dict[str, Any]  # as `placement.json` holds it
    info: dict[str, Any]
    routes_evenly: bool = True  # whether every token has as many experts in each MoE layer
    members: list[int] | None = None  # the ranks that can serve; None: all
    generation: int = 0  # in which they do


@dataclass(frozen=True)
class Outputs:
    """New tokens of requests."""

    outputs: list[Output]


class LoadSums(TypedDict):
    """The load of the MoE layers over some steps; every list has an entry for each of `layers`."""

    layers: list[int]
    num_calls_L: list[int]
    pairs_LR: list[list[int]]
    counts_LE: list[list[int]]
    formats_L: list[dict[str, int]]  # routed pairs by weight format
    imbalance_L: list[float]  # max/mean over ranks, mean of the calls
    seconds: dict[str, float]  # by phase of a layer call, over all layers and calls
    borrowed_experts: int
    borrowed_bytes: int


@dataclass(frozen=True)
class RankStats:
    """Figures of a rank: requests and cache now, steps and load since the last message."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    progress: Progress
    num_steps: int
    steps_s: float
    loads: LoadSums | None = None  # from rank 0 alone: every rank plans the same
    mover: MoverProgress = NO_MOVER
    free_bytes: int | None = None  # memory of its device; None: not known


@dataclass(frozen=True)
class Recorded:
    """Rank 0: a recording has ended, and was written."""

    path: str
    num_steps: int
    num_tokens: int
    is_full: bool


@dataclass(frozen=True)
class RecordingFailed:
    """Rank 0: a recording has ended, and was not written."""

    reason: str


@dataclass(frozen=True)
class MigrationPlanned:
    """Rank 0: every rank is to move experts, as `BeginMigration` says."""

    generation: int
    placement: dict[str, Any]  # the goal, as `placement.json` holds it
    rounds: list[Any]  # of each: what arrives and what is dropped, as (position of a layer, fields of a `Move`)
    expert_bytes: dict[str, int]  # of one expert, by weight format


@dataclass(frozen=True)
class RoundServed:
    """Rank 0: so many rounds of a migration serve on all ranks."""

    generation: int
    num_rounds: int


@dataclass(frozen=True)
class PlacementServed:
    """Rank 0: a placement serves on all ranks, at the end of a migration or after a change of the members."""

    generation: int
    placement: dict[str, Any]  # as `placement.json` holds it
    expert_bytes: list[dict[str, int]]  # of each rank, by weight format


@dataclass(frozen=True)
class RebalanceStatus:
    """Rank 0: the state of re-placements."""

    state: str
    generation: int  # of the last migration that was begun
    decision: dict[str, Any] | None  # the last one, with its reason
    results: dict[str, int]  # decisions by what became of them
    moved_bytes: int  # that have reached ranks since the start
    done_bytes: int  # of the migration under way
    left_bytes: int
    progress_s: float  # since the last progress; 0 where nothing is under way
    problem: str  # of the last thing that failed, or empty
    num_failures: int = 0  # in a row
    retry_s: float = 0.0  # until the next decision may be made by itself


@dataclass(frozen=True)
class RebalanceAnswer:
    """Rank 0: what became of the command of a number."""

    number: int
    refusal: str | None
    decision: dict[str, Any] | None


@dataclass(frozen=True)
class MigrationGivenUp:
    """A rank has given a migration up, which ends it on all; rank 0 gets it too."""

    generation: int
    reason: str


@dataclass(frozen=True)
class ImportanceReport:
    """What experts of a rank have contributed in the steps that it sampled; the HTTP process passes it on to rank 0."""

    rows: list[Any]  # of each layer: its position, experts, sums of their weighted output norms, numbers of pairs


@dataclass(frozen=True)
class Loaded:
    """The model of this rank is loaded; a rank that comes back could join the members."""

    store: tuple[str, int]  # host and port of its store, in which a group may form
    free_bytes: int | None = None  # memory of its device; None: not known


@dataclass(frozen=True)
class PeerUnreachable:
    """A collective has failed because of another rank. This one waits for a `Regroup`."""

    text: str


@dataclass(frozen=True)
class Regrouped:
    """This rank serves in a generation of the group."""

    generation: int
    seconds: dict[str, float]  # by part of the recovery: "re-form", "re-home"


@dataclass(frozen=True)
class CannotContinue:
    """The members of a generation cannot hold the model, or cannot read it: the group ends."""

    generation: int
    reason: str


@dataclass(frozen=True)
class MembersChecked:
    """Whether the members of the question of a number could hold the model, and if not, why."""

    number: int
    refusal: str | None


@dataclass(frozen=True)
class DrainRequest:
    """The process got a signal to shut down: unfinished requests have `timeout_s` left."""

    timeout_s: float


@dataclass(frozen=True)
class Failed:
    """The rank is about to end with an error. `is_consequence`: the error is that another rank has failed."""

    text: str
    is_consequence: bool


@dataclass(frozen=True)
class Aborted:
    """The rank got a signal, and ends now: a second one, or one while it loads."""

    signal: str
    was_loading: bool


@dataclass(frozen=True)
class Bye:
    """The last message of a connection that is closed on purpose."""


FromRank: TypeAlias = (
    Checked
    | Ready
    | Outputs
    | RankStats
    | Recorded
    | RecordingFailed
    | MigrationPlanned
    | RoundServed
    | PlacementServed
    | RebalanceStatus
    | RebalanceAnswer
    | MigrationGivenUp
    | ImportanceReport
    | Loaded
    | PeerUnreachable
    | Regrouped
    | CannotContinue
    | MembersChecked
    | DrainRequest
    | Failed
    | Aborted
    | Bye
)

FROM_RANK: Mapping[str, type] = {
    "checked": Checked,
    "ready": Ready,
    "outputs": Outputs,
    "stats": RankStats,
    "recorded": Recorded,
    "recording_failed": RecordingFailed,
    "migration": MigrationPlanned,
    "round": RoundServed,
    "served": PlacementServed,
    "rebalance": RebalanceStatus,
    "rebalance_answer": RebalanceAnswer,
    "given_up": MigrationGivenUp,
    "importance": ImportanceReport,
    "loaded": Loaded,
    "peer_unreachable": PeerUnreachable,
    "regrouped": Regrouped,
    "cannot_continue": CannotContinue,
    "members_checked": MembersChecked,
    "drain": DrainRequest,
    "failed": Failed,
    "aborted": Aborted,
    "bye": Bye,
}
