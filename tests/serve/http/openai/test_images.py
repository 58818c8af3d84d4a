"""Images of chat messages: hostile ones, and the way of others to the ranks."""

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AriaProcessor
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

from rq_ep.model.text.byte_tokenizer import byte_tokenizer
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.bodies.chat_messages import ChatMessage
from rq_ep.serve.http.openai.chat_template import render_chat
from rq_ep.serve.http.openai.images import ImageProcessor, read_image

TEMPLATE = """{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}
{%- for part in m.content %}{{ '<|img|>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}{% endfor %}"""


def png(width: int = 40, height: int = 30, color: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


def url(raw: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(raw).decode()}"


def png_that_claims(width: int, height: int) -> bytes:
    """A small file whose header claims a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + png()[33:]


HOSTILE = {
    "data:image/png;base64": "give data:TYPE;base64",
    "data:image/svg+xml;base64,AAAA": "with one of image/png",
    "data:image/png,AAAA": "give data:TYPE;base64",
    "data:image/png;base64,!!!": "not base64",
    url(b""): "not a readable image/png",
    url(b"nothing"): "not a readable image/png",
    url(png()[:60]): "not a readable image/png",
    url(png(), "image/jpeg"): "not a readable image/jpeg",
    url(png_that_claims(100_000, 100_000)): "not a readable|more than",
    url(png_that_claims(8_000, 8_000)): "8000 x 8000 pixels, more than 33554432",
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_an_image_that_cannot_be_read_is_the_clients_fault(hostile: str) -> None:
    with pytest.raises(ApiError, match=HOSTILE[hostile]) as caught:
        read_image(hostile, "messages.0")
    assert (caught.value.status, caught.value.param) == (400, "messages")


def aria_processor() -> Any:
    """Images of any size become 980 x 980 pixels and 4 tokens; text is bytes."""
    bytes_only = byte_tokenizer(512)
    tokenizer = type(bytes_only)(
        tokenizer_object=bytes_only.backend_tokenizer, pad_token="<|pad|>", eos_token="<|eos|>", chat_template=TEMPLATE,
        extra_special_tokens={"image_token": "<|img|>"},
    )  # fmt: skip
    return AriaProcessor(AriaImageProcessorPil(), tokenizer, size_conversion={980: 4})


def test_images_of_a_chat_become_tokens_and_arrays_in_their_order() -> None:
    processor = aria_processor()
    picture = {"type": "image_url", "image_url": {"url": url(png())}}
    content = [{"type": "text", "text": "a"}, picture, {"type": "text", "text": "b"}, picture]
    message = ChatMessage.model_validate({"role": "user", "content": content})
    text = render_chat(processor.tokenizer, [message])
    assert text == "user:a<|img|>b<|img|>"
    sources = {"messages.0": url(png()), "messages.1": png()}  # as a data: URL, and as it was fetched
    token_ids, images = ImageProcessor(processor, 100).encode(text, sources)
    image = [processor.tokenizer.image_token_id] * 4
    assert token_ids == [*b"user:a", *image, *b"b", *image]
    assert isinstance(images["pixel_values"], np.ndarray)
    assert len(images["pixel_values"]) == 2
    with pytest.raises(ApiError, match=r"15 tokens with its images, .* at most 10 here \(--max-num-batched-tokens"):
        ImageProcessor(processor, 10).encode(text, sources)
    for wrong in ({"messages.0": png()}, {**sources, "messages.2": png()}):
        with pytest.raises(ApiError, match=r"the model's processor refuses the images: .* number of"):
            ImageProcessor(processor, 100).encode(text, wrong)


def test_a_template_that_leaves_out_the_text_beside_an_image_is_refused() -> None:
    processor = aria_processor()
    processor.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    content = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": url(png())}}]
    with pytest.raises(ApiError, match="leaves it out of the prompt"):
        render_chat(processor.tokenizer, [ChatMessage.model_validate({"role": "user", "content": content})])
