"""JSON schemas of the answers of `/v1/ep/*`, field by field, for the OpenAPI document."""

from rq_ep.serve.http.openai.bodies.answer_schemas import COUNT, NUMBER, TEXT, Schema, list_of, or_null, record
from rq_ep.serve.http.ranks.member_states import MemberState

FLAG: Schema = {"type": "boolean"}

MODEL_IDENTITY = record(id=TEXT, hash=TEXT)
REPLICA = record(expert=COUNT, rank=COUNT, format=TEXT, share=NUMBER)
LAYER_PLACEMENT = record(
    layer=COUNT, num_experts=COUNT, replicas=list_of(REPLICA), mixed_formats=list_of(TEXT),
    predicted=or_null(NUMBER), bound=or_null(NUMBER), gap=or_null(NUMBER), binding=or_null(TEXT),
)  # fmt: skip
PLACEMENT = record(
    format=TEXT,
    model=or_null(MODEL_IDENTITY),
    strategy=TEXT,
    num_ranks=COUNT,
    ranks_per_node=COUNT,
    tokens_per_step=or_null(COUNT),
    low_precision_share=record(cap=or_null(NUMBER), planned=NUMBER),
    budget_bytes=or_null(list_of(COUNT)),
    bytes=list_of(COUNT),
    certificate={"type": "object", "description": "What was predicted when it was placed; empty once it has moved."},
    layers=list_of(LAYER_PLACEMENT),
)

_LOADS = {
    "pairs_LR": list_of(list_of(COUNT)),
    "counts_LE": list_of(list_of(COUNT)),
    "imbalance_L": list_of(NUMBER),
    "num_calls_L": list_of(COUNT),
}
SAMPLE = record(
    time=NUMBER, prompt_tokens_per_s=NUMBER, generation_tokens_per_s=NUMBER, num_unfinished=COUNT,
    balancedness=or_null(NUMBER), ttft_ms_p50=or_null(NUMBER), itl_ms_p50=or_null(NUMBER), itl_ms_p99=or_null(NUMBER),
)  # fmt: skip
LOAD = record(
    model=TEXT,
    layers=list_of(COUNT),
    total=or_null(record(**_LOADS)),
    recent=or_null(record(window_s=NUMBER, **_LOADS, balancedness=NUMBER)),
    history=list_of(SAMPLE),
)

_DECISION = {
    "stays": FLAG,
    "reason": TEXT,
    "gain": or_null(record(before=NUMBER, after=NUMBER, mean=NUMBER, noise=NUMBER)),
    "moved_bytes": COUNT,
    "num_rounds": COUNT,
    "seconds": NUMBER,
}
MOVE = record(
    round=COUNT, layer=COUNT, do={"enum": ["receive", "drop"]}, rank=COUNT, expert=COUNT, format=TEXT,
    source=or_null(COUNT),
)  # fmt: skip
COMMIT = record(time=NUMBER, generation=COUNT, reason=or_null(TEXT), moved_bytes=or_null(COUNT))
_PROGRESS = {
    "generation": COUNT,
    "decision": or_null(record(**_DECISION, time=NUMBER)),
    "results": {"type": "object", "additionalProperties": COUNT},
    "moved_bytes": COUNT,
    "done_bytes": COUNT,
    "left_bytes": COUNT,
    "seconds_since_progress": NUMBER,
    "stall": or_null(TEXT),
    "problem": TEXT,
    "failures_in_a_row": COUNT,
    "seconds_until_retry": NUMBER,
    "commits": list_of(COMMIT),
}
REBALANCING = record(
    tuple(_PROGRESS),  # missing where the state is off or loading
    model=TEXT,
    state={"enum": ["off", "loading", "idle", "planning", "moving", "aborting"]},
    **_PROGRESS,
)
REBALANCE_ANSWER = record(
    ("decision",),
    action={"enum": ["start", "abort", "dry_run"]},
    decision=record(**_DECISION, moves=list_of(MOVE)),
)

_STATE: Schema = {"enum": [state.value for state in MemberState]}
RANK = record(
    rank=COUNT, state=_STATE, reason=TEXT, since=NUMBER, generation=COUNT, num_requests=COUNT, num_failures=COUNT,
    num_restarts=COUNT,
)  # fmt: skip
RANKS = record(
    model=TEXT,
    on_rank_failure={"enum": ["continue", "stop"]},
    generation=COUNT,
    members=list_of(COUNT),
    is_changing=FLAG,
    ranks=list_of(RANK),
    events=list_of(record(time=NUMBER, rank=COUNT, state=_STATE, reason=TEXT, generation=COUNT)),
)

# By name, as the document has them.
EP_ANSWERS = {
    "Placement": PLACEMENT,
    "Load": LOAD,
    "Recording": record(recording={"const": True}, max_tokens=COUNT),
    "Recorded": record(recording={"const": False}, path=TEXT, num_steps=COUNT, num_tokens=COUNT, is_full=FLAG),
    "Rebalancing": REBALANCING,
    "RebalanceAnswer": REBALANCE_ANSWER,
    "Ranks": RANKS,
}

# Operation -> name of the body of status 200.
EP_BODIES = {
    "GET /v1/ep/placement": "Placement",
    "GET /v1/ep/load": "Load",
    "POST /v1/ep/record/start": "Recording",
    "POST /v1/ep/record/stop": "Recorded",
    "GET /v1/ep/rebalance": "Rebalancing",
    "POST /v1/ep/rebalance": "RebalanceAnswer",
    "GET /v1/ep/ranks": "Ranks",
    "POST /v1/ep/ranks": "Ranks",
}
