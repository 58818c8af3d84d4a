"""Reasoning and calls of tools in the texts of answers, in every format, however the text is divided."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_ep.config import REASONING_PARSERS as REASONING_NAMES
from rq_ep.config import TOOL_CALL_PARSERS
from rq_ep.serve.http.openai.detokenizer import detokenizers
from rq_ep.serve.http.openai.tool_parsers import deepseek_v3 as ds
from rq_ep.serve.http.openai.tool_parsers.answer_parsers import TOOL_PARSERS, AnswerParsers
from rq_ep.serve.http.openai.tool_parsers.answer_text import Part
from rq_ep.serve.http.openai.tool_parsers.forced_calls import calls_schema, read_required
from rq_ep.serve.http.openai.tool_parsers.message_parser import MessageParser, Reader
from rq_ep.serve.http.openai.tool_parsers.reasoning_parser import REASONING_PARSERS
from tests.serve.http.openai.small_tokenizers import small_tokenizer

SCHEMAS = {
    "f": {"properties": {"a": {"type": "integer"}, "b": {"type": ["object", "null"]}, "c": {"type": "boolean"}}},
    "g": {},
}
V3_CALL = f"{ds.CALL}function{ds.SEPARATOR}%s\n```json\n%s\n```{ds.END_OF_CALL}"
V31_CALL = f"{ds.CALL}%s{ds.SEPARATOR}%s{ds.END_OF_CALL}"
F, G = '{"a": 1, "s": "}]\\"{ \\u00e9"}', "{}"

# Format -> the same two calls with text before and after, where the format has room for some.
CALLS = {
    "hermes": f'Hm.\n<tool_call>\n{{"name": "f", "arguments": {F}}}\n</tool_call>\n'
    f'<tool_call>{{"arguments": {G}, "name": "g"}}</tool_call> Done.',
    "qwen3_coder": 'Hm.\n<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=s>\n}]"{ \u00e9\n'
    "</parameter>\n</function>\n</tool_call>\n<function=g></function></tool_call> Done.",
    "llama3_json": f'<|python_tag|>{{"name": "f", "parameters": {F}}}; {{"type": "function", "name": "g", '
    f'"parameters": {G}}} Done.',
    "mistral": f'Hm.\n[TOOL_CALLS][{{"name": "f", "arguments": {F}}}, {{"name": "g", "arguments": {G}}}] Done.',
    "deepseek_v3": f"Hm.\n{ds.CALLS}{V3_CALL % ('f', F)}\n{V3_CALL % ('g', G)}{ds.END_OF_CALLS} Done.",
    "glm45": "Hm.\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>s</arg_key>\n"
    '<arg_value>}]"{ \u00e9</arg_value>\n</tool_call>\n<tool_call>g</tool_call> Done.',
    "gpt_oss": "<|channel|>commentary<|message|>Hm.\n<|end|><|start|>assistant<|channel|>commentary to=functions.f "
    f"<|constrain|>json<|message|>{F}<|call|><|start|>assistant to=functions.g<|channel|>commentary json<|message|>{G}"
    "<|call|><|start|>assistant<|channel|>final<|message|> Done.<|return|>",
    "deepseek_v31": f"Hm.\n{ds.CALLS}{V31_CALL % ('f', F)}{V31_CALL % ('g', G)}{ds.END_OF_CALLS} Done.",
}

# Format -> texts that begin as a call and are none: all of them is content.
NO_CALLS = {
    "hermes": ["<tool_call>", "a <tool_call>f(1)</tool_call> b", '<tool_call>{"name": "f"', "</tool_call>",
               '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>', '<tool_call>[{"name": "f"}]</tool_call>',
               '<tool_call>{"name": 1, "arguments": {}}</tool_call>', '<tool_call>{"name": "f", "arguments": {"a": 1'],
    "qwen3_coder": ["<tool_call>{}</tool_call>", "<tool_call>\n<function=f", "<function=f>\n<parameter=a>\n1",
                    "<function=f>what</tool_call>", "<function=f>\n<parameter=a</tool_call> b"],
    "llama3_json": ['{"city": "Paris"}', "<|python_tag|>print(1)", " {", "a {",
                    '{"name": "f", "parameters": {"a": x}}'],
    "mistral": ["[TOOL_CALLS]", "[TOOL_CALLS] f(x)", '[TOOL_CALLS][{"name": "f", "arguments": [}]', "[TOOL_CALLS]f{a}"],
    "deepseek_v3": [ds.CALLS, f"{ds.CALLS}{ds.CALL}f", f"{ds.CALLS}{V3_CALL % ('f', '{a}')}",
                    f"{ds.CALLS}{V31_CALL % ('f', '{}')}"],
    "gpt_oss": ["a <|channel|>", "<|channel|>final", "to=functions.f {}",
                "<|channel|>commentary to=functions.f<|message|>{a}<|call|>"],
    "glm45": ["<tool_call>", "<tool_call>f", '<tool_call>{"name": "f"}</tool_call>',
              "<tool_call>f<arg_key>a</tool_call>",
              "<tool_call>f<arg_key>a</arg_key>1</tool_call> b",
              "<tool_call>f<arg_key>a</arg_key><arg_value>1</tool_call>",
              "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value> b"],
    "deepseek_v31": [f"a{ds.CALLS} b", f"{ds.CALLS}{V31_CALL % ('f', '{a}')}"],
}  # fmt: skip


def reader(name: str) -> Reader:
    return lambda text: TOOL_PARSERS[name].read(text, SCHEMAS)


def parse(pieces: list[str], *readers: Reader, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole message, and the deltas, of an answer that comes in pieces."""
    whole, streamed = MessageParser(readers, **options), MessageParser(readers, **options)
    parts: list[Part] = []
    deltas = []
    for at, piece in enumerate(pieces):
        is_end = at == len(pieces) - 1
        parts += whole.parts(piece, is_end)
        deltas.append(streamed.delta(streamed.parts(piece, is_end), "stop" if is_end else None)[0])
    return whole.message(parts, "stop")[0], deltas


def joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that deltas make, as clients join them."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for delta in deltas:
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name, "")
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(message["tool_calls"]):
                assert set(call) == {"index", "id", "type", "function"}
                message["tool_calls"].append([call["function"]["name"], ""])
            message["tool_calls"][call["index"]][1] += call["function"]["arguments"]
    return message


def calls(message: dict[str, Any]) -> list[list[str]]:
    return [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", ())]


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_two_calls_are_found_with_the_text_around_them(name: str) -> None:
    message, _ = parse([CALLS[name]], reader(name))
    before = "" if name == "llama3_json" else "Hm.\n"
    assert message["content"] == f"{before} Done."
    assert [(name, json.loads(text)) for name, text in calls(message)] == [("f", json.loads(F)), ("g", {})]
    assert len({call["id"] for call in message["tool_calls"]}) == 2


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in NO_CALLS.items() for text in texts])
def test_a_malformed_call_is_content(name: str, text: str) -> None:
    message, deltas = parse([text], reader(name))
    assert (message["content"], calls(message)) == (text, [])
    streamed = joined(deltas)
    assert streamed["content"] == text or streamed["tool_calls"][0][0] == "f", "a name cannot be taken back"


@pytest.mark.parametrize("name", TOOL_PARSERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_division_of_the_text_changes_nothing(name: str, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([CALLS[name], *NO_CALLS[name], CALLS[name][:-30]]))
    text = data.draw(st.sampled_from(["", "<think>Let me see.</think>\n\n"])) + text
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1))))
    readers = [REASONING_PARSERS["qwen3"].reader(""), reader(name)]
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    (message, deltas), (expected, at_once) = parse(pieces, *readers), parse([text], *readers)
    assert joined(deltas) == joined(at_once)
    assert [message.get(key) for key in ("content", "reasoning")] == [
        expected.get(key) for key in ("content", "reasoning")
    ]
    assert calls(message) == calls(expected)


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_arguments_are_streamed_as_they_come(name: str) -> None:
    _, deltas = parse(list(CALLS[name]), reader(name))
    pieces = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in pieces] == sorted(call["index"] for call in pieces)
    assert pieces[0]["function"] == {"name": "f", "arguments": pieces[0]["function"]["arguments"]}
    assert len(pieces) > 4


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("x", "x")] + [(text, None) for text in ("null", "None")],
)
def test_arguments_in_tags_have_the_types_of_the_schema(text: str, value: Any) -> None:
    key = "a" if value in (1, "x") else "b"
    answer = f"<function=f><parameter={key}>\n{text}\n</parameter><parameter=c>True</parameter>"
    answer += "<parameter=d>1</parameter></function>"
    ((_, arguments),) = calls(parse([answer], reader("qwen3_coder"))[0])
    assert json.loads(arguments) == {key: value, "c": True, "d": "1"}


