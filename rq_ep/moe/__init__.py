"""The expert-parallel MoE layer: bank, grouped compute, the layer itself, telemetry."""

from rq_ep.moe.bank import ExpertBank, SpareRoom
from rq_ep.moe.family import ExpertFamily
from rq_ep.moe.layer import EPExperts
from rq_ep.moe.local import LocalExperts
from rq_ep.moe.telemetry import Telemetry
from rq_ep.moe.trace import RoutingRecorder, StepNote

__all__ = [
    "EPExperts",
    "ExpertBank",
    "ExpertFamily",
    "LocalExperts",
    "RoutingRecorder",
    "SpareRoom",
    "StepNote",
    "Telemetry",
]
