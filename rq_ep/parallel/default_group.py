"""The default group of a process."""

import atexit

import torch
import torch.distributed as dist

from rq_ep.config import Environment
from rq_ep.parallel.ep_group import EPGroup
from rq_ep.parallel.local_group import single_group
from rq_ep.parallel.processes.transport import choose_transport
from rq_ep.parallel.torch_group import TorchGroup


def default_group(device: str = "auto") -> EPGroup:
    """The group of all processes that a launcher started; without a launcher this process alone.

    Whoever does not close it may leave it open: it ends with the process.
    """
    if dist.is_initialized() or Environment.from_os().world_size > 1:
        group = TorchGroup.from_environment(device)
        # A thread of gloo that frees a tensor while the interpreter ends would end the process by SIGABRT.
        atexit.register(group.end)
        return group
    return single_group(own_device(device))


def own_device(device: str = "auto") -> torch.device:
    """The device of a process that is alone on its GPU, if it has one."""
    return torch.device(choose_transport(device, ["this"] if torch.cuda.is_available() else [None]).device_type)
