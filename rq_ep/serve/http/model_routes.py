"""The routes of the model, as OpenAI and vLLM have them: completions and chats, tokens of texts, the model's card."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from rq_ep.serve.http.metrics import RequestMetrics
from rq_ep.serve.http.openai.choices import merged
from rq_ep.serve.http.openai.chunks import Chunk
from rq_ep.serve.http.openai.openapi import body_schema
from rq_ep.serve.http.openai.request_body import BodyReader, unless_disconnected
from rq_ep.serve.http.openai.responses import ResponseBuilder
from rq_ep.serve.http.openai.schemas import ChatBody, CompletionBody, DetokenizeBody, GenerationBody, TokenizeBody
from rq_ep.serve.http.prompt_reader import EncodedPrompt
from rq_ep.serve.http.service import Service

Body = TypeVar("Body", bound=GenerationBody)
TokenBody = TypeVar("TokenBody", TokenizeBody, DetokenizeBody)


def add_model_routes(app: FastAPI, service: Service, bodies: BodyReader) -> None:
    """Add the routes that ask the model of a service, and those that show it.

    Args:
        app: that they are added to.
        service: answers them.
        bodies: reads the bodies of requests.
    """
    _add_generation(app, service, bodies)
    _add_tokens(app, service, bodies)
    _add_models(app, service)


def _add_generation(app: FastAPI, service: Service, bodies: BodyReader) -> None:
    @app.post("/v1/completions", openapi_extra=body_schema(CompletionBody))
    async def completions(http: Request) -> Response:
        return await respond(http, CompletionBody, lambda body: service.prompts.of_completion(body))

    @app.post("/v1/chat/completions", openapi_extra=body_schema(ChatBody))
    async def chat_completions(http: Request) -> Response:
        return await respond(http, ChatBody, lambda body: service.prompts.of_chat(body))

    async def respond(
        http: Request, kind: type[Body], prompts: Callable[[Body], Awaitable[list[EncodedPrompt]]]
    ) -> Response:
        times = service.metrics.arrival()
        service.check_available()
        body = await bodies.read(http, kind)
        service.check_model(body)
        return await unless_disconnected(http, answer(body, prompts(body), times))

    async def answer(body: GenerationBody, prompts: Awaitable[list[EncodedPrompt]], times: RequestMetrics) -> Response:
        requests = await service.request_factory.make(await prompts, body)
        response = ResponseBuilder(
            requests, service.model_name, service.message_parsers(requests, body), body.n, body.num_tries,
            body.num_logprobs is not None, body.return_routed_experts,
        )  # fmt: skip
        chunks = merged(service.answers(requests, body, times))
        if not body.stream:
            return await response.whole(chunks)
        # The first chunk is awaited before the status is sent, so that a refusal is a status and not an event.
        events = response.stream(_chain(await anext(chunks), chunks), body.usage_options)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold tokens back
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def _add_tokens(app: FastAPI, service: Service, bodies: BodyReader) -> None:
    @app.post("/tokenize", openapi_extra=body_schema(TokenizeBody))
    async def tokenize(http: Request) -> dict[str, Any]:
        return await convert(http, TokenizeBody, lambda body: service.prompts.tokenize(body))

    @app.post("/detokenize", openapi_extra=body_schema(DetokenizeBody))
    async def detokenize(http: Request) -> dict[str, Any]:
        return await convert(http, DetokenizeBody, lambda body: service.prompts.detokenize(body))

    async def convert(
        http: Request, kind: type[TokenBody], work: Callable[[TokenBody], Awaitable[dict[str, Any]]]
    ) -> dict[str, Any]:
        service.check_available()
        body = await bodies.read(http, kind)
        service.check_model(body)
        return await unless_disconnected(http, work(body))


def _add_models(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.model_name:
            raise service.no_such_model(name)
        return card()

    def card() -> dict[str, Any]:
        limit = None if service.limits is None else service.limits.max_model_len
        about = {"id": service.model_name, "object": "model", "created": created, "owned_by": "rq_ep"}
        return {**about, "root": service.model_root, "parent": None, "max_model_len": limit}  # as vLLM's


async def _chain(first: tuple[int, Chunk], rest: AsyncIterator[tuple[int, Chunk]]) -> AsyncIterator[tuple[int, Chunk]]:
    async with aclosing(rest):  # type: ignore[type-var]
        yield first
        async for chunk in rest:
            yield chunk
