"""A conversation written as a prompt by the model's chat template, which must leave none of it out.

Templates skip what they do not know without a word, and differ in the form in which they read it. So a template first
writes the conversation with a marker in place of each text: the form is right in which it shows every marker. What a
template cuts out of a text itself, as earlier thinking, is its own business.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import product
from typing import Any, Protocol

from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.bodies.chat_messages import ChatMessage, FunctionCall, TextPart, ToolCall
from rq_ep.serve.http.openai.bodies.tools import FunctionTool
from rq_ep.serve.http.openai.schemas import ReasoningEffort

MARKER = re.compile(r"qz(\d+)zq")
# Harmony's template writes whatever effort it is told, but gpt-oss knows only these.
HARMONY_WORDS, HARMONY_EFFORTS = ("channel", "analysis"), ("low", "medium", "high")
IN_REPR = re.compile(r"[{,:] ?'qz(\d+)zq'")  # a list or dictionary that was taken for text


class ChatTokenizer(Protocol):
    """The part of a tokenizer that is needed here."""

    chat_template: Any

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, add_generation_prompt: bool, tokenize: bool, **more: Any
    ) -> Any: ...


@dataclass(frozen=True)
class Form:
    """A form in which templates read messages.

    Args:
        has_parts: contents are lists of parts, as templates of multimodal models read them.
        no_content: the content of a message that only calls tools; None: transformers leaves the key out.
        parses_arguments: the arguments of a call are an object instead of its JSON.
    """

    has_parts: bool
    no_content: str | None
    parses_arguments: bool

    def message(self, message: ChatMessage) -> dict[str, Any]:
        """A message as templates read it; fields without a value are left out."""
        written: dict[str, Any] = {"role": message.role, "content": self._content(message)}
        if message.tool_calls:
            written["tool_calls"] = [self._call(call) for call in message.tool_calls]
        reasoning = message.reasoning_content or message.reasoning
        others = {
            "name": message.name,
            "tool_call_id": message.tool_call_id,
            "reasoning_content": reasoning,
            "thinking": None if message.text else reasoning,  # gpt-oss's name, which does not go with a content
        }
        return written | {name: value for name, value in others.items() if value is not None}

    def _content(self, message: ChatMessage) -> str | list[dict[str, str]] | None:
        if isinstance(message.content, list) and message.has_images:
            return [
                {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
                for part in message.content
            ]
        text = self.no_content if message.text is None else message.text
        return [{"type": "text", "text": text}] if self.has_parts and text is not None else text

    def _call(self, call: ToolCall) -> dict[str, Any]:
        arguments: Any = call.function.arguments
        if self.parses_arguments:
            parsed = _parsed(arguments)
            arguments = arguments if parsed is None else parsed
        identity = {} if call.id is None else {"id": call.id}
        return {**identity, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def render_chat(
    tokenizer: ChatTokenizer,
    messages: Sequence[ChatMessage],
    tools: Sequence[FunctionTool] | None = None,
    settings: Mapping[str, Any] | None = None,
    effort: ReasoningEffort | None = None,
) -> str:
    """The prompt that the template makes of a conversation.

    Args:
        tokenizer: has the template.
        messages: the conversation.
        tools: that may be used in it.
        settings: variables of the template, such as `enable_thinking`.
        effort: of reasoning.

    Raises:
        ApiError: the template leaves out a message or a part of one, a tool, a setting, or the effort.
        Exception: whatever a template raises that refuses the messages.
    """
    settings = _checked_settings(tokenizer, settings or {}, effort)
    system = "developer" if "developer" in str(tokenizer.chat_template) else "system"

    def write(messages: Sequence[ChatMessage], form: Form, tools: list[dict[str, Any]]) -> str:
        conversation = [form.message(message) for message in messages]
        for message in conversation:
            message["role"] = system if message["role"] == "developer" else message["role"]
        more = {**settings, **({"tools": tools} if tools else {})}
        text: str = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False, **more)
        return text

    marked, places = _mark(messages)
    given = [tool.described() for tool in tools or ()]
    marked_tools = [tool.described(f"qt{number}tq") for number, tool in enumerate(tools or ())]
    refusals: list[Exception] = []
    left_out: list[str] = []
    for form in _forms(messages):
        try:
            text = write(marked, form, marked_tools)
        except Exception as error:
            refusals.append(error)
            continue
        shown = set(MARKER.findall(text)) - set(IN_REPR.findall(text))
        missing = [place for number, place in enumerate(places) if str(number) not in shown]
        if not missing:
            _check_tools(text, marked_tools)
            return write(messages, form, given)
        left_out = min(left_out or missing, missing, key=len)
    if refusals and not left_out:
        raise refusals[0]
    raise ApiError(400, f"{left_out[0]}: this model's chat template leaves it out of the prompt", "messages")


def _checked_settings(
    tokenizer: ChatTokenizer, settings: Mapping[str, Any], effort: ReasoningEffort | None
) -> Mapping[str, Any]:
    """The variables of the template. Those that it does not read are refused, and those that are not a client's."""
    words = set(re.findall(r"\w+", str(tokenizer.chat_template)))
    words -= {"messages", *signature(tokenizer.apply_chat_template).parameters}
    of_effort = {} if effort is None else _settings_of(effort, words)
    if (twice := next((name for name in of_effort if name in settings), None)) is not None:
        text = f"reasoning_effort: chat_template_kwargs has {twice!r}, which it sets too: give one of both"
        raise ApiError(400, text, "reasoning_effort")
    if (unknown := next((name for name in settings if name not in words), None)) is not None:
        text = f"chat_template_kwargs: this model's chat template has no setting {unknown!r:.60}"
        raise ApiError(400, text, "chat_template_kwargs")
    return {**settings, **of_effort}


