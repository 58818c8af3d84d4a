"""Sizes of MoE layers, and the LLEP paper's figures for three of them in published.yaml."""

from pathlib import Path
from typing import Any

import yaml

from rq_ep.costs.shapes import SHAPES, Shape, shape_name

PUBLISHED: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))


def published(shape: str, scenario: str) -> dict[str, float]:
    """The paper's figures for a shape and scenario, by their keys in published.yaml; empty where it has none."""
    figures = PUBLISHED["shapes"].get(shape)
    if figures is None or scenario not in PUBLISHED["scenarios"]:
        return {}
    at = PUBLISHED["scenarios"].index(scenario)
    return {key: values[at] for key, values in figures.items() if isinstance(values, list)}


__all__ = ["PUBLISHED", "SHAPES", "Shape", "published", "shape_name"]
