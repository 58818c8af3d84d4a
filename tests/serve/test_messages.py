"""The messages between the HTTP process and the ranks: each survives the wire, and a malformed one is named."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import pytest

from rq_ep.engine.progress import MoverProgress, Progress
from rq_ep.engine.requests import Output, ReasoningTokens, Request, RoutedExperts, Sampling, Score
from rq_ep.serve.messages import (
    FROM_RANK,
    FROM_SUPERVISOR,
    KINDS,
    TO_RANK,
    TO_SUPERVISOR,
    Abort,
    Aborted,
    AddRequest,
    BeginMigration,
    Bye,
    Cancel,
    CannotContinue,
    Checked,
    CheckMembers,
    DrainRequest,
    Failed,
    FromRank,
    FromSupervisor,
    ImageData,
    ImportanceReport,
    KillRank,
    Loaded,
    LoadSums,
    Mark,
    MembersChecked,
    MessageError,
    MessageTooLong,
    MigrationGivenUp,
    MigrationPlanned,
    Outputs,
    PeerUnreachable,
    PlacementServed,
    PromptPart,
    RankEnded,
    RankGivenUp,
    RankStarted,
    RankStats,
    Ready,
    RebalanceAnswer,
    RebalanceCommand,
    RebalanceStatus,
    Recorded,
    RecordingFailed,
    Regroup,
    Regrouped,
    RoundServed,
    StartRank,
    Stop,
    StopRank,
    ToRank,
    ToSupervisor,
    Wake,
    codec,
    decode,
    decode_from_rank,
    decode_to_rank,
    encode,
    images_of,
    request_in_parts,
    request_parts,
    shorter_outputs,
)

SCORES = [Score(-0.5, [5, 2], [-0.5, -1.5])]
LOADS = LoadSums(
    layers=[3], num_calls_L=[1], pairs_LR=[[3, 1]], counts_LE=[[4, 0]], formats_L=[{"bf16": 4}], imbalance_L=[1.5],
    seconds={"plan": 0.1}, borrowed_experts=0, borrowed_bytes=0,
)  # fmt: skip
MESSAGES_FROM_RANK: list[FromRank] = [
    Checked("/models/tiny"),
    Ready(64, 256, [{"bf16": 100}], {"format": "rq_ep.placement/1"}, {"device": "cpu"}),
    Outputs(
        [
            Output("a", [5], queued_s=0.5, routed=RoutedExperts([1, 2, 1], "|u1", "AAE=")),
            Output("b", [6], "length", None, SCORES, SCORES),
            Output("c", [], "error", "x"),
        ]
    ),
    RankStats(1, 2, 0.5, Progress(7, None, "all-to-all", 0.1), 3, 0.25),
    RankStats(1, 2, 0, Progress(7, 1, None, 0.1), 3, 0, LOADS, MoverProgress(5, 6, "verifies", False), 1 << 30),
    MigrationPlanned(1, {"format": "rq_ep.placement/1"}, [[[[0, ["receive", 1, 5, "int8", 0]]], []]], {"int8": 60}),
    RoundServed(1, 2),
    PlacementServed(1, {"layers": []}, [{"bf16": 100}]),
    RebalanceStatus("moving", 1, {"reason": "better"}, {"committed": 1}, 100, 10, 20, 0.5, ""),
    RebalanceAnswer(1, None, {"reason": "better"}),
    RebalanceAnswer(2, "moving", None),
    MigrationGivenUp(1, "rank 1: no space"),
    ImportanceReport([[0, [1, 5], [0.5, 2.0], [1, 3]]]),
    Recorded("traces/t", 3, 9, True),
    RecordingFailed("no step"),
    Loaded(("127.0.0.1", 1234)),
    PeerUnreachable("PeerLost: connection closed"),
    Regrouped(2, {"re-form": 0.01, "re-home": 0.2}),
    CannotContinue(2, "the members lack 5 bytes"),
    MembersChecked(3, None),
    MembersChecked(4, "the members lack 5 bytes"),
    DrainRequest(5),
    Failed("KeyError: 3", False),
    Aborted("SIGINT", was_loading=True),
    Bye(),
]
MESSAGES_TO_RANK: list[ToRank] = [
    AddRequest(Request("a", [1, 2], 3, Sampling(0.5, 0.9, 7), True, 2, True), 4),
    AddRequest(Request("b", [1], 3, Sampling(logit_bias=((5, -1.5),), stop_token_ids=(7,)), num_answered=1), 5),
    AddRequest(Request("c", [1], 3, grammar="{}", reasoning=ReasoningTokens(None, [5]), routed_from=1), 6),
    PromptPart("a", [1, 2]),
    ImageData("a", "pixel_values", "<f4", [2, 1], "AACAPwAAAEA="),
    Cancel("a"),
    Wake(4),
    Mark(1),
    BeginMigration(1, {"format": "rq_ep.placement/1"}, []),
    RebalanceCommand(1, "start"),
    MigrationGivenUp(1, "rank 1: no space"),
    ImportanceReport([[0, [1, 5], [0.5, 2.0], [1, 3]]]),
    Regroup(2, [0, 2], ("127.0.0.1", 1234), []),
    CheckMembers(3, [0, 2], [1 << 30, None]),
    Stop(),
    Abort("rank 1 died"),
]
MESSAGES_FROM_SUPERVISOR: list[FromSupervisor] = [
    RankEnded("was killed by SIGKILL"),
    RankStarted(1),
    RankGivenUp("it has ended 4 times (--max-rank-restarts 3)"),
    DrainRequest(5),
    Aborted("SIGTERM", was_loading=False),
    Bye(),
]
MESSAGES_TO_SUPERVISOR: list[ToSupervisor] = [StartRank(), KillRank("stalled"), StopRank(), Stop(), Abort("x")]


DIRECTIONS = [
    (FROM_RANK, FromRank, MESSAGES_FROM_RANK),
    (TO_RANK, ToRank, MESSAGES_TO_RANK),
    (FROM_SUPERVISOR, FromSupervisor, MESSAGES_FROM_SUPERVISOR),
    (TO_SUPERVISOR, ToSupervisor, MESSAGES_TO_SUPERVISOR),
]


@pytest.mark.parametrize(("kinds", "union", "examples"), DIRECTIONS)
def test_every_message_of_a_direction_survives_the_wire(
    kinds: Mapping[str, type], union: Any, examples: Sequence[codec.Message]
) -> None:
    assert [decode(encode(message), kinds) for message in examples] == examples
    assert {*map(type, examples)} == set(get_args(union)) == set(kinds.values())
    assert all(json.loads(encode(message))["kind"] == KINDS[type(message)] for message in examples)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"\xff", "something that is not JSON"),
        (b"[" * 100_000, "something that is not JSON"),
        (b"[1]", "JSON that is not a message"),
        (b"{}", "JSON that is not a message"),
        (b'{"kind": 3}', "JSON that is not a message"),
        (b'{"kind": "gossip"}', "a message of unknown kind 'gossip'"),
        (b'{"kind": "stop"}', "a message of unknown kind 'stop'"),
        (b'{"kind": "aborted"}', "a malformed message 'aborted': .*signal"),
        (b'{"kind": "bye", "why": "tired"}', "a malformed message 'bye': .*why"),
        (b'{"kind": "recording_failed", "reason": 2}', "a malformed message 'recording_failed': reason is 2"),
        (b'{"kind": "loaded", "store": ["localhost"]}', "a malformed message 'loaded': "),
        (b'{"kind": "loaded", "store": ["localhost", "80"]}', "a malformed message 'loaded': .* is no host and port"),
        (b'{"kind": "rank_ended", "status": "x"}', "a message of unknown kind 'rank_ended'"),
        (b'{"kind": "stats"}', "a malformed message 'stats': 'progress'"),
        (b'{"kind": "outputs", "outputs": [["a"]]}', "a malformed message 'outputs': "),
        (b'{"kind": "outputs", "outputs": 3}', "a malformed message 'outputs': "),
    ],
)
def test_a_malformed_message_is_named(body: bytes, what: str) -> None:
    with pytest.raises(MessageError, match=what):
        decode_from_rank(body)


def test_outputs_that_are_too_long_for_a_message_are_sent_one_by_one_or_as_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", 2000)
    long = Output("long", [5], scores=[Score(-0.5, [1], [-0.5])] * 200)
    short = Output("short", [6])
    with pytest.raises(MessageTooLong, match=r"a message 'outputs' of .* bytes, more than 2000") as caught:
        encode(Outputs([long, short]))
    assert shorter_outputs(Outputs([long, short]), caught.value) == [Outputs([long]), Outputs([short])]
    (only,) = shorter_outputs(Outputs([long]), caught.value)
    assert only == Outputs([Output("long", [], "error", str(caught.value))])


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 11])
def test_a_long_prompt_travels_in_parts(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    monkeypatch.setattr(request_parts, "PROMPT_PART_TOKENS", 4)
    prompt_ids = list(range(num_tokens))
    parts, last = request_in_parts(Request("a", prompt_ids, 3))
    assert (last.id, last.max_tokens) == ("a", 3)
    token_ids = [part.token_ids for part in parts] + [last.prompt_ids]
    assert [token_id for part in token_ids for token_id in part] == prompt_ids
    assert max(map(len, token_ids)) <= 4


def test_images_of_several_parts_arrive_as_they_were_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_parts, "IMAGE_PART_BYTES", 10)
    images = {
        "pixel_values": np.arange(12, dtype=np.float32).reshape(3, 4),
        "image_grid_thw": np.array([[1, 2, 2]]),
        "empty": np.zeros((0, 3), np.int32),
    }
    parts, last = request_in_parts(Request("a", [1, 2], 3, images=images))
    assert last == Request("a", [1, 2], 3)
    assert len(parts) == 5 + 3 + 1
    arrived = images_of([decode_to_rank(encode(part)) for part in parts])
    assert arrived.keys() == images.keys()
    for name, array in images.items():
        np.testing.assert_array_equal(arrived[name], array)
        assert arrived[name].dtype == array.dtype
    with pytest.raises(MessageError, match="images that are no arrays"):
        images_of(parts[:1])
