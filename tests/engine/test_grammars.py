"""Answers that follow a grammar, whatever the model would have said."""

import json
import re

import pytest
import torch
from llguidance import LLMatcher, grammar_from
from transformers import PreTrainedTokenizerBase

from rq_ep.engine.output_processor import RequestState, choose_tokens
from rq_ep.engine.requests import ReasoningTokens, Request, Sampling
from rq_ep.engine.tokens.grammars import GrammarError, Grammars, mask_tokens
from rq_ep.model.text.byte_tokenizer import byte_tokenizer

PROMPT = [5, 6]
SCHEMA = json.dumps({
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"enum": [1, 2, 30]}},
    "required": ["name", "n"], "additionalProperties": False,
})  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer(512)


@pytest.fixture(scope="module")
def grammars(tokenizer: PreTrainedTokenizerBase) -> Grammars:
    return Grammars(lambda: tokenizer, len(tokenizer) + 3, [tokenizer.eos_token_id])


def drawn(grammars: Grammars, grammar: str, seed: int, num_given: int = 0, given: list[int] | None = None) -> list[int]:
    """An answer of a model whose logits are noise; its first tokens may be there already, from another rank."""
    given = (given or [])[:num_given]
    request = Request(
        "a", [*PROMPT, *given], 400, Sampling(1.0, seed=seed), grammar=grammar, num_answered=len(given)
    )  # fmt: skip
    state = RequestState(request, frozenset({258}))
    state.matcher = grammars.matcher(grammar, state.history.answer_ids)
    free = RequestState(Request("b", PROMPT, 400))
    answer = list(given)
    while not answer or answer[-1] != 258:
        position = len(PROMPT) + len(answer)
        logits_NV = torch.randn(2, 262, generator=torch.Generator().manual_seed(position))
        tokens_N = choose_tokens(logits_NV, [state, free], [position, position])
        assert int(tokens_N[1]) == int(logits_NV[1].argmax()), "its neighbour is left as it is"
        assert state.problem is None
        answer.append(int(tokens_N[0]))
        assert len(answer) < 400
    return answer


@pytest.mark.parametrize("seed", range(5))
def test_noise_becomes_json_of_the_schema(grammars: Grammars, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    grammar = grammar_from("json_schema", SCHEMA)
    answer = drawn(grammars, grammar, seed)
    value = json.loads(tokenizer.decode(answer[:-1]))
    assert set(value) == {"name", "n"}
    assert len(value["name"]) <= 5
    assert value["n"] in (1, 2, 30)
    assert drawn(grammars, grammar, seed, 7, answer) == answer, "it goes on on another rank as it would have"


HARMONY_CLOSING = [1, 2, 3]  # as a header of the final channel: some tokens may stand before the last


@pytest.mark.parametrize(
    ("opening", "closing", "reasoning"),
    [
        (None, [3], [7, 1, 3]),
        (9, [3], [9, 3]),
        (9, [3], []),
        (None, HARMONY_CLOSING, [1, 7, 3, 2, 1, 2, 8, 3]),
    ],
)
def test_an_answer_of_a_given_form_may_reason_first(
    grammars: Grammars, opening: int | None, closing: list[int], reasoning: list[int]
) -> None:
    answer = [*reasoning, *b"yes"]
    matcher = grammars.matcher(grammar_from("choice", '["yes"]'), [], ReasoningTokens(opening, closing))
    for start in (0, max(len(reasoning) - 1, 0), 1):  # steps are made again
        matcher.go_back(start)
        for number in range(start, len(answer)):
            masked_NV, errors = mask_tokens(torch.zeros(2, 262), [None, matcher])
            allowed = set(torch.nonzero(masked_NV[1] == 0).flatten().tolist())
            assert not errors
            assert not masked_NV[0].any(), "its neighbour is left as it is"
            if number == 0 and opening is not None:
                assert allowed == {opening, ord("y")}
            elif number < len(reasoning):
                assert set(range(262)) - allowed == {258}, "reasoning ends no answer"
            else:
                assert allowed == {answer[number]}
            matcher.accept(answer[number])


def test_choices_and_expressions_are_followed(grammars: Grammars, tokenizer: PreTrainedTokenizerBase) -> None:
    said = {tokenizer.decode(drawn(grammars, grammar_from("choice", '["yes", "no"]'), seed)[:-1]) for seed in range(12)}
    assert said == {"yes", "no"}
    text = tokenizer.decode(drawn(grammars, grammar_from("regex", "[ab]{3}-[0-9]+x"), 1)[:-1])
    assert re.fullmatch("[ab]{3}-[0-9]+x", text)


def test_a_step_that_is_made_again_accepts_its_token_once(grammars: Grammars) -> None:
    request = Request("a", PROMPT, 9, Sampling(), grammar="")
    state = RequestState(request, frozenset({258}))
    state.matcher = grammars.matcher(grammar_from("choice", '["yes"]'), [])
    logits_1V = torch.zeros(1, 262)
    first = choose_tokens(logits_1V, [state], [2])
    assert first.tolist() == [ord("y")]
    assert choose_tokens(logits_1V, [state], [2]).tolist() == [ord("y")]
    assert choose_tokens(logits_1V, [state], [3]).tolist() == [ord("e")]
    assert state.answer_ids == [ord("y"), ord("e")]


def test_what_is_no_grammar_is_an_error_of_the_request_alone(grammars: Grammars) -> None:
    with pytest.raises(GrammarError, match="frob"):
        grammars.matcher(LLMatcher.grammar_from_json_schema('{"type": "frob"}'), [])
    with pytest.raises(GrammarError, match="doesn't satisfy the grammar"):
        grammars.matcher(grammar_from("choice", '["yes"]'), [ord("n")])
