"""HTTP errors in the shape OpenAI's clients read."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "method_not_allowed_error",
    408: "request_timeout_error",
    409: "conflict_error",
    413: "request_too_large_error",
    415: "unsupported_media_type_error",
    429: "rate_limit_error",
    500: "internal_error",
    503: "service_unavailable_error",
}


MAX_MESSAGE = 1000  # characters
MAX_PARAM = 100


class ApiError(Exception):
    """A request that cannot be answered: HTTP status, what is wrong, and which parameter is at fault."""

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.message = _shown(message, MAX_MESSAGE)
        self.param = None if param is None else _shown(param, MAX_PARAM)

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, TYPES[500])
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def _shown(text: str, max_length: int) -> str:
    """A text that may quote what is no text, or what has no end."""
    text = text if len(text) <= max_length else f"{text[: max_length - 3]}..."
    return text.encode(errors="replace").decode()
