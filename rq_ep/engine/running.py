"""The requests of a rank that are still wanted, and the news of them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from rq_ep.engine.requests import Output, Request, Score


@dataclass
class Running:
    """A request, how much of its answer has been told, and what its steps leave for the next news."""

    request: Request
    num_told: int = 0
    scores: list[Score] = field(default_factory=list)
    is_broken: bool = False  # a step gave logits that are not finite


class News(OutputRouter):
    """Turns the manager's cumulative outputs into what is new of each request, one call for each step.

    Args:
        running: the requests still wanted, by id; a request that ends is taken out.
        eos_token_ids: tokens with which an answer ends itself.
        on_outputs: told the news.
        on_broken: told the id of a request that has ended with an error while its batch goes on with it.
    """

    def __init__(
        self,
        running: dict[str, Running],
        eos_token_ids: frozenset[int],
        on_outputs: Callable[[list[Output]], None],
        on_broken: Callable[[str], None],
    ) -> None:
        super().__init__()
        self._running = running
        self._eos_token_ids = eos_token_ids
        self._on_outputs = on_outputs
        self._on_broken = on_broken

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        wanted = [(output, found) for output in outputs if (found := self._running.get(output.request_id)) is not None]
        if news := [self._new_part(output, found) for output, found in wanted]:
            self._on_outputs(news)

    def prompt_scored(self, request: Request, scores: list[Score]) -> None:
        """Tell the scores of a prompt; where no answer is wanted, that is all."""
        if request.id not in self._running:
            return
        is_all = request.max_tokens == 0
        if is_all:
            self._running.pop(request.id, None)
        self._on_outputs([Output(request.id, [], "length" if is_all else None, prompt_scores=scores)])

    def _new_part(self, output: GenerationOutput, found: Running) -> Output:
        token_ids = output.generated_tokens[found.num_told :]
        queued_s = None if found.num_told else output.lifespan[0] - output.created_time
        found.num_told = len(output.generated_tokens)
        scores, found.scores = found.scores, []
        if found.is_broken:
            self._running.pop(output.request_id, None)
            self._on_broken(output.request_id)
            return Output(output.request_id, [], "error", "the model's logits are not finite")
        if not output.is_finished():
            return Output(output.request_id, token_ids, scores=scores, queued_s=queued_s)
        self._running.pop(output.request_id, None)
        if output.status == RequestStatus.FAILED:
            return Output(output.request_id, token_ids, "error", output.error or "the request failed")
        ended_itself = bool(token_ids) and token_ids[-1] in self._eos_token_ids
        reason = "stop" if ended_itself else "length"
        return Output(output.request_id, token_ids, reason, scores=scores, queued_s=queued_s)
