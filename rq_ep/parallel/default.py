"""The group a process belongs to when nobody names one."""

import torch
import torch.distributed as dist

from rq_ep.config import Environment
from rq_ep.parallel.base import EPGroup
from rq_ep.parallel.group import TorchGroup, choose_transport
from rq_ep.parallel.local import single_group


def default_group(device: str = "auto") -> EPGroup:
    """The group of all processes a launcher started; without one, this process alone, with no torch.distributed."""
    if dist.is_initialized() or Environment.from_os().world_size > 1:
        return TorchGroup.from_environment(device)
    return single_group(own_device(device))


def own_device(device: str = "auto") -> torch.device:
    """The device of a process that shares its GPU, if it has one, with no other."""
    return torch.device(choose_transport(device, ["this"] if torch.cuda.is_available() else [None]).device_type)
