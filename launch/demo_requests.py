"""Talk to the demo's server the way any client would: the openai package, one answer at once and one streamed."""

import argparse
import sys

from openai import OpenAI, OpenAIError


def ask(base_url: str) -> None:
    client = OpenAI(base_url=base_url, api_key="none", timeout=60)
    model = client.models.list().data[0].id

    for prompt in (
        "    def __init__(self, name):\n        self.name = ",
        "0041;LATIN CAPITAL LETTER A;Lu;L;\n0042;LATIN CAPITAL LETTER ",
        "The following operators are ",
    ):
        completion = client.completions.create(model=model, prompt=prompt, max_tokens=48, temperature=0)
        usage = completion.usage
        print(
            f"{prompt!r} -> {completion.choices[0].text!r}  ({usage.prompt_tokens} + {usage.completion_tokens} tokens)"
        )

    print("streamed chat: ", end="", flush=True)
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is a list?"}],
        max_tokens=96,
        temperature=0.7,
        seed=1,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="where the server listens")
options = parser.parse_args()
try:
    ask(options.base_url)
except OpenAIError as error:
    sys.exit(f"demo_requests: error: --base-url {options.base_url}: {error}")
