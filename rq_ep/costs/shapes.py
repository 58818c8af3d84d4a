"""Sizes of one MoE layer of well-known models."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from rq_ep.core.errors import check_choice


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


SHAPES: Mapping[str, Shape] = {
    name: Shape(**sizes)
    for name, sizes in yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text(encoding="utf-8")).items()
}


def shape_name(text: str) -> str:
    """The name of a shape; `_` counts as `-`.

    Raises:
        UserError: there is no such shape.
    """
    return check_choice("--shape", text.replace("_", "-"), SHAPES)