def _settings_of(effort: ReasoningEffort, words: set[str]) -> dict[str, Any]:
    """The variables by which a template that has these words is told of an effort, as vLLM tells it.

    One that only knows thinking or none is told of `none`, and of no other effort, which it would not obey.
    """
    thinks = {"enable_thinking": effort != "none"} if "enable_thinking" in words else {}
    if "reasoning_effort" in words and (effort in HARMONY_EFFORTS or not words.issuperset(HARMONY_WORDS)):
        return {"reasoning_effort": effort, **thinks}
    if effort == "none" and thinks:
        return thinks
    text = f"reasoning_effort={effort!r}: this model's chat template knows no such effort: leave it out"
    raise ApiError(400, text, "reasoning_effort")


def _check_tools(text: str, tools: Sequence[dict[str, Any]]) -> None:
    """Refuse tools whose marked names a prompt does not show."""
    for number, tool in enumerate(tools):
        if tool["function"]["name"] not in text:
            raise ApiError(400, f"tools.{number}: this model's chat template leaves it out of the prompt", "tools")


def _forms(messages: Sequence[ChatMessage]) -> Iterator[Form]:
    """The forms that differ for these messages, the commonest first."""
    no_content = (None, "") if any(message.content is None for message in messages) else ("",)
    parses_arguments = (True, False) if any(message.tool_calls for message in messages) else (True,)
    has_parts = (True,) if any(message.has_images for message in messages) else (False, True)
    return (Form(*settings) for settings in product(has_parts, no_content, parses_arguments))


def _mark(messages: Sequence[ChatMessage]) -> tuple[list[ChatMessage], list[str]]:
    """The messages with numbered markers in place of what must be shown; for each number, what it stands for."""
    places: list[str] = []

    def marker(place: str) -> str:
        places.append(place)
        return f"qz{len(places) - 1}zq"

    marked = []
    for at, message in enumerate(messages):
        place = f"messages.{at}.role: the content of a message of role {message.role!r}"
        content: Any = message.text
        calls = []
        if isinstance(message.content, list) and message.has_images:
            content = [
                TextPart(type="text", text=marker(place)) if isinstance(part, TextPart) and part.text else part
                for part in message.content
            ]
        elif content:
            content = marker(place)
        for number, call in enumerate(message.tool_calls or ()):
            place = f"messages.{at}.tool_calls.{number}"
            function = FunctionCall(name=marker(place), arguments="{}")
            if _parsed(call.function.arguments):
                function.arguments = json.dumps({marker(place): marker(place)})
            elif call.function.arguments.strip() not in ("", "{}"):
                function.arguments = marker(place)
            calls.append(call.model_copy(update={"function": function}))
        marked.append(message.model_copy(update={"content": content, "tool_calls": calls}))
    return marked, places


def _parsed(arguments: str) -> dict[str, Any] | None:
    """The object whose JSON the arguments of a call are; None: they are not, models write what they like."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
