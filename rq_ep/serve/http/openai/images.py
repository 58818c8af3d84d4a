"""Images of chat messages: read from `data:` URLs or fetched, and what the model's processor makes of them."""

import base64
import binascii
import io
import warnings
from collections.abc import Mapping
from typing import Any

from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.remote_images import ImageFetcher

FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP", "image/gif": "GIF"}
MAX_PIXELS = 1 << 25  # of an image: a processor would scale a larger one down, after taking its memory
MAX_IMAGES = 64  # of a request


def read_image(source: str | bytes, place: str) -> Any:
    """The picture of a `data:` URL, or of a file that was fetched, in RGB.

    Args:
        source: the URL, or the bytes of the file.
        place: in the request, for messages.

    Raises:
        ApiError: it is no picture that can be read, or too large.
    """
    raw, media_types = (source, list(FORMATS)) if isinstance(source, bytes) else _data(source, place)
    from PIL import Image  # heavy, and of no use to most servers

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(raw), formats=[FORMATS[name] for name in media_types]) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise _refusal(place, f"{width} x {height} pixels, more than {MAX_PIXELS} in all")
                return image.convert("RGB")
    except ApiError:
        raise
    except Exception as error:  # Pillow raises what it likes of damaged files
        reason = " ".join(str(error).split())
        raise _refusal(place, f"not a readable {' or '.join(media_types)}: {reason:.200}") from None


def _data(url: str, place: str) -> tuple[bytes, list[str]]:
    """The bytes in a `data:` URL, and the media type that it names."""
    head, comma, data = url.partition(",")
    media_type, _, encoding = head.removeprefix("data:").partition(";")
    if not comma or media_type not in FORMATS or encoding != "base64":
        raise _refusal(place, f"{head!r:.60}: give data:TYPE;base64, with one of {', '.join(FORMATS)}")
    try:
        return base64.b64decode(data, validate=True), [media_type]
    except (binascii.Error, ValueError):
        raise _refusal(place, "the data is not base64") from None


def _refusal(place: str, reason: str) -> ApiError:
    return ApiError(400, f"{place}: {reason}", "messages")


class ImageProcessor:
    """Prompts with images to token ids, and to the arrays that the model takes beside them.

    Args:
        processor: of transformers, for text and images.
        max_tokens: of a prompt with images, which is run as a whole.
        fetcher: of images of other servers; None: they are refused.
    """

    def __init__(self, processor: Any, max_tokens: int, fetcher: ImageFetcher | None = None) -> None:
        self._processor = processor
        self._max_tokens = max_tokens
        self._fetcher = fetcher

    async def fetch(self, urls: Mapping[str, str]) -> dict[str, str | bytes]:
        """The images of a request by their places in it: `data:` URLs as they are, the bytes of others.

        Raises:
            ApiError: there are too many, or one may not or cannot be fetched.
        """
        if len(urls) > MAX_IMAGES:
            raise _refusal("messages", f"{len(urls)} images, more than {MAX_IMAGES}")
        remote = {place: url for place, url in urls.items() if not url.startswith("data:")}
        if not remote:
            return {**urls}
        if self._fetcher is None:
            place, url = next(iter(remote.items()))
            reason = f"{url!r:.60} is no data: URL, and this server fetches no others (--allow-remote-images)"
            raise _refusal(place, reason)
        return {**urls, **await self._fetcher.fetch(remote)}

    def encode(self, text: str, sources: Mapping[str, str | bytes]) -> tuple[list[int], dict[str, Any]]:
        """Token ids of a text with places for images, and the arrays of these.

        Args:
            text: as the chat template writes it.
            sources: the images, as `fetch` gives them.

        Raises:
            ApiError: an image cannot be read, or there is not a place for each.
        """
        images = [read_image(source, place) for place, source in sources.items()]
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
        beside = ("attention_mask", "token_type_ids")
        return token_ids, {name: array for name, array in made.items() if name not in beside}
