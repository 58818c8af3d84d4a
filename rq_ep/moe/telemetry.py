"""Telemetry of each layer and step: loads, times, bytes moved."""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import check_choice
from rq_ep.core.plan import DispatchPlan
from rq_ep.parallel import EPGroup

Array = TypeVar("Array", IntArray, FloatArray)


class PhaseTimer:
    """Times the phases of one layer call, on the host's clock or, on a GPU, on the stream's."""

    def __init__(self, clock: Callable[[], float], gpu: torch.device | None) -> None:
        self.clock = clock
        self.gpu = gpu
        self._marks: list[tuple[str, float, torch.cuda.Event | None]] = []
        self.mark("")

    def mark(self, phase: str) -> None:
        """End a phase: the time since the last mark belongs to `phase`."""
        event = None
        if self.gpu is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.gpu))  # another device may be this thread's current one
        self._marks.append((phase, self.clock(), event))

    def seconds(self, phase: str) -> float:
        """Length of a phase. Planning happens on the host; the rest is timed where it runs."""
        total_s = 0.0
        for (_, start_s, start), (name, end_s, end) in pairwise(self._marks):
            if name != phase:
                continue
            if start is None or end is None or phase == "plan":
                total_s += end_s - start_s
            else:
                end.synchronize()
                total_s += float(start.elapsed_time(end)) / 1e3
        return total_s


class LayerCall(NamedTuple):
    """What one call of a layer leaves behind on one rank."""

    layer: int
    rank: int
    counts_RE: IntArray
    plan: DispatchPlan
    timer: PhaseTimer
    received_bytes: Mapping[str, int]  # of rows (dispatch) and sums (combine) from other ranks
    transfer_bytes_R: Callable[[], IntArray]  # of borrowed experts, received by each rank


class CallRecorder(Protocol):
    """Times and records the calls of a layer."""

    def timer(self, group: EPGroup) -> PhaseTimer:
        """Start to time one layer call."""

    def record(self, call: LayerCall) -> None:
        """Take a call that has ended."""


class Telemetry:
    """Keeps the last layer calls of this process; recording costs a few clock readings and no copies.

    Arrays are [S, L, R]: steps counted from 0 per layer, layers in the order of `layers`, ranks. Times that this
    process did not see are NaN.
    """

    def __init__(self, max_records: int | None = None, clock: Callable[[], float] | None = None) -> None:
        """
        Args:
            max_records: layer calls to remember, the oldest are dropped; default: all.
            clock: seconds, for instance `time.thread_time`; default: the group's clock, and events on a GPU.
        """
        self._clock = clock
        self._calls: deque[tuple[int, LayerCall]] = deque(maxlen=max_records)  # each with the number of its step
        self._num_calls: Counter[tuple[int, int]] = Counter()

    def timer(self, group: EPGroup) -> PhaseTimer:
        """Start to time one layer call."""
        uses_events = group.device.type == "cuda" and self._clock is None and self._calls.maxlen != 0
        return PhaseTimer(self._clock or group.clock, group.device if uses_events else None)

    def record(self, call: LayerCall) -> None:
        """Keep a call. Nothing is derived from it before it is asked for."""
        step = self._num_calls[call.layer, call.rank]
        self._num_calls[call.layer, call.rank] += 1
        self._calls.append((step, call))

    def clear(self) -> None:
        self._calls.clear()
        self._num_calls.clear()

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices, in the model, of the layers seen."""
        return tuple(sorted({call.layer for _, call in self._calls}))

    def loads(self) -> IntArray:
        """[S, L, R] routed pairs computed by each rank."""
        return self._of_all_ranks(lambda call: call.plan.loads_R)

    def counts(self) -> IntArray:
        """[S, L, E] routed pairs of each expert."""
        return self._of_all_ranks(lambda call: call.counts_RE.sum(axis=0))

    def transfer_bytes(self) -> IntArray:
        """[S, L, R] bytes of borrowed experts received by each rank."""
        return self._of_all_ranks(lambda call: call.transfer_bytes_R())

    def seconds(self, phase: str = "compute") -> FloatArray:
        """[S, L, R] length of a phase, one of LAYER_PHASES, on the ranks of this process."""
        steps, layers = self._axes()
        num_ranks = len(self._calls[0][1].counts_RE) if self._calls else 0
        seconds = np.full((len(steps), len(layers), num_ranks), np.nan)
        for step, call in self._calls:
            seconds[steps[step], layers[call.layer], call.rank] = call.timer.seconds(phase)
        return seconds

    def received_bytes(self, phase: str) -> IntArray:
        """[S, L, R] bytes of rows and metadata (dispatch) or sums (combine) received by the ranks of this process."""
        check_choice("phase", phase, ("dispatch", "combine"))
        steps, layers = self._axes()
        num_ranks = len(self._calls[0][1].counts_RE) if self._calls else 0
        result = np.zeros((len(steps), len(layers), num_ranks), np.int64)
        for step, call in self._calls:
            result[steps[step], layers[call.layer], call.rank] = call.received_bytes[phase]
        return result

    def predicted_seconds(self, cost: LayerCost) -> FloatArray:
        """[S, L, R] length of the compute phase that a cost model expects of the same plans."""
        return self._of_all_ranks(lambda call: cost.compute_s_R(call.plan))

    def _axes(self) -> tuple[dict[int, int], dict[int, int]]:
        steps = sorted({step for step, _ in self._calls})
        return {step: i for i, step in enumerate(steps)}, {layer: i for i, layer in enumerate(self.layers)}

    def _of_all_ranks(self, value: Callable[[LayerCall], Array]) -> Array:
        """Every rank plans the same, so that any rank's call of a step and layer will do."""
        steps, layers = self._axes()
        if not self._calls:
            return np.zeros((0, 0, 0), np.int64)
        first = value(self._calls[0][1])
        result = np.zeros((len(steps), len(layers), len(first)), first.dtype)
        for step, call in self._calls:
            result[steps[step], layers[call.layer]] = value(call)
        return result
