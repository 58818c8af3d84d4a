"""DeepSpeed on the processes of a launcher, and the checks that both of its layers need."""

from types import ModuleType

import torch.distributed as dist

from bench.layer.case import Case
from rq_ep.core.errors import UserError
from rq_ep.parallel import EPGroup


def start_deepspeed(peer: str, case: Case, group: EPGroup) -> ModuleType:
    """DeepSpeed, attached to the processes of `group`.

    Raises:
        UserError: it is not installed, or cannot run this case.
    """
    experts = case.shape.num_experts
    if group.backend == "local":
        raise UserError(f"--peers {peer}: needs processes; start it with torchrun, without --local-ranks")
    if experts % group.size:
        raise UserError(f"--peers {peer}: {experts} experts do not divide by {group.size} ranks")
    try:
        import deepspeed
    except ImportError:
        raise UserError(f'--peers {peer}: not installed; pip install "rq_ep[deepspeed]"') from None
    if group.device.type == "cpu":  # it would compile an op that gloo does not need
        getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    module: ModuleType = deepspeed
    return module
