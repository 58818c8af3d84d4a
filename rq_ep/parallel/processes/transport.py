"""Where the tensors of a group live, and which backend moves them."""

import socket
from collections.abc import Sequence
from typing import NamedTuple

import torch

from rq_ep.core.errors import UserError, check_choice


class Transport(NamedTuple):
    """Where tensors live and which backend moves them, and why."""

    device_type: str
    backend: str
    reason: str


def choose_transport(wanted: str, gpus: Sequence[str | None]) -> Transport:
    """Choose device and backend for all ranks.

    Args:
        wanted: auto, cpu or cuda.
        gpus: for each rank a name of the GPU it would use that is unique in the cluster; None without one.

    Raises:
        UserError: cuda is wanted where a rank has no GPU.
    """
    check_choice("device", wanted, ("auto", "cpu", "cuda"))
    without = [rank for rank, gpu in enumerate(gpus) if gpu is None]
    if wanted == "cuda" and without:
        raise UserError(f"--device cuda: rank {without[0]} has no CUDA device; use --device cpu")
    is_exclusive = not without and len(set(gpus)) == len(gpus)
    if wanted == "cpu":
        return Transport("cpu", "gloo", "as asked")
    if is_exclusive:
        return Transport("cuda", "nccl", "every rank has a GPU of its own")
    if wanted == "cuda":
        return Transport("cuda", "gloo", "ranks share a GPU, which NCCL refuses: tensors travel through host memory")
    return Transport("cpu", "gloo", "not every rank has a GPU of its own")


def gpu_name(local_rank: int) -> str | None:
    """A name, unique in the cluster, of the GPU that a process would use; None without one."""
    if not torch.cuda.is_available():
        return None
    uuid = torch.cuda.get_device_properties(device_of("cuda", local_rank)).uuid
    return f"{socket.gethostname()} {uuid}"


def device_of(device_type: str, local_rank: int) -> torch.device:
    """The device of a process that has this number on its node."""
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())
