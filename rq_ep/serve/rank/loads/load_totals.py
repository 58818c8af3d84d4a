"""Counting the load of every layer and rank while serving, at the price of a few additions."""

import threading
from collections.abc import Callable, Sequence

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.cost import LAYER_PHASES
from rq_ep.core.plan import DispatchPlan, imbalance
from rq_ep.core.replicas import Replicas
from rq_ep.moe.telemetry import CallRecorder, LayerCall, PhaseTimer
from rq_ep.parallel import EPGroup
from rq_ep.serve.messages import LoadSums


class LayerLoad:
    """Sums over the steps of a layer."""

    def __init__(self, num_ranks: int, num_experts: int) -> None:
        self.pairs_R = np.zeros(num_ranks, np.int64)
        self.counts_E = np.zeros(num_experts, np.int64)
        self.pairs_by_format: dict[str, int] = {}
        self.imbalances: list[float] = []

    def add(self, counts_RE: IntArray, plan: DispatchPlan, members: Sequence[int], formats: "FormatCodes") -> None:
        self.pairs_R += plan.loads_R
        self.counts_E += counts_RE.sum(axis=0)
        loads_M = plan.loads_R if len(members) == len(plan.loads_R) else plan.loads_R[list(members)]
        self.imbalances.append(imbalance(loads_M))
        names, codes_P = formats.of(plan.replicas)
        pairs = np.bincount(codes_P, weights=plan.pairs_RP.sum(axis=0), minlength=len(names))
        for name, number in zip(names, pairs.tolist(), strict=True):
            self.pairs_by_format[name] = self.pairs_by_format.get(name, 0) + int(number)


class FormatCodes:
    """Cache of a layer's weight formats as numbers: its replicas are mostly those of its last step."""

    def __init__(self) -> None:
        self._replicas: Replicas | None = None
        self._codes: tuple[list[str], IntArray] = ([], np.zeros(0, np.int64))

    def of(self, replicas: Replicas) -> tuple[list[str], IntArray]:
        """Names of the formats, and for each replica the number of its own."""
        if replicas is not self._replicas:
            names, codes_P = np.unique(replicas.formats_P, return_inverse=True)
            self._replicas, self._codes = replicas, (names.tolist(), codes_P)
        return self._codes


class LoadTotals:
    """Records layer calls as sums instead of steps. Every rank plans the same, so rank 0's sums hold for all.

    Steps in which no rank has a token are not counted.

    Args:
        members: the ranks that take part now; imbalance is among them.
        awaits_ends: a step counts from the next `between_steps` on, so that one that is cut off can be discarded; else
            each call counts at once.
        also: records every call as well.
    """

    def __init__(
        self, members: Callable[[], Sequence[int]], awaits_ends: bool = False, also: CallRecorder | None = None
    ) -> None:
        self._members = members
        self._awaits_ends = awaits_ends
        self._also = also
        self._under_way: list[tuple[LayerCall, Sequence[int]]] = []  # calls of the step under way, and its members
        self._lock = threading.Lock()
        self._formats: dict[int, FormatCodes] = {}
        self._reset()

    def _reset(self) -> None:
        self._layers: dict[int, LayerLoad] = {}
        self._seconds = dict.fromkeys(LAYER_PHASES, 0.0)
        self._borrowed_experts = 0
        self._borrowed_bytes = 0

    def timer(self, group: EPGroup) -> PhaseTimer:
        """Start to time one layer call, on the host's clock: events on a GPU would be waited for."""
        return PhaseTimer(group.clock, None)

    def record(self, call: LayerCall) -> None:
        if call.plan.loads_R.any():
            self._under_way.append((call, self._members()))
        if self._also is not None:
            self._also.record(call)
        if not self._awaits_ends:
            self.between_steps()

    def between_steps(self) -> None:
        """Count the step that has ended."""
        with self._lock:
            for call, members in self._under_way:
                self._count(call, members)
        self._under_way.clear()

    def discard(self) -> None:
        """Forget the step under way, which was cut off and is made again."""
        self._under_way.clear()

    def _count(self, call: LayerCall, members: Sequence[int]) -> None:
        plan = call.plan
        if call.layer not in self._layers:
            self._layers[call.layer] = LayerLoad(*call.counts_RE.shape)
        formats = self._formats.setdefault(call.layer, FormatCodes())
        self._layers[call.layer].add(call.counts_RE, plan, members, formats)
        for phase in LAYER_PHASES:
            self._seconds[phase] += call.timer.seconds(phase)
        if plan.transfers:
            self._borrowed_experts += len(plan.transfers)
            self._borrowed_bytes += int(call.transfer_bytes_R().sum())

    def take(self) -> LoadSums | None:
        """The sums since the last call, and each layer's mean imbalance; None if there was no step.

        Where steps count at once, a call in the middle of one counts it in some of the layers only: they may differ in
        calls, and be missing.
        `seconds` are rank 0's, on its host's clock, over all layers and steps.
        """
        with self._lock:
            layers, seconds = self._layers, self._seconds
            borrowed_experts, borrowed_bytes = self._borrowed_experts, self._borrowed_bytes
            self._reset()
        if not layers:
            return None
        order = sorted(layers)
        return {
            "layers": order,
            "num_calls_L": [len(layers[layer].imbalances) for layer in order],
            "pairs_LR": [layers[layer].pairs_R.tolist() for layer in order],
            "counts_LE": [layers[layer].counts_E.tolist() for layer in order],
            "formats_L": [layers[layer].pairs_by_format for layer in order],
            "imbalance_L": [float(np.mean(layers[layer].imbalances)) for layer in order],
            "seconds": seconds,
            "borrowed_experts": borrowed_experts,
            "borrowed_bytes": borrowed_bytes,
        }
