"""Chat templates that would hang or fill the memory of the process that renders them."""

import time
from pathlib import Path

import pytest

from rq_ep.core.errors import UserError
from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer
from rq_ep.model.text import template_sandbox
from rq_ep.model.text.byte_tokenizer import byte_tokenizer

FOLDED = "{% set ns = namespace(x='aa') %}{% for i in range(64) %}{% set ns.x = ns.x OP ns.x %}{% endfor %}"
ENDLESS = {
    "power": "{{ 9**(9**9) }}",
    "text": "{{ 'a' * 10**10 }}",
    "list": "{{ 10**9 * [0] }}",
    "sum": FOLDED.replace("OP", "+"),
    "join": FOLDED.replace("OP", "~"),
    "number": FOLDED.replace("OP", "*").replace("'aa'", "3"),
    "loop": "{% set x = range(99999) %}{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}",
    "loop with a test": "{% set x = range(99999) %}{% for a in x %}{% for b in x if b < 0 %}{% endfor %}{% endfor %}",
    "filter": "{% set x = range(99999) %}{% for a in x %}{% set y = x | map('string') | list %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}
OPERATORS = """{% for m in messages if m.content %}{{ loop.index + 2**3 * 2 }}{{ '-' * 3 ~ m.content ~ none }}{% else %}
nothing{% endfor %}{{ [1] + [2] }}{{ 1.5 * 2 + 2 ** -1 }}{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a' + 'b') }}"""


def folder(path: Path, template: str) -> Path:
    tokenizer = byte_tokenizer(100)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_refused_with_its_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.05)
    start_s = time.thread_time()
    with pytest.raises(UserError, match=r"^the chat template of .*: (it runs for more|.* would make a)"):
        read_tokenizer(folder(tmp_path, ENDLESS[name]))
    assert time.thread_time() - start_s < 5


def test_a_template_is_bounded_when_it_meets_the_messages_it_hangs_on(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(
        folder(tmp_path, "{% for m in messages %}{{ m.content.number ** (9 ** 9) }}{% endfor %}")
    )
    with pytest.raises(template_sandbox.TemplateLimitError, match=r"\*\* would make a number"):
        tokenizer.apply_chat_template([{"role": "user", "content": {"number": 9}}], tokenize=False)


def test_operators_and_loops_within_the_bounds_mean_what_they_do_elsewhere(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(folder(tmp_path, OPERATORS))
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": ""}, {"role": "user", "content": "b"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "17---aNone18---bNone[1, 2]3.5<ab>"
