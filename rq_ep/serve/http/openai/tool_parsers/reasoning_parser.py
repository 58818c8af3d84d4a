"""Reasoning before an answer, between `<think>` and `</think>`."""

from collections.abc import Callable
from dataclasses import dataclass

from rq_ep.serve.http.openai.tool_parsers.answer_text import AnswerText, Parsing, Reasoning

MARKS = OPENING, CLOSING = "<think>", "</think>"


@dataclass(frozen=True)
class ReasoningParser:
    """
    Args:
        always_reasons: an answer begins with reasoning though neither prompt nor answer has the opening mark.
    """

    always_reasons: bool

    def reader(self, prompt_end: str) -> Callable[[AnswerText], Parsing[None]]:
        """What reads the reasoning at the beginning of an answer.

        Args:
            prompt_end: the last characters of the prompt.
        """
        end = prompt_end.rstrip()
        begins_inside = end.endswith(OPENING) or (self.always_reasons and not end.endswith(CLOSING))

        def read(text: AnswerText) -> Parsing[None]:
            opening = yield from text.skip(OPENING)
            if opening or begins_inside:
                yield from text.until(Reasoning, CLOSING)

        return read


REASONING_PARSERS = {"qwen3": ReasoningParser(False), "deepseek_r1": ReasoningParser(True)}
