"""The report that a loaded model carries: its placement, its expert-parallel layers, and what they take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from rq_ep.core.placement import Placement
from rq_ep.core.strategy import Strategy
from rq_ep.model.load.memory import RankBytes
from rq_ep.moe import EPExperts, LocalExperts
from rq_ep.moe.telemetry import CallRecorder


@dataclass(frozen=True)
class LoadReport:
    """How a model's experts were loaded; a loaded model keeps it as `model.rq_ep`, see `report_of`."""

    placement: Placement
    strategy: Strategy
    layers: tuple[EPExperts | LocalExperts, ...]  # in the order in which a forward pass enters them
    telemetry: CallRecorder | None
    bytes_read: int  # from the checkpoint, by this process
    expert_bytes: Mapping[str, int]  # resident in this process, by weight format
    rank_bytes: RankBytes  # all that a rank needs of its device


def report_of(model: PreTrainedModel) -> LoadReport:
    """The report of a model that `rq_ep.load` returned."""
    report: Any = model.rq_ep
    assert isinstance(report, LoadReport), report
    return report
