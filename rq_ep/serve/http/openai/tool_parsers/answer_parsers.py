"""The formats in which models write reasoning and calls of tools: which there are, and which a model has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rq_ep.engine.requests import ReasoningTokens
from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.schemas import ChatBody, GenerationBody
from rq_ep.serve.http.openai.tool_parsers import deepseek_v3, mistral
from rq_ep.serve.http.openai.tool_parsers.answer_text import AnswerText, Parsing
from rq_ep.serve.http.openai.tool_parsers.deepseek_v3 import read_deepseek_v3, read_deepseek_v31
from rq_ep.serve.http.openai.tool_parsers.forced_calls import read_named, read_required
from rq_ep.serve.http.openai.tool_parsers.glm45 import read_glm45
from rq_ep.serve.http.openai.tool_parsers.harmony import CHANNEL, MESSAGE, HarmonyReasoning, read_harmony
from rq_ep.serve.http.openai.tool_parsers.hermes import read_hermes
from rq_ep.serve.http.openai.tool_parsers.llama3_json import TAG, read_llama3_json
from rq_ep.serve.http.openai.tool_parsers.message_parser import MessageParser, Reader
from rq_ep.serve.http.openai.tool_parsers.mistral import read_mistral
from rq_ep.serve.http.openai.tool_parsers.qwen3_coder import read_qwen3_coder
from rq_ep.serve.http.openai.tool_parsers.reasoning_parser import REASONING_PARSERS, ReasoningParser
from rq_ep.serve.http.openai.tool_parsers.tagged_arguments import Schemas


@dataclass(frozen=True)
class ToolParser:
    """A format of calls.

    Args:
        read: reads an answer, with the schemas of the functions that it may call.
        signs: texts that chat templates of models with this format have, all of them.
        marks: special tokens by which calls are told, so that they must be shown.
        reads_reasoning: whether calls and reasoning are one format, which `read` reads as a whole.
    """

    read: Callable[[AnswerText, Schemas], Parsing[None]]
    signs: Sequence[str]
    marks: Sequence[str] = ()
    reads_reasoning: bool = False


# By vLLM's names. The first one whose signs a template has is the model's.
TOOL_PARSERS = {
    "qwen3_coder": ToolParser(read_qwen3_coder, ("<tool_call>", "<function=")),
    "glm45": ToolParser(read_glm45, ("<tool_call>", "<arg_key>")),
    "hermes": ToolParser(lambda text, _: read_hermes(text), ("<tool_call>", "arguments")),
    "deepseek_v3": ToolParser(
        lambda text, _: read_deepseek_v3(text), (deepseek_v3.CALLS, deepseek_v3.BLOCK), deepseek_v3.MARKS
    ),
    "deepseek_v31": ToolParser(lambda text, _: read_deepseek_v31(text), (deepseek_v3.CALLS,), deepseek_v3.MARKS),
    "mistral": ToolParser(
        lambda text, _: read_mistral(text), (mistral.OPENING,), (mistral.OPENING, mistral.CALL_ID, mistral.ARGUMENTS)
    ),
    "gpt_oss": ToolParser(
        lambda text, _: read_harmony(text), (CHANNEL, MESSAGE), HarmonyReasoning.marks, reads_reasoning=True
    ),
    "llama3_json": ToolParser(lambda text, _: read_llama3_json(text), (TAG, "parameters"), (TAG,)),
}


@dataclass(frozen=True)
class AnswerParsers:
    """How a server reads the answers to chats; None: they have no such part.

    `reasoning_ids` are those of the tokens that tell reasoning, as far as each is one token.
    """

    tool: ToolParser | None = None
    reasoning: ReasoningParser | None = None
    reasoning_ids: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, chat_template: Any, tool: str = "auto", reasoning: str = "auto", tokenizer: Any = None
    ) -> "AnswerParsers":
        """The parsers of given names; auto: those whose marks the chat template has; none: no parser.

        Args:
            chat_template: of the model.
            tool: of calls.
            reasoning: of reasoning.
            tokenizer: without one, answers of a given form do not reason.
        """
        template = str(chat_template or "")
        tool_parser = TOOL_PARSERS.get(tool)
        if tool == "auto":
            fitting = (kind for kind in TOOL_PARSERS.values() if all(sign in template for sign in kind.signs))
            tool_parser = next(fitting, None)
        if reasoning == "auto":
            is_harmony = CHANNEL in template and MESSAGE in template
            reasoning = "gpt_oss" if is_harmony else "qwen3" if "</think>" in template else "none"
        parser = REASONING_PARSERS.get(reasoning)
        marks = () if parser is None or tokenizer is None else {*parser.marks, *parser.closing}
        encoded = {mark: tokenizer.encode(mark, add_special_tokens=False) for mark in marks}
        return cls(tool_parser, parser, {mark: ids[0] for mark, ids in encoded.items() if len(ids) == 1})

    def __str__(self) -> str:
        names = {id(kind): name for table in (TOOL_PARSERS, REASONING_PARSERS) for name, kind in table.items()}
        tool, reasoning = (names.get(id(kind), "none") for kind in (self.tool, self.reasoning))
        return f"calls of tools are read as {tool} (--tool-call-parser), reasoning as {reasoning} (--reasoning-parser)"

    def marks(self, body: GenerationBody) -> tuple[str, ...]:
        """Special tokens that are text of an answer, as they tell its parts."""
        if not isinstance(body, ChatBody):
            return ()
        of_calls = self.tool.marks if self.tool is not None and body.may_call and not body.must_call else ()
        return (*of_calls, *(self.reasoning.marks if self.reasoning is not None else ()))

    def check(self, body: ChatBody) -> None:
        """Refuse a choice among tools that no parser would see."""
        if body.may_call and not body.must_call and self.tool is None:
            text = "tool_choice 'auto' needs --tool-call-parser: this model's chat template has no known form of calls"
            raise ApiError(400, f"{text}; 'required' and named functions do without", "tool_choice")

    def reasoning_before_form(self, prompt_end: str) -> ReasoningTokens | None:
        """The tokens of reasoning before an answer of a given form; None: there is no reasoning.

        Args:
            prompt_end: the last characters of the prompt.
        """
        opening = None if self.reasoning is None else self.reasoning.opening(prompt_end)
        if self.reasoning is None or opening is None:
            return None
        marks = (opening, *self.reasoning.closing) if opening else self.reasoning.closing
        if not all(mark in self.reasoning_ids for mark in marks):
            return None
        closing = [self.reasoning_ids[mark] for mark in self.reasoning.closing]
        return ReasoningTokens(self.reasoning_ids[opening] if opening else None, closing)

    def message_parser(self, body: ChatBody, prompt_end: str) -> MessageParser:
        """The parser of an answer.

        Args:
            body: that asks for it.
            prompt_end: the last characters of the prompt.
        """
        readers: list[Reader] = []
        name = body.called_name
        has_form = body.grammar_param is not None
        may_reason = not has_form or self.reasoning_before_form(prompt_end) is not None
        tool = self.tool if body.may_call and not body.must_call else None
        if self.reasoning is not None and may_reason and not (tool is not None and tool.reads_reasoning):
            readers.append(self.reasoning.reader(prompt_end, has_form))
        if body.must_call:
            readers.append(read_required if name is None else partial(read_named, name=name))
        elif tool is not None:
            read_calls, schemas = tool.read, body.schemas
            readers.append(lambda text: read_calls(text, schemas))
        return MessageParser(
            readers, body.max_calls, body.include_reasoning, is_named=body.must_call and name is not None
        )
