"""What happened in each layer and step: loads, times, bytes moved."""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.cost import LayerCost
from rq_ep.core.errors import check_choice
from rq_ep.core.plan import DispatchPlan
from rq_ep.parallel import EPGroup

Array = TypeVar("Array", IntArray, FloatArray)

PHASES = ("gather", "plan", "dispatch", "compute", "combine")


class Laps:
    """The phases of one layer call: a stopwatch, on the host's clock or, on a GPU, on the stream's; bytes received."""

    def __init__(self, clock: Callable[[], float], gpu: torch.device | None) -> None:
        self.clock = clock
        self.gpu = gpu
        self.received_bytes: Mapping[str, int] = {}
        self._marks: list[tuple[str, float, torch.cuda.Event | None]] = []
        self.mark("")

    def mark(self, phase: str) -> None:
        """What happened since the last mark was part of `phase`."""
        event = None
        if self.gpu is not None:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
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


class Record(NamedTuple):
    """One layer call on one rank."""

    step: int
    layer: int
    rank: int
    counts_RE: IntArray
    plan: DispatchPlan
    laps: Laps
    transfer_bytes_R: Callable[[], IntArray]  # received by each rank


class Telemetry:
    """Keeps the last layer calls of this process; recording costs a few clock readings and no copies.

    Arrays are [S, L, R]: steps counted from 0 per layer, layers in the order of `layers`, ranks; what this process
    did not see is NaN in times.
    """

    def __init__(self, max_records: int | None = None, clock: Callable[[], float] | None = None) -> None:
        """
        Args:
            max_records: layer calls to remember, the oldest are dropped; default: all.
            clock: seconds, for instance `time.thread_time`; default: the group's clock, and events on a GPU.
        """
        self._clock = clock
        self._records: deque[Record] = deque(maxlen=max_records)
        self._num_calls: Counter[tuple[int, int]] = Counter()

    def laps(self, group: EPGroup) -> Laps:
        """A stopwatch for one layer call."""
        uses_events = group.device.type == "cuda" and self._clock is None and self._records.maxlen != 0
        return Laps(self._clock or group.clock, group.device if uses_events else None)

    def record(
        self,
        layer: int,
        rank: int,
        counts_RE: IntArray,
        plan: DispatchPlan,
        laps: Laps,
        transfer_bytes_R: Callable[[], IntArray],
    ) -> None:
        """Keep what a call left behind. Nothing is derived from it before somebody asks."""
        step = self._num_calls[layer, rank]
        self._num_calls[layer, rank] += 1
        self._records.append(Record(step, layer, rank, counts_RE, plan, laps, transfer_bytes_R))

    def clear(self) -> None:
        self._records.clear()
        self._num_calls.clear()

    def __len__(self) -> int:
        return len(self._records)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices, in the model, of the layers seen."""
        return tuple(sorted({record.layer for record in self._records}))

    def loads(self) -> IntArray:
        """[S, L, R] routed pairs computed by each rank."""
        return self._of_all_ranks(lambda record: record.plan.loads_R)

    def counts(self) -> IntArray:
        """[S, L, E] routed pairs of each expert."""
        return self._of_all_ranks(lambda record: record.counts_RE.sum(axis=0))

    def transfer_bytes(self) -> IntArray:
        """[S, L, R] bytes of borrowed experts received by each rank."""
        return self._of_all_ranks(lambda record: record.transfer_bytes_R())

    def seconds(self, phase: str = "compute") -> FloatArray:
        """[S, L, R] length of a phase, one of PHASES, on the ranks of this process."""
        steps, layers = self._axes()
        num_ranks = len(self._records[0].counts_RE) if self._records else 0
        seconds = np.full((len(steps), len(layers), num_ranks), np.nan)
        for record in self._records:
            seconds[steps[record.step], layers[record.layer], record.rank] = record.laps.seconds(phase)
        return seconds

    def received_bytes(self, phase: str) -> IntArray:
        """[S, L, R] bytes of rows and notes (dispatch) or sums (combine) that the ranks of this process got."""
        check_choice("phase", phase, ("dispatch", "combine"))
        steps, layers = self._axes()
        num_ranks = len(self._records[0].counts_RE) if self._records else 0
        result = np.zeros((len(steps), len(layers), num_ranks), np.int64)
        for record in self._records:
            at = steps[record.step], layers[record.layer], record.rank
            result[at] = record.laps.received_bytes[phase]
        return result

    def predicted_seconds(self, cost: LayerCost) -> FloatArray:
        """[S, L, R] length of the compute phase that a cost model expects of the same plans."""
        return self._of_all_ranks(lambda record: cost.compute_s_R(record.plan))

    def _axes(self) -> tuple[dict[int, int], dict[int, int]]:
        steps = sorted({record.step for record in self._records})
        return {step: i for i, step in enumerate(steps)}, {layer: i for i, layer in enumerate(self.layers)}

    def _of_all_ranks(self, value: Callable[[Record], Array]) -> Array:
        """Every rank plans the same: any one rank's record of a step and layer will do."""
        steps, layers = self._axes()
        if not self._records:
            return np.zeros((0, 0, 0), np.int64)
        first = value(self._records[0])
        result = np.zeros((len(steps), len(layers), len(first)), first.dtype)
        for record in self._records:
            result[steps[record.step], layers[record.layer]] = value(record)
        return result
