"""Prompts of requests to token ids: texts, conversations with their tools and images, and what `/tokenize` shows."""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.bodies.chat_messages import ChatMessage
from rq_ep.serve.http.openai.chat_template import render_chat
from rq_ep.serve.http.openai.prompt_encoder import PromptEncoder
from rq_ep.serve.http.openai.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from rq_ep.serve.http.served_model import ModelLimits, ServedModel

CHARS_PER_MESSAGE = 100  # characters that are encoded in the time in which a template writes one message
IMAGE_CHARS = 1 << 20  # images are read on the threads of long prompts


class EncodedPrompt(NamedTuple):
    """A prompt as the engine takes it: token ids, and the arrays of its images."""

    token_ids: list[int]
    images: Mapping[str, Any] = MappingProxyType({})


class PromptReader:
    """Reads prompts as a model does.

    Args:
        model_name: that clients know it by.
        model: its tokenizer, chat template and processor of images.
        limits: that requests may not exceed.
        encoder: encodes texts on threads.
    """

    def __init__(self, model_name: str, model: ServedModel, limits: ModelLimits, encoder: PromptEncoder) -> None:
        self._model_name = model_name
        self._model = model
        self._tokenizer = model.tokenizer
        self._limits = limits
        self._encoder = encoder

    async def of_completion(self, body: CompletionBody) -> list[EncodedPrompt]:
        """The prompts of a completion."""
        self._check_num_answers(len(body.prompt) * body.num_tries)
        return [
            EncodedPrompt(await self._encoder.encode(prompt, "prompt", add_special_tokens=True))
            if isinstance(prompt, str)
            else EncodedPrompt(prompt)
            for prompt in body.prompt
        ]

    async def of_chat(self, body: ChatBody) -> list[EncodedPrompt]:
        """The one prompt of a chat: the conversation as the model's chat template writes it, and its images."""
        self._check_num_answers(body.n)
        images, urls = self._model.images, body.image_urls
        if urls and images is None:
            text = f"messages: {self._model_name} is served text-only: {self._model.why_text_only}"
            raise ApiError(400, text, "messages")
        self._model.parsers.check(body)
        text = await self._rendered(body, body.messages)
        if images is not None and urls:
            sources = await images.fetch(urls)
            return [EncodedPrompt(*await self._encoder.run(IMAGE_CHARS, partial(images.encode, text, sources)))]
        return [EncodedPrompt(await self._encoder.encode(text, "messages", add_special_tokens=False))]

    def _check_num_answers(self, number: int) -> None:
        """Refuse a body that asks for more answers than may ever be under way."""
        if number > self._limits.max_queue_size:
            text = f"{number} answers in one request, but at most {self._limits.max_queue_size} are made at once"
            raise ApiError(400, f"{text} (--max-queue-size)", "n")

    async def _rendered(self, body: ChatBody | TokenizeBody, messages: Sequence[ChatMessage]) -> str:
        """The conversation of a body, with its tools, as the model's chat template writes it."""
        if not self._tokenizer.chat_template:
            raise ApiError(400, "this model's tokenizer has no chat template: use /v1/completions", "messages")
        effort = body.reasoning_effort if isinstance(body, ChatBody) else None
        try:
            return await self._encoder.run(
                CHARS_PER_MESSAGE * (len(messages) + len(body.tools or ())),
                partial(render_chat, self._tokenizer, messages, body.tools, body.chat_template_kwargs, effort),
            )
        except ApiError:
            raise
        except Exception as error:  # templates raise what they like: roles in a wrong order, say
            reason = " ".join(str(error).split())
            message = f"the model's chat template refuses the messages: {reason:.400}"
            raise ApiError(400, message, "messages") from None

    async def tokenize(self, body: TokenizeBody) -> dict[str, Any]:
        """Token ids of a text or a conversation, in vLLM's form."""
        if any(message.has_images for message in body.messages or ()):
            raise ApiError(400, "messages: images are not tokenized here: leave them out", "messages")
        is_chat = body.messages is not None
        text = body.prompt if body.messages is None else await self._rendered(body, body.messages)
        assert text is not None
        adds = not is_chat if body.add_special_tokens is None else body.add_special_tokens
        param = "messages" if is_chat else "prompt"
        token_ids = await self._encoder.encode(text, param, add_special_tokens=adds)
        names = self._tokenizer.convert_ids_to_tokens(token_ids) if body.return_token_strs else None
        limit = self._limits.max_model_len
        return {"count": len(token_ids), "max_model_len": limit, "tokens": token_ids, "token_strs": names}

    async def detokenize(self, body: DetokenizeBody) -> dict[str, str]:
        """The text of token ids, with special tokens, in vLLM's form."""
        self._limits.check_token_ids(body.tokens, "tokens")
        return {"prompt": await self._encoder.run(len(body.tokens), partial(self._tokenizer.decode, body.tokens))}
