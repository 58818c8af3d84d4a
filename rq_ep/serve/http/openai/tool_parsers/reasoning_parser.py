"""Reasoning before an answer: between `<think>` and `</think>`, or as Harmony has it."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from rq_ep.serve.http.openai.tool_parsers.answer_text import AnswerText, Parsing, Reasoning
from rq_ep.serve.http.openai.tool_parsers.harmony import HarmonyReasoning
from rq_ep.serve.http.openai.tool_parsers.message_parser import Reader

OPENING, CLOSING = "<think>", "</think>"


class ReasoningParser(Protocol):
    """How a model tells its reasoning from its answer."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens that tell it."""

    @property
    def closing(self) -> tuple[str, ...]:
        """The tokens that end it: the last one, some time behind the others."""

    def opening(self, prompt_end: str) -> str | None:
        """The token by which an answer may begin with reasoning; empty: it begins within; None: it does not reason.

        Args:
            prompt_end: the last characters of the prompt.
        """

    def reader(self, prompt_end: str, before_form: bool = False) -> Reader:
        """What reads the reasoning at the beginning of an answer.

        Args:
            prompt_end: the last characters of the prompt.
            before_form: whether an answer of a given form follows, which is read by others.
        """


@dataclass(frozen=True)
class ThinkParser:
    """
    Args:
        always_reasons: an answer begins with reasoning though neither prompt nor answer has the opening mark.
    """

    always_reasons: bool
    marks: ClassVar = (OPENING, CLOSING)
    closing: ClassVar = (CLOSING,)

    def opening(self, prompt_end: str) -> str | None:
        end = prompt_end.rstrip()
        if end.endswith(CLOSING):
            return None
        return "" if self.always_reasons or end.endswith(OPENING) else OPENING

    def reader(self, prompt_end: str, before_form: bool = False) -> Reader:
        begins_inside = self.opening(prompt_end) == ""

        def read(text: AnswerText) -> Parsing[None]:
            opening = yield from text.skip(OPENING)
            if opening or begins_inside:
                yield from text.until(Reasoning, CLOSING)

        return read


REASONING_PARSERS: dict[str, ReasoningParser] = {
    "qwen3": ThinkParser(False),
    "deepseek_r1": ThinkParser(True),
    "gpt_oss": HarmonyReasoning(),
}
