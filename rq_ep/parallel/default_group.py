"""The group a process belongs to when nobody names one."""

import torch
import torch.distributed as dist

from rq_ep.config import Environment
from rq_ep.parallel.ep_group import EPGroup
from rq_ep.parallel.local_group import single_group
from rq_ep.parallel.torch_group import TorchGroup, choose_transport


def default_group(device: str = "auto") -> EPGroup:
    """The group of all processes a launcher started; without one, this process alone, with no torch.distributed."""
    if dist.is_initialized() or Environment.from_os().world_size > 1:
        return TorchGroup.from_environment(device)
    return single_group(own_device(device))


def own_device(device: str = "auto") -> torch.device:
    """The device of a process that shares its GPU, if it has one, with no other."""
    return torch.device(choose_transport(device, ["this"] if torch.cuda.is_available() else [None]).device_type)
