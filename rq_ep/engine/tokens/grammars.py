"""Answers that follow a grammar: of the next token's logits those remain that it allows. Grammars are llguidance's.

Axes: N rows, V tokens of the vocabulary, W words of 32 bits, one for each token.
"""

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Protocol

import llguidance.hf
import llguidance.numpy
import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from rq_ep.engine.requests import ReasoningTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GrammarError(RuntimeError):
    """A grammar that does not go with the tokenizer, or with the tokens of an answer."""


Bits = npt.NDArray[np.int32]
ALL = np.int32(-1)  # tokens of a word


class AnswerMatcher(Protocol):
    """What may come next in an answer. `accept` and `complete` raise `GrammarError`."""

    def go_back(self, num_tokens: int) -> None: ...

    def accept(self, token_id: int) -> None: ...

    @property
    def next_tokens(self) -> LLMatcher | None:
        """What fills the bits of the tokens that may come next; None: all of them may, before `complete`."""

    def complete(self, bits_W: Bits) -> None:
        """Change the bits that were filled, in place: at least one remains."""


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

    @property
    def next_tokens(self) -> LLMatcher:
        return self._matcher

    def complete(self, bits_W: Bits) -> None:
        """Leave the bits as the grammar has filled them.

        Raises:
            GrammarError: it is too large to be followed.
        """
        self._check()

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

    @property
    def next_tokens(self) -> LLMatcher | None:
        return None if self._num_reasoning is None else self._matcher.next_tokens

    def complete(self, bits_W: Bits) -> None:
        """Let reasoning begin where it may, and not end the answer.

        Raises:
            GrammarError: the grammar is too large to be followed.
        """
        opening = self._tokens.opening
        if self._num_reasoning is None:
            for token_id in self._end_token_ids:
                bits_W[token_id // 32] &= ~_bit(token_id)
            return
        self._matcher.complete(bits_W)
        if opening is not None and not self._answer_ids:
            bits_W[opening // 32] |= _bit(opening)

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


def mask_tokens(
    logits_NV: torch.Tensor, matchers: Sequence[AnswerMatcher | None]
) -> tuple[torch.Tensor, dict[int, GrammarError]]:
    """Rule out what may not come next in answers; the bits of all rows are filled at once, and applied at once.

    Args:
        logits_NV: [N, V] float32, which is left as it is.
        matchers: N; None: every token may come.

    Returns:
        The logits with those of other tokens at minus infinity; and the errors of rows, which are left as they are.
    """
    num_rows, num_tokens = logits_NV.shape
    bits_NW = np.full((num_rows, -(-num_tokens // 32)), ALL)
    rows = {row: matcher for row, matcher in enumerate(matchers) if matcher is not None}
    _fill(bits_NW, [(filler, row) for row, matcher in rows.items() if (filler := matcher.next_tokens) is not None])
    errors = {}
    for row, matcher in rows.items():
        try:
            matcher.complete(bits_NW[row])
        except GrammarError as error:
            bits_NW[row] = ALL
            errors[row] = error
    # Not `masked_fill`, which is slower on a CPU.
    return torch.where(_is_allowed(bits_NW, num_tokens, logits_NV.device), logits_NV, float("-inf")), errors


def _fill(bits_NW: Bits, fillers: list[tuple[LLMatcher, int]]) -> None:
    if len(fillers) == 1:
        llguidance.numpy.fill_next_token_bitmask(fillers[0][0], bits_NW, fillers[0][1])
    elif fillers:
        llguidance.numpy.fill_next_token_bitmask_par(_executor(), fillers, bits_NW)


@cache
def _executor() -> LLExecutor:
    """Threads that fill the bits of several rows; they hold no state."""
    return LLExecutor()


def _is_allowed(bits_NW: Bits, num_tokens: int, device: torch.device) -> torch.Tensor:
    """[N, V] bits, unpacked where the logits are, so that an eighth of the bytes travels."""
    packed = bits_NW.view(np.uint8)
    if device.type == "cpu":  # where torch is slower at it
        unpacked = np.unpackbits(packed, axis=1, count=num_tokens, bitorder="little")
        return torch.from_numpy(unpacked).view(torch.bool)
    places = torch.arange(8, dtype=torch.uint8, device=device)
    bytes_ = torch.from_numpy(packed).to(device)
    return (bytes_[:, :, None] >> places).bitwise_and_(1).flatten(1)[:, :num_tokens].bool()


def _bit(token_id: int) -> np.int32:
    return np.uint32(1 << token_id % 32).astype(np.int32)


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
