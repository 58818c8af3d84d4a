"""The prompts of a completion: texts and lists of token ids, one of them or several."""

from typing import Annotated, Any

from pydantic import Field, PlainValidator

from rq_ep.serve.http.openai.bodies.body import MAX_INT, TokenId, whole

MAX_PROMPTS = 2048  # in a request, as OpenAI's


def read_prompts(value: Any) -> list[str | list[int]]:
    """The prompts of a completion, one or a list of them. Takes one pass, and names the first wrong token."""
    if not (isinstance(value, list) and value and isinstance(value[0], str | list)):
        return [read_prompt(value)]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"{len(value)} prompts in one request, at most {MAX_PROMPTS} are taken")
    if len(value) == 1:
        return [read_prompt(value[0])]
    prompts = []
    for number, prompt in enumerate(value):
        try:
            prompts.append(read_prompt(prompt))
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from None
    return prompts


def read_prompt(value: Any) -> str | list[int]:
    """One prompt, as text or token ids."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("Input should be text or a list of token ids")
    for at, token_id in enumerate(value):
        if type(token_id) is not int or not 0 <= token_id <= MAX_INT:
            if type(token_id) is float and token_id.is_integer():
                return read_prompt([whole(token_id) for token_id in value])
            raise ValueError(f"{token_id!r:.60} at place {at} is no token id")
    return value


TokenIds = Annotated[list[TokenId], Field(min_length=1)]
PromptInput = str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
Prompts = Annotated[list[str | list[int]], PlainValidator(read_prompts, json_schema_input_type=PromptInput)]
