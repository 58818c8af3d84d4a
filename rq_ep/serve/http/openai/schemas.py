"""Bodies of requests, after OpenAI's reference. What is not supported is refused, never ignored."""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.bodies.answer_grammar import ResponseFormat, StructuredOutputs, TextFormat
from rq_ep.serve.http.openai.bodies.body import MAX_INT, Body, TokenId, absent, any_of, exactly_one, has, some
from rq_ep.serve.http.openai.bodies.chat_messages import MAX_MESSAGES, ChatMessage, ImageUrlPart
from rq_ep.serve.http.openai.bodies.prompts import Prompts
from rq_ep.serve.http.openai.bodies.tools import ANY_ARGUMENTS, NamedToolChoice, ToolChoice, Tools

# Parameters that are not supported, with the values that ask for nothing: OpenAI's, and vLLM's.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "function_call": ("none",),
    "functions": (),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}

MAX_LOGPROBS = 20
MAX_CHOICES = 128  # to a prompt, as OpenAI's
MAX_BIASED = 1024  # tokens of a logit_bias; OpenAI takes 300
MAX_STOP_TOKENS = 128
MAX_STOPS = 64  # strings; OpenAI takes 4

TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # of vLLM's, which GuideLLM sends
    include_obfuscation: Literal[False] = False


GUIDES = {f"guided_{name}": name for name in ("json", "regex", "choice", "grammar")}  # vLLM's older names

# What JSON Schema can say of the rules between fields, here and below; the validators know all of them.
GENERATION_RULES = [
    any_of(absent("stream_options"), has("stream", True)),
    any_of(absent("structured_outputs"), absent(*GUIDES)),
]


class GenerationBody(Body):
    """What completions and chat completions share. `ignore_eos` is an extension that load generators use."""

    model: str
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT)  # the newer name; GuideLLM sends both
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    top_k: int | None = Field(None, ge=-1, le=MAX_INT)  # 0 or -1: any number
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: (
        Annotated[dict[TokenKey, Bias], Field(max_length=MAX_BIASED, json_schema_extra={"additionalProperties": False})]
        | None
    ) = None
    min_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool = False
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Names of who asks, of what for, and of what to cache, which change no answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_routed_experts: bool = False  # as SGLang's; they come as vLLM's

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, data: Any) -> Any:
        """Drop parameters that ask for nothing; name the ones that ask for what there is not."""
        if not isinstance(data, dict):
            return data
        for name, neutral in NEUTRAL.items():
            if data.get(name) is not None and not any(_same(data[name], value) for value in neutral):
                raise ApiError(400, f"{name}={data[name]!r:.60} is not supported by this server: leave it out", name)
        return _with_guides({name: value for name, value in data.items() if name not in NEUTRAL})

    @model_validator(mode="after")
    def check_grammar(self) -> "GenerationBody":
        """Refuse what contradicts an answer of a given form, which ends where the form is complete."""
        param = self.grammar_param
        if param is not None and (self.ignore_eos or self.min_tokens):
            other = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise ApiError(400, f"{other} does not go with {param}, by which an answer ends", other)
        return self

    @model_validator(mode="after")
    def check_stream_options(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options are only allowed when stream is true", "stream_options")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The JSON schema, with what is accepted though no field has it."""
        reference = super().__get_pydantic_json_schema__(core_schema, handler)
        schema = handler.resolve_ref_schema(reference)
        fields = schema["properties"]
        fields |= {name: {"enum": [None, *values]} for name, values in NEUTRAL.items()}
        guides = StructuredOutputs.model_json_schema()["properties"]
        fields |= {name: {**guides[guide], "title": name, "deprecated": True} for name, guide in GUIDES.items()}
        return reference

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to name at each token's place; None: no log-probabilities at all."""
        raise NotImplementedError

    @property
    def grammar_param(self) -> str | None:
        """The parameter that says which form the answer has; None: any."""
        if self.structured_outputs is not None:
            return "structured_outputs"
        wants_text = self.response_format is None or isinstance(self.response_format, TextFormat)
        return None if wants_text else "response_format"

    @property
    def echoes(self) -> bool:
        """Whether the prompt is part of the answer."""
        return False

    @property
    def num_tries(self) -> int:
        """Answers that are made to a prompt, of which the best `n` are given."""
        return self.n

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def usage_options(self) -> StreamOptions:
        return self.stream_options or StreamOptions()


def _with_guides(data: dict[str, Any]) -> dict[str, Any]:
    """Read `guided_json` and its like, vLLM's older names, as `structured_outputs`."""
    guides = {GUIDES[name]: value for name, value in data.items() if name in GUIDES and value is not None}
    if not guides:
        return data
    rest = {name: value for name, value in data.items() if name not in GUIDES}
    if rest.get("structured_outputs") is not None:
        raise ApiError(400, "structured_outputs: guided_* says it as well: give one of both", "structured_outputs")
    return {**rest, "structured_outputs": guides}


def _same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


class CompletionBody(GenerationBody):
    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                *GENERATION_RULES,
                any_of(absent("max_tokens"), {"properties": {"max_tokens": {"minimum": 1}}}, has("echo", True)),
            ]
        }
    )
    prompt: Prompts
    max_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)

    @model_validator(mode="after")
    def check_best_of(self) -> "CompletionBody":
        if self.best_of is not None and self.best_of < self.n:
            raise ApiError(400, f"best_of is {self.best_of}, but n={self.n} answers are asked for", "best_of")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise ApiError(400, "best_of cannot be streamed: which answer is best shows at the end", "best_of")
        return self

    @model_validator(mode="after")
    def check_max_tokens(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens is 0, which is only allowed with echo: ask for at least 1", "max_tokens")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_tries(self) -> int:
        return self.best_of or self.n

    @property
    def echoes(self) -> bool:
        return bool(self.echo)


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]  # vLLM's values


