"""Images of chat messages: read from `data:` URLs, and what the model's processor makes of them."""

import base64
import binascii
import io
import warnings
from collections.abc import Sequence
from typing import Any

from rq_ep.serve.http.openai.api_errors import ApiError

FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP", "image/gif": "GIF"}
MAX_PIXELS = 1 << 25  # of an image: a processor would scale a larger one down, after taking its memory
MAX_IMAGES = 64  # of a request


def read_image(url: str, param: str) -> Any:
    """The picture of a `data:` URL, in RGB.

    Raises:
        ApiError: it is another kind of URL, or no picture that can be read, or too large.
    """
    head, comma, data = url.partition(",")
    if not head.startswith("data:") or not comma:
        raise ApiError(400, f"{param}: {url!r:.60} is no data: URL, and this server fetches no others", param)
    media_type, _, encoding = head.removeprefix("data:").partition(";")
    if media_type not in FORMATS or encoding != "base64":
        raise ApiError(400, f"{param}: {head!r:.60}: give data:TYPE;base64, with one of {', '.join(FORMATS)}", param)
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param}: the data is not base64", param) from None
    from PIL import Image  # heavy, and of no use to most servers

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(raw), formats=[FORMATS[media_type]]) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ApiError(400, f"{param}: {width} x {height} pixels, more than {MAX_PIXELS} in all", param)
                return image.convert("RGB")
    except ApiError:
        raise
    except Exception as error:  # Pillow raises what it likes of damaged files
        reason = " ".join(str(error).split())
        raise ApiError(400, f"{param}: not a readable {media_type}: {reason:.200}", param) from None


class ImageProcessor:
    """Prompts with images to token ids, and to the arrays that the model takes beside them.

    Args:
        processor: of transformers, for text and images.
        max_tokens: of a prompt with images, which is run as a whole.
    """

    def __init__(self, processor: Any, max_tokens: int) -> None:
        self._processor = processor
        self._max_tokens = max_tokens

    def encode(self, text: str, urls: Sequence[str]) -> tuple[list[int], dict[str, Any]]:
        """Token ids of a text with places for images, and the arrays of these.

        Raises:
            ApiError: an image cannot be read, or there is not a place for each.
        """
        if len(urls) > MAX_IMAGES:
            raise ApiError(400, f"messages: {len(urls)} images, more than {MAX_IMAGES}", "messages")
        images = [read_image(url, "messages") for url in urls]
        try:
            made = self._processor(text=[text], images=images, add_special_tokens=False, return_tensors="np")
        except Exception as error:  # an image too narrow, a place too few
            reason = " ".join(str(error).split())
            raise ApiError(400, f"the model's processor refuses the images: {reason:.400}", "messages") from None
        token_ids = [int(token) for token in made.pop("input_ids")[0]]
        if len(token_ids) > self._max_tokens:
            raise ApiError(
                400,
                f"the prompt has {len(token_ids)} tokens with its images, but one with images has at most "
                f"{self._max_tokens} here (--max-num-batched-tokens)",
                "messages",
            )
        beside = ("attention_mask", "mm_token_type_ids", "token_type_ids")
        return token_ids, {name: array for name, array in made.items() if name not in beside}
