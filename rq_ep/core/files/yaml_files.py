"""YAML files of users: plain values, read with errors of one line."""

from pathlib import Path
from typing import Any

import yaml

from rq_ep.core.errors import MAX_DIGITS, UserError
from rq_ep.core.files.documents import read_text

MAX_YAML_BYTES = 1 << 20  # a file written by hand is far smaller, and reading YAML is slow
MAX_YAML_DEPTH = 50


def read_yaml(path: str | Path, what: str, hint: str) -> Any:
    """The YAML document in a file, as `parse_yaml` reads it; the arguments are those of `read_json`."""
    return parse_yaml(read_text(path, what, hint, MAX_YAML_BYTES), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """A plain YAML document: without references, in which a few lines can stand for more values than fit into memory.

    Args:
        where: the text is from, for messages.

    Raises:
        UserError: it is not YAML, it names a key twice, or it is nested too deeply.
    """
    try:
        return yaml.load(text, PlainYamlLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line}: malformed YAML ({problem:.200})") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # a month 13; a text tagged as a number
        raise UserError(f"{where}: malformed YAML ({type(error).__name__}: {error!s:.100})") from None


class PlainYamlLoader(yaml.SafeLoader):
    """PyYAML's loader of plain values, without what makes a small text costly or ambiguous."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(None, None, "references (& and *) are not read", event.start_mark)
        if self._depth == MAX_YAML_DEPTH:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            names = [str(key.value) for key, _ in node.value]
            twice = next((name for name in names if names.count(name) > 1), "a key")
            raise yaml.constructor.ConstructorError(None, None, f"{twice:.60} is given twice", node.start_mark)
        return mapping

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        if len(node.value) > MAX_DIGITS:  # left as text, for who asks for a number to refuse by name
            return node.value
        return yaml.SafeLoader.yaml_constructors[node.tag](self, node)


for _kind in ("int", "float"):
    PlainYamlLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", PlainYamlLoader.construct_number)
