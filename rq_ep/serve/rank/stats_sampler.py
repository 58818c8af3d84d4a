"""The figures that a rank reports once a second."""

from collections.abc import Callable

import torch

from rq_ep.engine.engine import Engine
from rq_ep.engine.progress import MoverProgress
from rq_ep.model.load.memory import free_bytes
from rq_ep.serve.messages import RankStats
from rq_ep.serve.rank.loads.load_totals import LoadTotals


class StatsSampler:
    """Samples an engine, and the steps and the load since the last sample.

    Args:
        engine: the rank's.
        loads: the load of all ranks, where this rank leads them; elsewhere there is none.
        device: of the rank.
        mover: how far this rank's migration of experts has come.
    """

    def __init__(
        self,
        engine: Engine,
        loads: LoadTotals,
        device: torch.device,
        mover: Callable[[], MoverProgress] = MoverProgress,
    ) -> None:
        self._engine = engine
        self._loads = loads
        self._device = device
        self._mover = mover
        self._reported_steps = (0, 0.0)

    def sample(self) -> RankStats:
        engine = self._engine
        (num_steps, steps_s), (num_reported, reported_s) = engine.steps, self._reported_steps
        self._reported_steps = (num_steps, steps_s)
        return RankStats(
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            kv_cache_usage=engine.kv_cache_usage,
            progress=engine.progress,
            num_steps=num_steps - num_reported,
            steps_s=steps_s - reported_s,
            loads=self._loads.take(),
            mover=self._mover(),
            free_bytes=free_bytes(self._device),
        )