class ChatBody(GenerationBody):
    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                *GENERATION_RULES,
                any_of({"properties": {"tool_choice": {"enum": ["none", "auto", None]}}}, some("tools")),
                any_of({"properties": {"top_logprobs": {"enum": [0, None]}}}, has("logprobs", True)),
            ]
        }
    )
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None  # default: auto, if there are tools
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_tools(self) -> "ChatBody":
        """Refuse a choice among tools that there are not, and calls where another form is wanted."""
        names = [tool.function.name for tool in self.tools or ()]
        if repeated := next((name for name, number in Counter(names).items() if number > 1), None):
            raise ApiError(400, f"tools: there are two of the name {repeated!r:.60}", "tools")
        if isinstance(self.tool_choice, NamedToolChoice) and (name := self.tool_choice.function.name) not in names:
            raise ApiError(400, f"tool_choice: there is no tool {name!r:.60} in tools", "tool_choice")
        if self.tool_choice == "required" and not names:
            raise ApiError(400, "tool_choice is 'required', but there are no tools", "tool_choice")
        if self.may_call and (param := super().grammar_param) is not None:
            raise ApiError(400, f"{param} rules out calls of tools: give tool_choice 'none' with it", param)
        return self

    @property
    def may_call(self) -> bool:
        """Whether the answer may call tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def must_call(self) -> bool:
        return self.may_call and self.tool_choice not in (None, "auto")

    @property
    def called_name(self) -> str | None:
        """The function that is to be called; None: any, or none."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedToolChoice) else None

    @property
    def max_calls(self) -> int | None:
        return None if self.parallel_tool_calls else 1

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]]:
        """Name of a tool's function -> JSON schema of its parameters."""
        return {tool.function.name: tool.function.parameters or ANY_ARGUMENTS for tool in self.tools or ()}

    @property
    def grammar_param(self) -> str | None:
        return "tool_choice" if self.must_call else super().grammar_param

    @model_validator(mode="after")
    def check_top_logprobs(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs are only allowed when logprobs is true", "top_logprobs")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def image_urls(self) -> dict[str, str]:
        """Place in the body -> URL."""
        return {
            f"messages.{at}.content.{number}.image_url": part.image_url.url
            for at, message in enumerate(self.messages)
            for number, part in enumerate(message.content if isinstance(message.content, list) else ())
            if isinstance(part, ImageUrlPart)
        }


class TokenizeBody(Body):
    """What `/tokenize` is to turn into token ids: a text, or a conversation as the chat template writes it."""

    model_config = ConfigDict(json_schema_extra=exactly_one("prompt", "messages"))
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None  # default: for a text, as in completions, but not for a conversation
    return_token_strs: bool = False

    @model_validator(mode="after")
    def check_there_is_one(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "give a prompt or messages, one of both", "prompt")
        return self


class DetokenizeBody(Body):
    """What `/detokenize` is to turn into text."""

    model: str | None = None
    tokens: list[TokenId] = Field(max_length=MAX_INT, fail_fast=True)
