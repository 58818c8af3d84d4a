"""The messages of a chat, after OpenAI's reference."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from rq_ep.serve.http.openai.bodies.body import any_of, given, some

MAX_MESSAGES = 10_000  # in a request, and parts in a message; OpenAI takes 2048


class _MessagePart(BaseModel):
    """A part of a message, whose fields beyond these are ignored, as OpenAI's servers do: answers have more of them."""

    model_config = ConfigDict(extra="ignore", strict=True)


class TextPart(_MessagePart):
    type: Literal["text"]
    text: str


class ImageUrl(_MessagePart):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImageUrlPart(_MessagePart):
    type: Literal["image_url"]
    image_url: ImageUrl


ContentPart = Annotated[TextPart | ImageUrlPart, Field(discriminator="type")]


class FunctionCall(_MessagePart):
    name: Annotated[str, Field(min_length=1)]
    arguments: str


class ToolCall(_MessagePart):
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ChatMessage(_MessagePart):
    model_config = ConfigDict(json_schema_extra=any_of(given("content"), some("tool_calls")))
    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = Field(
        None, validate_default=True
    )
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's newer name for it
    # These would be lost.
    audio: None = None
    function_call: None = None
    refusal: None = None

    @field_validator("content")
    @classmethod
    def check_content(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and not info.data.get("tool_calls"):
            raise ValueError("Input should be text, which only a message with tool_calls need not have")
        return content

    @property
    def text(self) -> str | None:
        if not isinstance(self.content, list):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def has_images(self) -> bool:
        return isinstance(self.content, list) and any(isinstance(part, ImageUrlPart) for part in self.content)
