"""What the HTTP process knows of the model that it serves: how prompts and answers are read, and its limits."""

import asyncio
import logging
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from rq_ep.config import ServeConfig
from rq_ep.engine.requests import Request
from rq_ep.model.checkpoint.generation_defaults import SamplingDefaults, read_sampling_defaults
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.images import ImageProcessor
from rq_ep.serve.http.openai.remote_images import ImageFetcher
from rq_ep.serve.http.openai.schemas import ChatBody, GenerationBody
from rq_ep.serve.http.openai.tool_parsers.answer_parsers import AnswerParsers
from rq_ep.serve.http.openai.tool_parsers.message_parser import MessageParser
from rq_ep.serve.messages import Checked

log = logging.getLogger("rq_ep.serve")

PROMPT_END = 32  # tokens of a prompt that show whether it begins the reasoning of the answer


@dataclass(frozen=True)
class ModelLimits:
    """The limits of the model that requests can exceed."""

    max_model_len: int
    vocab_size: int
    max_queue_size: int = 1024
    routes_evenly: bool = True  # whether every token has as many experts in each layer

    def check_token_ids(self, token_ids: Collection[int], param: str, prefix: str = "") -> None:
        """Refuse tokens that the model does not know.

        Args:
            token_ids: of a request.
            param: of its body, that has them.
            prefix: of the message.
        """
        if (highest := max(token_ids, default=0)) >= self.vocab_size:
            text = f"{prefix}token id {highest} lies outside the vocabulary of {self.vocab_size}"
            raise ApiError(400, text, param)


@dataclass(frozen=True)
class ServedModel:
    """What the files of a model say of its requests."""

    tokenizer: Any  # of transformers
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    parsers: AnswerParsers = field(default_factory=AnswerParsers)
    images: ImageProcessor | None = None
    why_text_only: str | None = "it takes no images"  # where there is no processor of images

    def prompt_end(self, prompt_ids: Sequence[int]) -> str:
        """The last characters of a prompt."""
        text: str = self.tokenizer.decode(
            prompt_ids[-PROMPT_END:], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def message_parsers(self, requests: Sequence[Request], body: GenerationBody) -> list[MessageParser]:
        """What parses the answers to a chat; nothing does to a completion."""
        if not isinstance(body, ChatBody):
            return []
        prompt_end = self.prompt_end(requests[0].prompt_ids)
        return [self.parsers.message_parser(body, prompt_end) for _ in requests]


async def read_served_model(checked: Checked, config: ServeConfig) -> ServedModel:
    """Read what requests need of a checkpoint that a rank has found in order.

    Args:
        checked: what the rank has found.
        config: what is served.
    """
    folder = checked.model
    defaults = read_sampling_defaults(folder, config.generation_config)
    log.info("%s (--generation-config %s)", defaults, config.generation_config)
    images = None
    if checked.why_text_only is None:
        fetcher = None
        if config.allow_remote_images:
            fetcher = ImageFetcher(config.max_body_bytes, config.http_timeout, config.allowed_image_networks or ())
        processor = await asyncio.to_thread(_read_processor, folder)
        images = ImageProcessor(processor, config.max_num_batched_tokens, fetcher)
    tokenizer = await asyncio.to_thread(_read_tokenizer, folder)
    parsers = AnswerParsers.of(tokenizer.chat_template, config.tool_call_parser, config.reasoning_parser, tokenizer)
    log.info("%s", parsers)
    return ServedModel(tokenizer, defaults, parsers, images, checked.why_text_only)


def _read_tokenizer(folder: str) -> Any:
    # Transformers imports torch where it finds it, which would take this process seconds, and tokenizers need none.
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]  # Python's way to say that there is no such module
        logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.msg)
    from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer  # slow: /health does not wait for it

    return read_tokenizer(folder)


def _read_processor(folder: str) -> Any:
    from rq_ep.model.checkpoint.tokenizer_files import read_processor

    return read_processor(folder)
