"""What DeepSpeed's communication logger saw of a layer. It sees only what goes through `deepspeed.comm`."""

from typing import Any

from torch import nn

from bench.layer.case import Batch
from rq_ep.core.errors import UserError

NUM_CALLS = 3


def communication(layer: nn.Module, batch: Batch) -> dict[str, Any]:
    """Count, bytes, latency and bandwidth of each operation of a few calls, on rank 0. All ranks call it.

    Logging waits for every operation, so these calls are not timed.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    try:
        import deepspeed.comm as comm
    except ImportError:
        raise UserError('--comm-log: needs DeepSpeed; pip install "rq_ep[deepspeed]"') from None
    comm.configure(enabled=True, prof_all=True)
    comm.comm.comms_logger.reset_data()
    try:
        for _ in range(NUM_CALLS):
            layer(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
        logged = comm.log_summary(show_straggler=True, return_dict=True) or {}
    finally:
        comm.configure(enabled=False)
    summary: dict[str, Any] = logged.get("summary", {})
    return summary
