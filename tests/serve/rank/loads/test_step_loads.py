"""The loads of single steps on rank 0."""

import time
from collections import deque
from typing import Any

import numpy as np

from rq_ep.core.plan import DispatchPlan
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.moe.telemetry import LayerCall, PhaseTimer
from rq_ep.serve.rank.loads.load_totals import LoadTotals
from rq_ep.serve.rank.loads.step_loads import StepLoads

REPLICAS = Replicas.of([Replica(0, 0, "bf16"), Replica(1, 1, "bf16")])


def call(layer: int, counts_RE: Any) -> LayerCall:
    plan = DispatchPlan(REPLICAS, np.array(counts_RE))
    return LayerCall(layer, 0, np.array(counts_RE), plan, PhaseTimer(lambda: 0.0, None), {}, lambda: np.zeros(2))


def test_each_step_has_the_loads_of_all_layers_and_the_phase_of_the_agreement_that_began_it() -> None:
    totals = LoadTotals(lambda: (0, 1))
    loads = StepLoads(totals)
    loads.between_steps(is_prefill=True)
    loads.record(call(5, [[1, 2], [3, 4]]))
    loads.record(call(2, [[1, 0], [0, 1]]))
    loads.between_steps(is_prefill=False)
    loads.between_steps(is_prefill=False)  # a step in which nobody had tokens
    loads.record(call(5, [[1, 0], [0, 0]]))
    loads.record(call(2, [[0, 0], [0, 1]]))
    assert [(counts_LE.tolist(), phase) for counts_LE, phase in loads.take()] == [([[1, 1], [4, 6]], 0)]
    loads.between_steps(is_prefill=True)
    assert [(counts_LE.tolist(), phase) for counts_LE, phase in loads.take()] == [([[0, 1], [1, 0]], 1)]
    assert list(loads.take()) == []
    sums = totals.take()
    assert sums is not None
    assert sums["num_calls_L"] == [2, 2]


def test_the_engine_may_discard_steps_while_another_thread_takes_them() -> None:
    loads = StepLoads(LoadTotals(lambda: (0, 1)))

    class Discarded(deque[Any]):
        """Whoever looks whether there are steps comes just before the engine's thread discards them."""

        def __len__(self) -> int:
            size = super().__len__()
            loads.discard()
            return size

    loads._steps = Discarded([({5: np.zeros(2)}, 0)])
    assert len(list(loads.take())) <= 1


def test_a_step_that_is_handed_over_costs_microseconds() -> None:
    loads = StepLoads(LoadTotals(lambda: (0, 1)))
    counts = dict.fromkeys(range(58), np.zeros(256, np.int64))
    best_s = 1.0
    for _ in range(50):
        loads._counts = dict(counts)
        start_s = time.perf_counter()
        loads.between_steps(is_prefill=False)
        best_s = min(best_s, time.perf_counter() - start_s)
    assert best_s < 50e-6
