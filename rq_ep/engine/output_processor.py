"""The state of a rank's unfinished requests, and the outputs that each step gives them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from rq_ep.engine.nonfinite import NOT_FINITE, is_finite
from rq_ep.engine.requests import Output, Request, Sampling, Score
from rq_ep.engine.routed_experts import SequenceRouting
from rq_ep.engine.scoring import score_tokens
from rq_ep.engine.tokens.grammars import AnswerMatcher, GrammarError, mask_tokens
from rq_ep.engine.tokens.logits_processors import TokenHistory, processed_logits
from rq_ep.engine.tokens.sampling import next_tokens

GREEDY = Sampling()
NO_HISTORY = TokenHistory()
GRAMMAR_FAILED = "the answer cannot follow its grammar"


@dataclass
class RequestState:
    """An unfinished request: how many of its tokens were delivered, and what its steps leave for the next output.

    `answer_ids` are the tokens chosen so far, `end_token_ids` those that end it.
    """

    request: Request
    end_token_ids: frozenset[int] = frozenset()
    answer_ids: list[int] = field(default_factory=list)
    num_delivered: int = 0
    scores: list[Score] = field(default_factory=list)
    problem: str | None = None  # why it cannot go on
    matcher: AnswerMatcher | None = None  # of the grammar that the answer follows
    routing: SequenceRouting | None = None  # where its experts are asked for

    def go_to(self, position: int) -> None:
        """Forget what was chosen at a position and after it: a step is made again."""
        del self.answer_ids[position - len(self.request.prompt_ids) :]
        if self.matcher is not None:
            self.matcher.go_back(self.request.num_answered + len(self.answer_ids))

    def token_ids(self) -> list[int]:
        """Its tokens so far."""
        return [*self.request.prompt_ids, *self.answer_ids]

    def choose(self, token_id: int) -> None:
        """Take the next token."""
        self.answer_ids.append(token_id)
        if self.matcher is not None and self.problem is None:
            try:
                self.matcher.accept(token_id)
            except GrammarError as error:
                self.problem = f"{GRAMMAR_FAILED}: {error}"

    @property
    def history(self) -> TokenHistory:
        """The request's tokens so far; those of the answer that another rank has given are at the end of the prompt."""
        ids, num_prompt = self.request.prompt_ids, len(self.request.prompt_ids) - self.request.num_answered
        return TokenHistory(ids[:num_prompt], [*ids[num_prompt:], *self.answer_ids], self.end_token_ids)


def choose_tokens(
    logits_NV: torch.Tensor, states: Sequence[RequestState | None], positions: Sequence[int]
) -> torch.Tensor:
    """Choose the next tokens of requests, and leave in their states what the next output says of them.

    Args:
        logits_NV: [N, V] float32.
        states: N, of the requests; None: nobody waits for one.
        positions: N, places of the new tokens in their sequences.

    Returns:
        [N] int64 token ids.
    """
    for state, position in zip(states, positions, strict=True):
        if state is not None:
            state.go_to(position)
    samplings = [GREEDY if state is None else state.request.sampling for state in states]
    histories = [
        state.history if state is not None and state.request.sampling.processes_logits else NO_HISTORY
        for state in states
    ]
    processed_NV = processed_logits(logits_NV, samplings, histories)
    matchers = [None if state is None or state.problem is not None else state.matcher for state in states]
    if any(matcher is not None for matcher in matchers):
        processed_NV, errors = mask_tokens(processed_NV, matchers)
        for row, error in errors.items():
            if (state := states[row]) is not None:
                state.problem = f"{GRAMMAR_FAILED}: {error}"
    tokens_N = next_tokens(processed_NV, samplings, positions)
    for state, token in zip(states, tokens_N.tolist(), strict=True):
        if state is not None:
            state.choose(token)
    for row, (state, has_finite_logits) in enumerate(zip(states, is_finite(logits_NV).tolist(), strict=True)):
        if state is None:
            continue
        if not has_finite_logits:
            state.problem = NOT_FINITE
        if (num_top := state.request.num_logprobs) is not None:
            state.scores += score_tokens(logits_NV[row : row + 1], tokens_N[row : row + 1], num_top)
    return tokens_N


class OutputProcessor(OutputRouter):
    """Turns the manager's cumulative outputs into the new tokens of each request, one call for each step.

    Args:
        requests: the requests still wanted, by id; a request that ends is taken out.
        on_outputs: called with the outputs of a step.
        on_broken: called with the id of a request that has ended with an error while its batch goes on with it.
        collect_routing: called before outputs are made, to complete what requests know of their experts.
    """

    def __init__(
        self,
        requests: dict[str, RequestState],
        on_outputs: Callable[[list[Output]], None],
        on_broken: Callable[[str], None],
        collect_routing: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._requests = requests
        self._on_outputs = on_outputs
        self._on_broken = on_broken
        self._collect_routing = collect_routing

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        wanted = [(output, state) for output in outputs if (state := self._requests.get(output.request_id)) is not None]
        self._collect_routing()
        if new := [made for output, state in wanted for made in self._new_outputs(output, state)]:
            self._on_outputs(new)

    def prompt_scored(self, request: Request, scores: list[Score], is_last: bool) -> None:
        """Deliver the scores of a part of a prompt; where no answer is wanted, the last part ends the request."""
        if request.id not in self._requests:
            return
        is_all = is_last and request.max_tokens == 0
        if is_all:
            self._requests.pop(request.id, None)
        self._on_outputs([Output(request.id, [], "length" if is_all else None, prompt_scores=scores)])

    def fail(self, request: Request, reason: str) -> None:
        """End a request with an error."""
        if self._requests.pop(request.id, None) is not None:
            self._on_outputs([Output(request.id, [], "error", reason)])

    def _new_outputs(self, output: GenerationOutput, state: RequestState) -> list[Output]:
        made = self._new_output(output, state)
        if state.routing is None or made.finish_reason == "error":
            return [made]
        parts = state.routing.take(is_last=made.finish_reason is not None)
        last = parts.pop() if parts else None
        return [*(Output(made.request_id, [], routed=part) for part in parts), replace(made, routed=last)]

    def _new_output(self, output: GenerationOutput, state: RequestState) -> Output:
        token_ids = output.generated_tokens[state.num_delivered :]
        queued_s = None if state.num_delivered else output.lifespan[0] - output.created_time
        state.num_delivered = len(output.generated_tokens)
        scores, state.scores = state.scores, []
        if state.problem is not None:
            self._requests.pop(output.request_id, None)
            self._on_broken(output.request_id)
            return Output(output.request_id, [], "error", state.problem)
        if not output.is_finished():
            return Output(output.request_id, token_ids, scores=scores, queued_s=queued_s)
        self._requests.pop(output.request_id, None)
        if output.status == RequestStatus.FAILED:
            return Output(output.request_id, token_ids, "error", output.error or "the request failed")
        ended_itself = bool(token_ids) and token_ids[-1] in state.end_token_ids
        reason = "stop" if ended_itself else "length"
        return Output(output.request_id, token_ids, reason, scores=scores, queued_s=queued_s)
