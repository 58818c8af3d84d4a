"""The messages between the HTTP process and the ranks: each survives the wire, and a malformed one is named."""

import json
from typing import get_args

import pytest

from rq_ep.engine.progress import Progress
from rq_ep.engine.requests import Output, Request, Sampling, Score
from rq_ep.serve.messages import (
    KINDS,
    Abort,
    Aborted,
    AddRequest,
    Bye,
    Cancel,
    Checked,
    DrainRequest,
    Failed,
    FromRank,
    Hello,
    LoadSums,
    Mark,
    MessageError,
    Outputs,
    RankStats,
    Ready,
    Recorded,
    RecordingFailed,
    Stop,
    ToRank,
    Wake,
    decode_from_rank,
    decode_to_rank,
    encode,
)

SCORES = [Score(-0.5, [5, 2], [-0.5, -1.5])]
LOADS = LoadSums(
    layers=[3], num_calls_L=[1], pairs_LR=[[3, 1]], counts_LE=[[4, 0]], formats_L=[{"bf16": 4}], imbalance_L=[1.5],
    seconds={"plan": 0.1}, borrowed_experts=0, borrowed_bytes=0,
)  # fmt: skip
MESSAGES_FROM_RANK: list[FromRank] = [
    Hello(1, "secret"),
    Checked(),
    Ready(64, 256, [{"bf16": 100}], {"format": "rq_ep.placement/1"}, {"device": "cpu"}),
    Outputs(
        [
            Output("a", [5], queued_s=0.5),
            Output("b", [6], "length", None, SCORES, SCORES),
            Output("c", [], "error", "x"),
        ]
    ),
    RankStats(1, 2, 0.5, Progress(7, None, "all-to-all", 0.1), 3, 0.25),
    RankStats(1, 2, 0, Progress(7, 1, None, 0.1), 3, 0, LOADS),
    Recorded("traces/t", 3, 9, True),
    RecordingFailed("no step"),
    DrainRequest(5),
    Failed("KeyError: 3", False),
    Aborted("SIGINT", was_loading=True),
    Bye(),
]
MESSAGES_TO_RANK: list[ToRank] = [
    AddRequest(Request("a", [1, 2], 3, Sampling(0.5, 0.9, 7), True, 2, True), 4),
    Cancel("a"),
    Wake(4),
    Mark(1),
    Stop(),
    Abort("rank 1 died"),
]


def test_every_message_survives_the_wire() -> None:
    assert [decode_from_rank(encode(message)) for message in MESSAGES_FROM_RANK] == MESSAGES_FROM_RANK
    assert [decode_to_rank(encode(message)) for message in MESSAGES_TO_RANK] == MESSAGES_TO_RANK
    assert {*map(type, MESSAGES_FROM_RANK), *map(type, MESSAGES_TO_RANK)} == set(KINDS)
    assert {*get_args(FromRank), *get_args(ToRank)} == set(KINDS)


def test_a_message_is_a_json_object_on_a_line() -> None:
    for message in MESSAGES_FROM_RANK:
        line = encode(message)
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert json.loads(line)["kind"] == KINDS[type(message)]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"\xff\n", "a line that is not JSON"),
        (b"[1]\n", "a line that is not a message"),
        (b"{}\n", "a line that is not a message"),
        (b'{"kind": 3}\n', "a line that is not a message"),
        (b'{"kind": "gossip"}\n', "a message of unknown kind 'gossip'"),
        (b'{"kind": "stop"}\n', "a message of unknown kind 'stop'"),
        (b'{"kind": "hello", "rank": 1}\n', "a malformed message 'hello': .*token"),
        (b'{"kind": "bye", "why": "tired"}\n', "a malformed message 'bye': .*why"),
        (b'{"kind": "hello", "rank": "1", "token": "x"}\n', "a malformed message 'hello': rank is '1'"),
        (b'{"kind": "stats"}\n', "a malformed message 'stats': 'progress'"),
        (b'{"kind": "outputs", "outputs": [["a"]]}\n', "a malformed message 'outputs': "),
        (b'{"kind": "outputs", "outputs": 3}\n', "a malformed message 'outputs': "),
    ],
)
def test_a_malformed_message_is_named(line: bytes, what: str) -> None:
    with pytest.raises(MessageError, match=what):
        decode_from_rank(line)