@pytest.mark.parametrize(
    ("name", "prompt_end", "text", "reasoning", "content"),
    [
        ("qwen3", "", "<think>\na</think>\n\nb", "\na", "\n\nb"),
        ("qwen3", "<think>\n", "a</think>b", "a", "b"),
        ("qwen3", "<think>\n\n</think>\n\n", "a", None, "a"),
        ("qwen3", "", "a <think>b</think>", None, "a <think>b</think>"),
        ("qwen3", "<think>", "a</thin", "a</thin", None),
        ("deepseek_r1", "", "a</think>b", "a", "b"),
        ("deepseek_r1", "</think>", "a", None, "a"),
        (
            "gpt_oss",
            "",
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b",
            "a",
            "b",
        ),
        ("gpt_oss", "", "<|channel|>analysis<|message|>a", "a", None),
        ("gpt_oss", "", "<|channel|>commentary to=functions.f<|message|>{}<|call|>", None, "{}"),
        ("gpt_oss", "", "a", None, "a"),
    ],
)
def test_reasoning_ends_where_its_mark_does(
    name: str, prompt_end: str, text: str, reasoning: str | None, content: str | None
) -> None:
    read = REASONING_PARSERS[name].reader(prompt_end)
    message, deltas = parse(list(text), read)
    assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)
    assert message.get("reasoning") == reasoning
    assert joined(deltas)["reasoning_content"] == (reasoning or "")
    assert "reasoning" not in parse([text], read, shows_reasoning=False)[0]


def test_only_the_first_call_is_kept_where_they_may_not_be_parallel() -> None:
    message, deltas = parse(list(CALLS["hermes"]), reader("hermes"), max_calls=1)
    assert [name for name, _ in calls(message)] == [name for name, _ in joined(deltas)["tool_calls"]] == ["f"]
    assert message["content"] == "Hm.\n Done."


def test_references_of_a_tools_schema_lead_to_its_own_parts() -> None:
    schema = {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "integer"}}}
    made = calls_schema({"f": {}, "g": schema}, 1)
    place = "/items/anyOf/1/properties/parameters"
    assert made["items"]["anyOf"][1]["properties"]["parameters"]["properties"]["a"] == {"$ref": f"#{place}/$defs/A"}
    assert made["maxItems"] == 1


def test_what_is_no_list_of_calls_is_content_where_calls_are_required() -> None:
    assert (
        parse(['[{"name": "f", "parameters": {"a"'], read_required)[0]["content"] == '[{"name": "f", "parameters": {"a"'
    )


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ('<tool_call> "{\\"name\\": x, \\"arguments\\": y}"', "hermes"),
        ("<tool_call><function=", "qwen3_coder"),
        (f"{ds.CALLS} ```json", "deepseek_v3"),
        (ds.CALLS, "deepseek_v31"),
        ("[TOOL_CALLS]", "mistral"),
        ('<|python_tag|> "parameters"', "llama3_json"),
        ("<tool_call> <arg_key>", "glm45"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "gpt_oss"),
        ("<tool_call>", None),
        (None, None),
    ],
)
def test_a_chat_template_shows_the_format_of_calls(template: str | None, name: str | None) -> None:
    assert AnswerParsers.of(template).tool is (None if name is None else TOOL_PARSERS[name])
    assert f"read as {name or 'none'} (--tool" in str(AnswerParsers.of(template))
    assert AnswerParsers.of(template, "none").tool is None
    assert AnswerParsers.of(template, "mistral").tool is TOOL_PARSERS["mistral"]


def test_the_settings_name_every_parser() -> None:
    assert set(TOOL_CALL_PARSERS) == set(TOOL_PARSERS)
    assert set(REASONING_NAMES) == set(REASONING_PARSERS)


@pytest.mark.parametrize("kind", ["llama", "byte_level", "unknown"])
def test_special_tokens_that_tell_calls_are_text(kind: str) -> None:
    tokenizer = small_tokenizer("llama" if kind == "unknown" else kind)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [
        *tokenizer.encode("the cat", add_special_tokens=False),
        end,
        *tokenizer.encode("and", add_special_tokens=False),
    ]
    for marks, mark in ((("<|im_end|>", "[none]"), "<|im_end|>"), ((), "")):
        detokenizer = detokenizers(_Opaque(tokenizer) if kind == "unknown" else tokenizer, marks)()
        text = "".join(detokenizer.push(token_id).text for token_id in ids) + detokenizer.flush().text
        assert text.replace(" and", "and") == f"the cat{mark}and"


class _Opaque:
    """A tokenizer of which only transformers' own methods are known."""

    def __init__(self, tokenizer: Any) -> None:
        self.decode, self.get_vocab, self.all_special_ids = (
            tokenizer.decode,
            tokenizer.get_vocab,
            tokenizer.all_special_ids,
        )
