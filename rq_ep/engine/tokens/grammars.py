"""Answers that follow a grammar: of the next token's logits those remain that it allows. Grammars are llguidance's."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import llguidance.hf
import llguidance.numpy
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer

from rq_ep.engine.requests import ReasoningTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GrammarError(RuntimeError):
    """A grammar that does not go with the tokenizer, or with the tokens of an answer."""


class AnswerMatcher(Protocol):
    """What may come next in an answer. Each method but `go_back` raises `GrammarError`."""

    def go_back(self, num_tokens: int) -> None: ...

    def accept(self, token_id: int) -> None: ...

    def mask(self, logits_V: torch.Tensor) -> None: ...


class GrammarMatcher:
    """One answer and its grammar.

    Args:
        tokenizer: of the model.
        grammar: as llguidance writes it.

    Raises:
        GrammarError: it is none.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str) -> None:
        self._matcher = LLMatcher(tokenizer, grammar)
        self._bits = llguidance.numpy.allocate_token_bitmask(1, tokenizer.vocab_size)
        self._num_accepted = 0
        self._check()

    def go_back(self, num_tokens: int) -> None:
        """Forget the tokens of the answer after so many, if there are any: a step is made again."""
        if self._num_accepted > num_tokens:
            self._matcher.rollback(self._num_accepted - num_tokens)
            self._num_accepted = num_tokens

    def accept(self, token_id: int) -> None:
        """Take the next token of the answer.

        Raises:
            GrammarError: the grammar does not allow it.
        """
        self._matcher.consume_token(token_id)
        self._check()
        self._num_accepted += 1

    def mask(self, logits_V: torch.Tensor) -> None:
        """Rule out the tokens that the grammar does not allow next, in place: one at least remains.

        Raises:
            GrammarError: it is too large to be followed.
        """
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits, 0)
        self._check()
        is_allowed = np.unpackbits(self._bits[0].view(np.uint8), bitorder="little")[: len(logits_V)].astype(bool)
        logits_V.masked_fill_(torch.from_numpy(~is_allowed).to(logits_V.device), float("-inf"))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(" ".join(self._matcher.get_error().split())[:200])


class ReasoningMatcher:
    """An answer that may reason before it follows its grammar; reasoning does not end it.

    Args:
        matcher: of the grammar.
        tokens: of reasoning.
        end_token_ids: that end an answer.
    """

    def __init__(self, matcher: GrammarMatcher, tokens: ReasoningTokens, end_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._end_token_ids = list(end_token_ids)
        self._answer_ids: list[int] = []
        self._num_reasoning = self._find_num_reasoning()

    def go_back(self, num_tokens: int) -> None:
        """Forget the tokens of the answer after so many, if there are any: a step is made again."""
        if len(self._answer_ids) <= num_tokens:
            return
        del self._answer_ids[num_tokens:]
        if self._num_reasoning is not None:
            self._matcher.go_back(max(num_tokens - self._num_reasoning, 0))
        self._num_reasoning = self._find_num_reasoning()

    def accept(self, token_id: int) -> None:
        """Take the next token of the answer.

        Raises:
            GrammarError: the grammar does not allow it.
        """
        self._answer_ids.append(token_id)
        if len(self._answer_ids) == 1:
            self._num_reasoning = self._find_num_reasoning()
        if self._num_reasoning is None:
            if self._is_closed(len(self._answer_ids)):
                self._num_reasoning = len(self._answer_ids)
        elif len(self._answer_ids) > self._num_reasoning:
            self._matcher.accept(token_id)

    def mask(self, logits_V: torch.Tensor) -> None:
        """Rule out the tokens that may not come next, in place: one at least remains.

        Raises:
            GrammarError: the grammar is too large to be followed.
        """
        opening = self._tokens.opening
        if self._num_reasoning is None:
            logits_V[self._end_token_ids] = float("-inf")
        elif opening is None or self._answer_ids:
            self._matcher.mask(logits_V)
        else:
            opening_logit = logits_V[opening].clone()
            self._matcher.mask(logits_V)
            logits_V[opening] = opening_logit

    def _find_num_reasoning(self) -> int | None:
        """How many tokens of the answer are reasoning; None: all so far, and it has not ended."""
        if self._tokens.opening is not None and self._answer_ids[:1] != [self._tokens.opening]:
            return 0
        ends = range(1, len(self._answer_ids) + 1)
        return next((end for end in ends if self._is_closed(end)), None)

    def _is_closed(self, end: int) -> bool:
        """Whether the last of some tokens of the answer ends reasoning."""
        *beginning, last = self._tokens.closing
        if self._answer_ids[end - 1] != last:
            return False
        if not beginning:
            return True
        places = (at for at in range(end - 1, -1, -1) if self._answer_ids[at] == beginning[0])
        at = next(places, end)
        return self._answer_ids[at : at + len(beginning)] == beginning


class Grammars:
    """Makes the matchers of requests.

    Args:
        read_tokenizer: reads the model's tokenizer; called for the first request with a grammar, as it takes a second.
        vocab_size: of the model's logits.
        end_token_ids: that end an answer.
    """

    def __init__(
        self, read_tokenizer: Callable[[], "PreTrainedTokenizerBase"], vocab_size: int, end_token_ids: Sequence[int]
    ) -> None:
        self._read_tokenizer = read_tokenizer
        self._vocab_size = vocab_size
        self._end_token_ids = list(end_token_ids)

    def matcher(
        self, grammar: str, answered_ids: Sequence[int], reasoning: ReasoningTokens | None = None
    ) -> AnswerMatcher:
        """The matcher of an answer.

        Args:
            grammar: that it follows.
            answered_ids: its tokens that are there.
            reasoning: that may precede it.

        Raises:
            GrammarError: the grammar is none, or does not allow them.
        """
        matcher: AnswerMatcher
        matcher = of_grammar = GrammarMatcher(self._tokenizer, grammar)
        if reasoning is not None:
            matcher = ReasoningMatcher(of_grammar, reasoning, self._end_token_ids)
        for token_id in answered_ids:
            matcher.accept(token_id)
        return matcher

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        tokenizer: Any = self._read_tokenizer()
        try:
            return llguidance.hf.from_tokenizer(tokenizer, n_vocab=self._vocab_size, eos_token=self._end_token_ids)
        except ValueError as error:
            raise GrammarError(f"this model's tokenizer cannot follow grammars: {error}") from None
