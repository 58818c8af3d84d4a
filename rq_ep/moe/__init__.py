"""The expert-parallel MoE layer: resident and borrowed experts, grouped compute, the layer itself, telemetry."""

from rq_ep.moe.borrowing import BorrowBuffers
from rq_ep.moe.expert_bank import ExpertBank
from rq_ep.moe.expert_family import ExpertFamily
from rq_ep.moe.layer import EPExperts
from rq_ep.moe.local_experts import LocalExperts
from rq_ep.moe.routing_recorder import RoutingRecorder, StepInfo, StepRouting
from rq_ep.moe.telemetry import Telemetry

__all__ = [
    "BorrowBuffers",
    "EPExperts",
    "ExpertBank",
    "ExpertFamily",
    "LocalExperts",
    "RoutingRecorder",
    "StepInfo",
    "StepRouting",
    "Telemetry",
]
