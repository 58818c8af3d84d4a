"""Sizes of MoE layers: the models in shapes.yaml, and the LLEP paper's figures for three of them in published.yaml."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rq_ep.core.errors import check_choice

HERE = Path(__file__).parent
PUBLISHED: dict[str, Any] = yaml.safe_load((HERE / "published.yaml").read_text())


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


SHAPES = {name: Shape(**sizes) for name, sizes in yaml.safe_load((HERE / "shapes.yaml").read_text()).items()}


def shape_name(text: str) -> str:
    """The name of a shape; `_` counts as `-`."""
    return check_choice("--shape", text.replace("_", "-"), SHAPES)


def published(shape: str, scenario: str) -> dict[str, float]:
    """The paper's figures for a shape and scenario, by their keys in published.yaml; empty where it has none."""
    figures = PUBLISHED["shapes"].get(shape)
    if figures is None or scenario not in PUBLISHED["scenarios"]:
        return {}
    at = PUBLISHED["scenarios"].index(scenario)
    return {key: values[at] for key, values in figures.items() if isinstance(values, list)}
