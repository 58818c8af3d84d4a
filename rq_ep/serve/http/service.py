"""The model behind the routes: whether it can be asked, and its answers, as text within stop strings."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from rq_ep.engine.requests import Output, Request, Score
from rq_ep.serve.http.metrics import Metrics, RequestMetrics
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.choices import after, setting
from rq_ep.serve.http.openai.chunks import Chunk, TextChunker
from rq_ep.serve.http.openai.detokenizer import Detokenizer, detokenizers
from rq_ep.serve.http.openai.prompt_encoder import PromptEncoder
from rq_ep.serve.http.openai.schemas import DetokenizeBody, GenerationBody, TokenizeBody
from rq_ep.serve.http.openai.tool_parsers.message_parser import MessageParser
from rq_ep.serve.http.prompt_reader import PromptReader
from rq_ep.serve.http.ranks.membership import Membership
from rq_ep.serve.http.recording_controller import RecordingController
from rq_ep.serve.http.request_factory import RequestFactory
from rq_ep.serve.http.routing_collector import RoutingCollector
from rq_ep.serve.http.served_model import ModelLimits, ServedModel
from rq_ep.serve.http.views.history import History
from rq_ep.serve.http.views.load_view import LoadView
from rq_ep.serve.http.views.membership_view import MembershipView
from rq_ep.serve.http.views.placement_view import PlacementView
from rq_ep.serve.http.views.rebalance_view import RebalanceView

MAX_ECHOED_TOKENS = 512  # of a prompt, with their scores, in one chunk: the event loop is busy while it writes it


class Ranks(Protocol):
    """The part of a `RankRouter` that is needed here."""

    @property
    def num_unfinished(self) -> int: ...

    def why_unavailable(self) -> str | None: ...

    def generate(self, request: Request, beside: str | None = None) -> AsyncIterator[Output]: ...


class Service:
    """The model behind the routes. What its files say, and its limits, arrive while the ranks load.

    Args:
        model_name: that clients know it by.
        seed: from which requests without a seed get theirs.
        ranks: answer the requests.
        metrics: of the server.
        recording: of routing decisions.
        rebalancing: what is shown of re-placements, and commands of them; None: there are none.
        members: what is shown of the ranks, and changes of them; None: there are none.
        model_root: what is served under the name; None: the same.
        info: of the server.
    """

    def __init__(
        self,
        model_name: str,
        seed: int,
        ranks: Ranks,
        metrics: Metrics,
        recording: RecordingController,
        rebalancing: RebalanceView | None = None,
        members: MembershipView | None = None,
        model_root: str | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self.model_name = model_name
        self.model_root = model_root or model_name
        self.metrics = metrics
        self.info = dict(info or {})
        self.limits: ModelLimits | None = None
        self.placement = PlacementView()
        self.load_view = LoadView()
        self.history = History(metrics)
        self.recording = recording
        self.rebalancing = rebalancing or RebalanceView(None)
        self.members = members or MembershipView(Membership(0))
        self._seed = seed
        self._ranks = ranks
        self._routing = RoutingCollector()
        self._model: ServedModel | None = None
        self._prompts: PromptReader | None = None
        self._request_factory: RequestFactory | None = None
        self._detokenizers: dict[tuple[str, ...], Callable[[], Detokenizer]] = {}  # by the marks that they show

    # What arrives

    def take_model(self, model: ServedModel) -> None:
        """Take what the files of the model say."""
        self._model = model
        self._detokenizers.clear()
        self._complete()

    def begin(self, limits: ModelLimits, placement: dict[str, Any], info: Mapping[str, Any]) -> None:
        """Every rank can serve.

        Args:
            limits: of the model.
            placement: that is served, as `placement.json` holds it.
            info: of the ranks, beside that of the server.
        """
        self.limits = limits
        self.placement.begin(placement)
        self.info |= info
        self._complete()

    def _complete(self) -> None:
        if self._model is not None and self.limits is not None:
            encoder = PromptEncoder(self._model.tokenizer, self.limits.max_model_len)
            self._prompts = PromptReader(self.model_name, self._model, self.limits, encoder)
            self._request_factory = RequestFactory(self._seed, self._model, self.limits, encoder)

    # Whether the model can be asked

    def why_unavailable(self) -> str | None:
        """Why nothing can be answered now; None if it can."""
        reason = self._ranks.why_unavailable()
        return reason or ("the model is loading" if self._prompts is None else None)

    def check_available(self) -> None:
        """Refuse a request that comes when none can be answered."""
        if (reason := self.why_unavailable()) is not None:
            raise ApiError(503, f"not serving: {reason}")

    def check_model(self, body: GenerationBody | TokenizeBody | DetokenizeBody) -> None:
        """Refuse a request for another model; not every body names one."""
        if body.model is not None and body.model != self.model_name:
            raise self.no_such_model(body.model)

    def no_such_model(self, name: str) -> ApiError:
        return ApiError(404, f"there is no model {name!r:.200} here: this server serves {self.model_name!r}", "model")

    # Once it can

    @property
    def prompts(self) -> PromptReader:
        """Reads the prompts of bodies."""
        assert self._prompts is not None
        return self._prompts

    @property
    def request_factory(self) -> RequestFactory:
        """Makes the requests of bodies."""
        assert self._request_factory is not None
        return self._request_factory

    def message_parsers(self, requests: Sequence[Request], body: GenerationBody) -> list[MessageParser]:
        """What parses the answers to a chat; nothing does to a completion."""
        assert self._model is not None
        return self._model.message_parsers(requests, body)

    def answers(
        self, requests: Sequence[Request], body: GenerationBody, times: RequestMetrics
    ) -> list[AsyncIterator[Chunk]]:
        """The answers of a body's requests. Those to one prompt wait for its first one, whose cache they share."""
        answers: list[AsyncIterator[Chunk]] = []
        for at in range(0, len(requests), body.num_tries):
            first, *others = requests[at : at + body.num_tries]
            has_begun = asyncio.Event()
            answers.append(setting(has_begun, self.chunks(first, body, times.of_another())))
            answers += [
                after(has_begun, self.chunks(request, body, times.of_another(), beside=first.id)) for request in others
            ]
        return answers

    async def chunks(
        self, request: Request, body: GenerationBody, times: RequestMetrics, beside: str | None = None
    ) -> AsyncIterator[Chunk]:
        """Generate an answer, cut at the first stop string; leaving early cancels it.

        Args:
            request: what is to be answered.
            body: what the client has sent.
            times: measures the answer.
            beside: the id of an unfinished request with the same prompt.
        """
        times.prompt(len(request.prompt_ids))
        async with aclosing(self._chunks(request, body, times, beside)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                if chunk.finish_reason is not None:
                    times.finished(chunk.finish_reason)
                yield chunk
                if chunk.finish_reason is not None:
                    return

    async def _chunks(
        self, request: Request, body: GenerationBody, times: RequestMetrics, beside: str | None
    ) -> AsyncIterator[Chunk]:
        text = TextChunker(
            self._detokenizer(body), body.stops, body.include_stop_str_in_output, request.sampling.min_tokens,
            request.sampling.stop_token_ids,
        )  # fmt: skip
        if not body.echoes:
            text.skip(request.prompt_ids)
        elif not request.scores_prompt:
            reason = None if request.max_tokens else "length"
            yield await asyncio.to_thread(text.echo, request.prompt_ids, None, reason)
            if reason is not None:
                return
        num_echoed = 0
        outputs = self._ranks.generate(request, beside)
        with self._routing.answer() as routing:
            async with aclosing(outputs):  # type: ignore[type-var]
                async for output in outputs:
                    if output.prompt_scores is not None:
                        # The first token of a prompt has no score.
                        scores = [*([] if num_echoed else [None]), *output.prompt_scores]
                        token_ids = request.prompt_ids[num_echoed : num_echoed + len(scores)]
                        num_echoed += len(scores)
                        async for chunk in _echoed(text, token_ids, scores, output.finish_reason):
                            yield chunk
                        continue
                    if output.routed is not None:
                        routing.add(output.routed)
                        if not output.token_ids:
                            continue
                    times.tokens(len(output.token_ids), output.queued_s)
                    chunk = text.chunk(output)
                    if request.routed_from is not None and chunk.finish_reason is not None:
                        chunk = replace(chunk, routed_experts=await asyncio.to_thread(routing.encoded))
                    yield chunk

    def _detokenizer(self, body: GenerationBody) -> Detokenizer:
        assert self._model is not None
        marks = self._model.parsers.marks(body)
        if marks not in self._detokenizers:
            self._detokenizers[marks] = detokenizers(self._model.tokenizer, marks)
        return self._detokenizers[marks]()


async def _echoed(
    text: TextChunker, prompt_ids: Sequence[int], scores: Sequence[Score | None], finish_reason: str | None
) -> AsyncIterator[Chunk]:
    """A part of a prompt with its scores, at least one chunk of it: the last part of a prompt may be empty."""
    for start in range(0, max(len(scores), 1), MAX_ECHOED_TOKENS):
        end = start + MAX_ECHOED_TOKENS
        reason = finish_reason if end >= len(scores) else None
        yield await asyncio.to_thread(text.echo, prompt_ids[start:end], scores[start:end], reason)
