"""Answers one request: prompt to token ids, token ids to text, within the model's limits."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from rq_ep.engine.requests import Output, Request, Sampling
from rq_ep.model.checkpoint.generation_defaults import SamplingDefaults
from rq_ep.serve.http.history import History
from rq_ep.serve.http.load_view import LoadView
from rq_ep.serve.http.membership_view import MembershipView
from rq_ep.serve.http.metrics import Metrics, RequestMetrics
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.bodies.answer_grammar import Guide, answer_grammar
from rq_ep.serve.http.openai.bodies.chat_messages import ChatMessage
from rq_ep.serve.http.openai.chat_template import render_chat
from rq_ep.serve.http.openai.choices import after, setting
from rq_ep.serve.http.openai.chunks import Chunk, TextChunker
from rq_ep.serve.http.openai.detokenizer import Detokenizer, detokenizers
from rq_ep.serve.http.openai.images import ImageProcessor
from rq_ep.serve.http.openai.prompt_encoder import PromptEncoder
from rq_ep.serve.http.openai.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
)
from rq_ep.serve.http.openai.tool_parsers.answer_parsers import AnswerParsers
from rq_ep.serve.http.openai.tool_parsers.forced_calls import calls_schema
from rq_ep.serve.http.openai.tool_parsers.message_parser import MessageParser
from rq_ep.serve.http.ranks.membership import Membership
from rq_ep.serve.http.rebalance_view import RebalanceView
from rq_ep.serve.http.recording_controller import RecordingController
from rq_ep.serve.http.routing_collector import RoutingCollector
from rq_ep.serve.messages import PlacementServed

DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's completions
CHARS_PER_MESSAGE = 100  # that are encoded in the time in which a template writes a message
GRAMMAR_CHARS = 1 << 20  # so are grammars
PROMPT_END = 32  # tokens of a prompt that show whether it begins the reasoning of the answer
IMAGE_CHARS = 1 << 20  # images are read on the threads of long prompts
ROUTED_EVERY = 32  # tokens whose experts come together
MAX_ECHOED_TOKENS = 512  # with their scores, in a chunk: the event loop writes it at once


class Ranks(Protocol):
    """The part of a `RankRouter` that is needed here."""

    @property
    def num_unfinished(self) -> int: ...

    def why_unavailable(self) -> str | None: ...

    def generate(self, request: Request, beside: str | None = None) -> AsyncIterator[Output]: ...


@dataclass(frozen=True)
class ModelLimits:
    """The limits of the model that requests can exceed."""

    max_model_len: int
    vocab_size: int
    max_queue_size: int = 1024
    routes_evenly: bool = True  # whether every token has as many experts in each layer


class EncodedPrompt(NamedTuple):
    """A prompt as the engine takes it: token ids, and the arrays of its images."""

    token_ids: list[int]
    images: Mapping[str, Any] = MappingProxyType({})


class Service:
    """The model behind the routes. Its tokenizer and limits arrive while the ranks load."""

    def __init__(
        self,
        model_name: str,
        seed: int,
        ranks: Ranks,
        metrics: Metrics,
        recording: RecordingController,
        rebalancing: RebalanceView | None = None,
        members: MembershipView | None = None,
    ) -> None:
        self.model_name = model_name
        self.model_root = model_name  # what is served under this name
        self.metrics = metrics
        self.limits: ModelLimits | None = None
        self.tokenizer: Any = None
        self.images: ImageProcessor | None = None
        self.why_text_only: str | None = "it takes no images"
        self.parsers = AnswerParsers()
        self.defaults = SamplingDefaults()
        self.info: dict[str, Any] = {}
        self.placement: dict[str, Any] | None = None
        self.load_view = LoadView()
        self.history = History(metrics)
        self.recording = recording
        self.rebalancing = rebalancing or RebalanceView(None)
        self.members = members or MembershipView(Membership(0))
        self._ranks = ranks
        self._seed = seed
        self._num_unseeded = 0
        self._routing = RoutingCollector()
        self._detokenizers: dict[tuple[str, ...], Callable[[], Detokenizer]] = {}

    def _new_detokenizer(self, body: GenerationBody) -> Detokenizer:
        """The detokenizer of an answer."""
        marks = self.parsers.marks(body)
        if marks not in self._detokenizers:
            self._detokenizers[marks] = detokenizers(self.tokenizer, marks)
        return self._detokenizers[marks]()

    def take_placement(self, served: PlacementServed) -> None:
        """Take what serves from now on: some layers, or all of a placement."""
        if served.placement is not None:
            self.placement = served.placement
        elif self.placement is not None:
            changed = {layer["layer"]: layer for layer in served.layers}
            layers = [changed.get(layer["layer"], layer) for layer in self.placement["layers"]]
            self.placement = {**self.placement, "layers": layers, "bytes": served.bytes_R, "certificate": {}}

    def why_unavailable(self) -> str | None:
        """Why nothing can be answered now; None if it can."""
        reason = self._ranks.why_unavailable()
        loading = self.tokenizer is None or self.limits is None
        return reason or ("the model is loading" if loading else None)

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

    @cached_property
    def _encoder(self) -> PromptEncoder:
        assert self.limits is not None
        return PromptEncoder(self.tokenizer, self.limits.max_model_len)

    async def completion_prompts(self, body: CompletionBody) -> list[EncodedPrompt]:
        """Token ids of a completion's prompts."""
        self._check_num_choices(len(body.prompt) * body.num_tries)
        return [
            EncodedPrompt(await self._encoder.encode(prompt, "prompt", add_special_tokens=True))
            if isinstance(prompt, str)
            else EncodedPrompt(prompt)
            for prompt in body.prompt
        ]

    def _check_num_choices(self, number: int) -> None:
        """Refuse a body that asks for more answers than may ever be under way."""
        assert self.limits is not None
        if number > self.limits.max_queue_size:
            text = f"{number} answers in one request, but at most {self.limits.max_queue_size} are made at once"
            raise ApiError(400, f"{text} (--max-queue-size)", "n")

    async def chat_prompts(self, body: ChatBody) -> list[EncodedPrompt]:
        """The prompt of a chat."""
        self._check_num_choices(body.n)
        return [await self._chat_prompt(body)]

    async def _chat_prompt(self, body: ChatBody) -> EncodedPrompt:
        """Token ids of a conversation, as the model's chat template writes it, and its images."""
        images, urls = self.images, body.image_urls
        if urls and images is None:
            raise ApiError(400, f"messages: {self.model_name} is served text-only: {self.why_text_only}", "messages")
        self.parsers.check(body)
        text = await self._rendered(body, body.messages)
        if images is not None and urls:
            sources = await images.fetch(urls)
            return EncodedPrompt(*await self._encoder.run(IMAGE_CHARS, partial(images.encode, text, sources)))
        return EncodedPrompt(await self._encoder.encode(text, "messages", add_special_tokens=False))

    async def _rendered(self, body: ChatBody | TokenizeBody, messages: Sequence[ChatMessage]) -> str:
        """The conversation of a body, with its tools, as the model's chat template writes it."""
        if not self.tokenizer.chat_template:
            raise ApiError(400, "this model's tokenizer has no chat template: use /v1/completions", "messages")
        effort = body.reasoning_effort if isinstance(body, ChatBody) else None
        try:
            return await self._encoder.run(
                CHARS_PER_MESSAGE * (len(messages) + len(body.tools or ())),
                partial(render_chat, self.tokenizer, messages, body.tools, body.chat_template_kwargs, effort),
            )
        except ApiError:
            raise
        except Exception as error:  # templates raise what they like: roles in a wrong order, say
            reason = " ".join(str(error).split())
            message = f"the model's chat template refuses the messages: {reason:.400}"
            raise ApiError(400, message, "messages") from None

    async def tokenize(self, body: TokenizeBody) -> dict[str, Any]:
        """Token ids of a text or a conversation, in vLLM's form."""
        assert self.limits is not None
        if any(message.has_images for message in body.messages or ()):
            raise ApiError(400, "messages: images are not tokenized here: leave them out", "messages")
        is_chat = body.messages is not None
        text = body.prompt if body.messages is None else await self._rendered(body, body.messages)
        assert text is not None
        adds = not is_chat if body.add_special_tokens is None else body.add_special_tokens
        param = "messages" if is_chat else "prompt"
        token_ids = await self._encoder.encode(text, param, add_special_tokens=adds)
        names = self.tokenizer.convert_ids_to_tokens(token_ids) if body.return_token_strs else None
        limit = self.limits.max_model_len
        return {"count": len(token_ids), "max_model_len": limit, "tokens": token_ids, "token_strs": names}

    async def detokenize(self, body: DetokenizeBody) -> dict[str, str]:
        """The text of token ids, with special tokens, in vLLM's form."""
        assert self.limits is not None
        if (highest := max(body.tokens, default=0)) >= self.limits.vocab_size:
            text = f"token id {highest} lies outside the vocabulary of {self.limits.vocab_size}"
            raise ApiError(400, text, "tokens")
        return {"prompt": await self._encoder.run(len(body.tokens), partial(self.tokenizer.decode, body.tokens))}

    async def requests(self, prompts: Sequence[EncodedPrompt], body: GenerationBody) -> list[Request]:
        """The requests of a body: those of its first prompt, then those of the next."""
        grammar = await self._grammar(body)
        return [self._request(prompt, body, number, grammar) for prompt in prompts for number in range(body.num_tries)]

    async def _grammar(self, body: GenerationBody) -> str | None:
        """The grammar that answers are to follow; None: they are free."""
        if (param := body.grammar_param) is None:
            return None
        wanted: Guide | None = body.structured_outputs or body.response_format
        if isinstance(body, ChatBody) and body.must_call:
            schemas, name = body.schemas, body.called_name
            wanted = calls_schema(schemas, body.max_calls) if name is None else schemas[name]
        assert wanted is not None
        return await self._encoder.run(GRAMMAR_CHARS, partial(answer_grammar, wanted, param))

    def _request(self, prompt: EncodedPrompt, body: GenerationBody, number: int, grammar: str | None) -> Request:
        """Fit a request into the model's limits, or refuse it with the limit and the count.

        Args:
            prompt: that is to be answered.
            body: what is asked for.
            number: of the answer, among those to this prompt.
            grammar: that it follows.
        """
        assert self.limits is not None
        prompt_ids = prompt.token_ids
        limit, num_prompt = self.limits.max_model_len, len(prompt_ids)
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        if num_prompt == 0:
            raise ApiError(400, "the prompt is empty: give at least one token", param)
        if num_prompt <= limit and (highest := max(prompt_ids)) >= self.limits.vocab_size:
            raise ApiError(400, f"token id {highest} lies outside the vocabulary of {self.limits.vocab_size}", param)
        max_tokens = body.max_completion_tokens or body.max_tokens
        if max_tokens is None:
            largest = max(limit - num_prompt, 1)
            max_tokens = largest if isinstance(body, ChatBody) else min(DEFAULT_COMPLETION_TOKENS, largest)
        if num_prompt + max_tokens > limit:
            raise ApiError(
                400,
                f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}, {num_prompt + max_tokens} in all, "
                f"but this server takes at most {limit}: shorten the prompt or lower max_tokens",
                param,
            )
        if (body.min_tokens or 0) > max_tokens:
            text = f"min_tokens is {body.min_tokens}, but at most {max_tokens} tokens are asked for (max_tokens)"
            raise ApiError(400, text, "min_tokens")
        reasoning = None
        if grammar is not None and isinstance(body, ChatBody):
            reasoning = self.parsers.reasoning_before_form(self._prompt_end(prompt_ids))
        if body.return_routed_experts:
            self._check_routed_experts(prompt, max_tokens)
        return Request(
            secrets.token_hex(12),
            prompt_ids,
            max_tokens,
            self._sampling(body, number),
            bool(body.ignore_eos),
            num_logprobs=0 if body.num_logprobs is None and body.num_tries > body.n else body.num_logprobs,
            scores_prompt=body.echoes and body.num_logprobs is not None,
            images=dict(prompt.images),  # JSON knows no read-only mapping
            grammar=grammar,
            reasoning=reasoning,
            routed_from=0 if body.return_routed_experts else None,
            routed_every=1 if body.stops else ROUTED_EVERY,  # a stop string ends an answer here, unseen by its rank
        )

    def _check_routed_experts(self, prompt: EncodedPrompt, max_tokens: int) -> None:
        """Refuse to return the experts of tokens where not every token has some in every layer."""
        assert self.limits is not None
        reason = None
        if not self.limits.routes_evenly:
            reason = "the MoE layers of this model do not all get every token, with as many experts"
        elif prompt.images:
            reason = "tokens of images are not all routed: leave out the images"
        elif max_tokens == 0:
            reason = "max_tokens is 0: ask for at least 1 token"
        if reason is not None:
            raise ApiError(400, f"return_routed_experts: {reason}", "return_routed_experts")

    def _sampling(self, body: GenerationBody, number: int) -> Sampling:
        """How the tokens of a numbered answer are to be chosen: as its body says, else as the model's defaults do."""
        assert self.limits is not None
        biases = tuple((int(token_id), bias) for token_id, bias in (body.logit_bias or {}).items())
        stop_token_ids = tuple(body.stop_token_ids or ())
        for param, token_ids in (
            ("logit_bias", [token_id for token_id, _ in biases]),
            ("stop_token_ids", stop_token_ids),
        ):
            if (highest := max(token_ids, default=0)) >= self.limits.vocab_size:
                text = f"{param}: token id {highest} lies outside the vocabulary of {self.limits.vocab_size}"
                raise ApiError(400, text, param)
        defaults = self.defaults
        return Sampling(
            temperature=defaults.temperature if body.temperature is None else float(body.temperature),
            top_p=defaults.top_p if body.top_p is None else float(body.top_p),
            seed=self._next_seed() if body.seed is None else body.seed + number,  # as vLLM does
            top_k=max(defaults.top_k if body.top_k is None else body.top_k, 0),
            min_p=defaults.min_p if body.min_p is None else float(body.min_p),
            presence_penalty=float(body.presence_penalty or 0),
            frequency_penalty=float(body.frequency_penalty or 0),
            repetition_penalty=float(body.repetition_penalty or defaults.repetition_penalty),
            logit_bias=biases,
            min_tokens=body.min_tokens or 0,
            stop_token_ids=stop_token_ids,
        )

    def _next_seed(self) -> int:
        """A random stream of its own for each request without a seed, the same in every run with the same --seed."""
        self._num_unseeded += 1
        return (self._seed << 32) + self._num_unseeded

    def message_parsers(self, requests: Sequence[Request], body: GenerationBody) -> list[MessageParser]:
        """What parses the answers to a chat; nothing does to a completion."""
        if not isinstance(body, ChatBody):
            return []
        prompt_end = self._prompt_end(requests[0].prompt_ids)
        return [self.parsers.message_parser(body, prompt_end) for _ in requests]

    def _prompt_end(self, prompt_ids: Sequence[int]) -> str:
        """The last characters of a prompt."""
        text: str = self.tokenizer.decode(
            prompt_ids[-PROMPT_END:], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

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
            request: to be answered.
            body: that asks for it.
            times: of the answer.
            beside: an unfinished request with the same prompt.
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
            self._new_detokenizer(body), body.stops, body.include_stop_str_in_output, request.sampling.min_tokens,
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
                    if output.routed is not None:
                        routing.add(output.routed)
                        if not output.token_ids:
                            continue
                    if output.prompt_scores is None:
                        times.tokens(len(output.token_ids), output.queued_s)
                        chunk = text.chunk(output)
                        if request.routed_from is not None and chunk.finish_reason is not None:
                            chunk = replace(chunk, routed_experts=await asyncio.to_thread(routing.encoded))
                        yield chunk
                        continue
                    scores = [*([] if num_echoed else [None]), *output.prompt_scores]
                    for start in range(0, max(len(scores), 1), MAX_ECHOED_TOKENS):  # the last part may be empty
                        part = scores[start : start + MAX_ECHOED_TOKENS]
                        token_ids = request.prompt_ids[num_echoed : num_echoed + len(part)]
                        num_echoed += len(part)
                        reason = output.finish_reason if start + len(part) == len(scores) else None
                        yield await asyncio.to_thread(text.echo, token_ids, part, reason)
