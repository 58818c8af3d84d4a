"""Answers that follow a grammar: of the next token's logits those remain that it allows. Grammars are llguidance's."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import llguidance.hf
import llguidance.numpy
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GrammarError(RuntimeError):
    """A grammar that does not go with the tokenizer, or with the tokens of an answer."""


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

    def matcher(self, grammar: str, answered_ids: Sequence[int]) -> GrammarMatcher:
        """The matcher of an answer, of which these tokens are there.

        Raises:
            GrammarError: the grammar is none, or does not allow them.
        """
        matcher = GrammarMatcher(self._tokenizer, grammar)
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
