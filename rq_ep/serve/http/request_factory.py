"""The requests of a body: its prompts, each with what it asks for, inside the limits of the model."""

import secrets
from collections.abc import Sequence
from functools import partial

from rq_ep.engine.requests import Request, Sampling
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.bodies.answer_grammar import Guide, answer_grammar
from rq_ep.serve.http.openai.prompt_encoder import PromptEncoder
from rq_ep.serve.http.openai.schemas import ChatBody, GenerationBody
from rq_ep.serve.http.openai.tool_parsers.forced_calls import calls_schema
from rq_ep.serve.http.prompt_reader import EncodedPrompt
from rq_ep.serve.http.served_model import ModelLimits, ServedModel

DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's completions
GRAMMAR_CHARS = 1 << 20  # grammars are written on the threads of long prompts
ROUTED_EVERY = 32  # tokens of an answer whose experts come in one message


class RequestFactory:
    """Makes requests for the ranks, or refuses them with the limit and the count.

    Args:
        seed: of the server, from which requests without a seed get theirs.
        model: its defaults of sampling, and how it writes reasoning.
        limits: that requests may not exceed.
        encoder: its threads write grammars.
    """

    def __init__(self, seed: int, model: ServedModel, limits: ModelLimits, encoder: PromptEncoder) -> None:
        self._seed = seed
        self._model = model
        self._limits = limits
        self._encoder = encoder
        self._num_unseeded = 0

    async def make(self, prompts: Sequence[EncodedPrompt], body: GenerationBody) -> list[Request]:
        """The requests of a body: those to its first prompt, then those to the next."""
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
            prompt: what is to be answered.
            body: what the client has sent.
            number: that of the answer, among those to this prompt.
            grammar: what the answer follows; None: it is free.
        """
        prompt_ids = prompt.token_ids
        limit, num_prompt = self._limits.max_model_len, len(prompt_ids)
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        if num_prompt == 0:
            raise ApiError(400, "the prompt is empty: give at least one token", param)
        if num_prompt <= limit:  # else it is refused below, unread
            self._limits.check_token_ids(prompt_ids, param)
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
            reasoning = self._model.parsers.reasoning_before_form(self._model.prompt_end(prompt_ids))
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
        reason = None
        if not self._limits.routes_evenly:
            reason = "the MoE layers of this model do not all get every token, with as many experts"
        elif prompt.images:
            reason = "tokens of images are not all routed: leave out the images"
        elif max_tokens == 0:
            reason = "max_tokens is 0: ask for at least 1 token"
        if reason is not None:
            raise ApiError(400, f"return_routed_experts: {reason}", "return_routed_experts")

    def _sampling(self, body: GenerationBody, number: int) -> Sampling:
        """How the tokens of a numbered answer are to be chosen: as its body says, else as the model's defaults do."""
        biases = tuple((int(token_id), bias) for token_id, bias in (body.logit_bias or {}).items())
        stop_token_ids = tuple(body.stop_token_ids or ())
        self._limits.check_token_ids([token_id for token_id, _ in biases], "logit_bias", "logit_bias: ")
        self._limits.check_token_ids(stop_token_ids, "stop_token_ids", "stop_token_ids: ")
        defaults = self._model.defaults
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
