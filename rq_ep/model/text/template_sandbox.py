"""Bounds on chat templates, which are programs of a checkpoint: how long they run, and the sizes of what they compute.

A template that hangs would hold a thread of the HTTP process, and within one large power all of it. Filters and methods
are not bounded by themselves: their time counts with the next call or pass through a loop.
"""

import time
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

MAX_SECONDS = 5.0  # of computing
MAX_LENGTH = 1 << 24  # items or characters of a sum or product
MAX_BITS = 1 << 12  # of a number


def bound_chat_templates() -> None:
    """Have transformers compile chat templates in a `BoundedEnvironment` from now on."""
    chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment  # type: ignore[attr-defined]


class TemplateLimitError(SecurityError):
    """What a template computes is too long or too large."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox that transformers uses, with bounds: rendering raises a `TemplateLimitError` beyond them."""

    intercepted_binops = frozenset({"**", "*", "+"})

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        used: Any = context
        now_s = time.thread_time()
        used.started_s = getattr(used, "started_s", now_s)
        if now_s - used.started_s > MAX_SECONDS:
            raise TemplateLimitError(f"it runs for more than {MAX_SECONDS:g} s")
        return called is self.step or super().call(context, called, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _is_too_large(operator, left, right):
            raise TemplateLimitError(f"{operator} would make a number or a sequence of no reasonable size")
        return super().call_binop(context, operator, left, right)

    def join_strings(self, *parts: Any) -> str:
        """The operator `~`."""
        text = [str(part) for part in parts]
        if sum(map(len, text)) > MAX_LENGTH:
            raise TemplateLimitError("~ would make a text of no reasonable size")
        return "".join(text)

    @staticmethod
    def step() -> bool:
        """Stand for a pass through a loop, of which `call` then knows."""
        return True

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        code: str = super()._generate(_Bounds().visit(source), *args, **kwargs)
        return code


class _Bounds(NodeTransformer):
    """Puts a call of `step` into every loop, and of `join_strings` in place of every `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
        if node.test is None:
            node.body.insert(0, nodes.ExprStmt(step))
        else:
            node.test = nodes.And(step, node.test)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("join_strings"), node.nodes, [], None, None)


def _is_too_large(operator: str, left: Any, right: Any) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        num_bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        return num_bits > MAX_BITS
    if operator == "+":
        return _length(left) + _length(right) > MAX_LENGTH
    number, sequence = (left, right) if isinstance(left, int) else (right, left)
    return operator == "*" and isinstance(number, int) and number * _length(sequence) > MAX_LENGTH


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0
