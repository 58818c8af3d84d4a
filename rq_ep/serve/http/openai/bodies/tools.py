"""The tools that a chat may use, and the choice among them, after OpenAI's reference."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rq_ep.serve.http.openai.bodies.body import Body

MAX_TOOLS = 1024  # in a request; OpenAI takes 128
ANY_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}

FunctionName = Annotated[str, Field(min_length=1, max_length=256)]


class _ToolPart(BaseModel):
    """A part of a tool; fields beyond these reach the chat template too."""

    model_config = ConfigDict(extra="allow", strict=True)


class FunctionDefinition(_ToolPart):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(_ToolPart):
    type: Literal["function"]
    function: FunctionDefinition

    def described(self, name: str | None = None) -> dict[str, Any]:
        """The tool as chat templates read it, under another name if one is given."""
        described = self.model_dump(exclude_unset=True)
        return described if name is None else {**described, "function": {**described["function"], "name": name}}


Tools = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class FunctionReference(Body):
    name: FunctionName


class NamedToolChoice(Body):
    type: Literal["function"]
    function: FunctionReference


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice
