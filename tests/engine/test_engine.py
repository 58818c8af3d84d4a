"""Two ranks in lockstep: every family and strategy answers as the dense model does, and a failure ends the group."""

import json
import socket
from typing import Any

import pytest

from tests.engine.cases import CONFIGS, EOS, NAMES, SCORED_FAMILIES, SERVED, check_only_broken_end
from tests.model.families import random_model, save
from tests.parallel.processes import exit_codes

NUM_RANKS = 2

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def loopback() -> str:
    """The IPv6 address where there is one, as `tests/parallel` has the other."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return "127.0.0.1"
    return "[::1]"


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw; both were ended by the failure that comes last."""
    directory = tmp_path_factory.mktemp("engine")
    for name in NAMES:
        model = random_model(CONFIGS[name])
        model.generation_config.eos_token_id = EOS
        save(model, directory / name)
    command = ["tests.engine.worker", str(directory)]
    codes, logs = exit_codes(NUM_RANKS, command, directory, timeout_s=280, address=loopback())
    assert codes == [7] * NUM_RANKS, logs
    return [json.loads((directory / f"findings-{rank}.json").read_text()) for rank in range(NUM_RANKS)]


@pytest.mark.parametrize(("family", "strategy"), SERVED)
def test_greedy_answers_equal_generate(findings: list[dict[str, Any]], family: str, strategy: str) -> None:
    served = findings[0]["served"][f"{family}/{strategy}"]
    dense = findings[0]["dense"][family]
    assert served["tokens"] == dense
    ended = {name: "stop" if answer[-1] == EOS and name != "request 4" else "length" for name, answer in dense.items()}
    assert served["reasons"] == ended
    assert findings[1]["served"][f"{family}/{strategy}"]["tokens"] == {}


def test_small_steps_gather_no_counts(findings: list[dict[str, Any]]) -> None:
    served = [answers for finding in findings for answers in finding["served"].values()]
    assert [answers["gathers"] for answers in served] == [0] * len(served)


def test_some_answers_ended_themselves(findings: list[dict[str, Any]]) -> None:
    reasons = [reason for served in findings[0]["served"].values() for reason in served["reasons"].values()]
    assert {"stop", "length"} == set(reasons)


@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_neighbours_do_not_change_a_sampled_answer(findings: list[dict[str, Any]], rank: int) -> None:
    together, alone = findings[rank]["sampled"]
    assert together == alone == findings[0]["sampled"][0]
    assert len(alone) == 8


@pytest.mark.parametrize("rank", range(NUM_RANKS))
@pytest.mark.parametrize("family", SCORED_FAMILIES)
def test_only_requests_with_a_broken_token_end_by_it(findings: list[dict[str, Any]], family: str, rank: int) -> None:
    check_only_broken_end(findings[rank]["broken"][family])


@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_a_cancelled_request_gets_no_more_tokens(findings: list[dict[str, Any]], rank: int) -> None:
    cancelled = findings[rank]["cancelled"]
    assert cancelled["delivered"] == cancelled["delivered later"] < 110
    assert cancelled["reasons"] == {"short": "length"}


@pytest.mark.parametrize("family", SCORED_FAMILIES)
def test_scores_are_those_of_the_dense_model(findings: list[dict[str, Any]], family: str) -> None:
    scored = findings[0]["scored"][family]
    assert len(scored["served"]) == len(scored["dense"]) == 29 + 4
    for served, dense in zip(scored["served"], scored["dense"], strict=True):
        assert served[0] == pytest.approx(dense[0], abs=1e-4)
        assert served[1] == dense[1]
        assert served[2] == pytest.approx(dense[2], abs=1e-4)
    for alone, dense in zip(scored["alone"], scored["dense"][:19], strict=True):
        assert (alone[0], alone[1]) == (pytest.approx(dense[0], abs=1e-4), dense[1][:2])
    assert scored["reasons"] == {"scored": "length", "prompt only": "length"}


def test_a_failing_rank_is_named_and_ends_the_others(findings: list[dict[str, Any]]) -> None:
    assert findings[1]["failure"] == {"text": "MoE layer 1 on rank 1: 'a bug'", "is_consequence": False}
    assert findings[0]["failure"]["is_consequence"]
