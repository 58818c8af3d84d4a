"""Requests in messages: what is long, a prompt or images, travels in parts."""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rq_ep.engine.requests import Request
from rq_ep.serve.messages.codec import MessageError
from rq_ep.serve.messages.to_rank import ImageData, PromptPart

PROMPT_PART_TOKENS = 1 << 16  # in one message
IMAGE_PART_BYTES = 4 << 20


def request_in_parts(request: Request) -> tuple[list[PromptPart | ImageData], Request]:
    """The images of a request, the parts of a prompt too long for one message, and the request with the rest."""
    size = PROMPT_PART_TOKENS
    if request.images:
        parts_of_images = [
            part for name, array in request.images.items() for part in _image_parts(request, name, array)
        ]
        parts_of_prompt, last = request_in_parts(replace(request, images={}))
        return [*parts_of_images, *parts_of_prompt], last
    if len(request.prompt_ids) <= size:
        return [], request
    *parts, rest = (request.prompt_ids[at : at + size] for at in range(0, len(request.prompt_ids), size))
    return [PromptPart(request.id, part) for part in parts], replace(request, prompt_ids=rest)


def _image_parts(request: Request, name: str, array: Any) -> Iterator[ImageData]:
    import numpy as np  # here, as a supervisor has no images

    raw = np.ascontiguousarray(array).tobytes()
    for at in range(0, max(len(raw), 1), IMAGE_PART_BYTES):
        data = base64.b64encode(raw[at : at + IMAGE_PART_BYTES]).decode()
        yield ImageData(request.id, name, array.dtype.str, list(array.shape), data)


def images_of(parts: Sequence[ImageData]) -> dict[str, Any]:
    """The arrays of the images of a request, whose parts came in order.

    Raises:
        MessageError: they make none.
    """
    import numpy as np

    raw: dict[str, bytearray] = {}
    for part in parts:
        raw.setdefault(part.name, bytearray()).extend(base64.b64decode(part.data))
    try:
        return {part.name: np.frombuffer(raw[part.name], part.dtype).reshape(part.shape) for part in parts}
    except (TypeError, ValueError) as error:
        raise MessageError(f"images that are no arrays: {error}") from None
