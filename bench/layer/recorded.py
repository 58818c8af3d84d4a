"""What a router chose once, from the files of `rq-ep calibrate`: counts per step, or every token's experts and weights.

The first half of the steps calibrates, the second is measured.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeVar
from zlib import crc32

import numpy as np
import numpy.typing as npt

from bench.layer.published import Shape
from rq_ep.core.arrays import BoolArray, IntArray
from rq_ep.core.errors import UserError
from rq_ep.core.stats import PHASES, ExpertStats
from rq_ep.sim.traces import RoutingTrace, is_trace

S = TypeVar("S")


class CountStep(NamedTuple):
    """One recorded step of one layer."""

    number: int
    counts_E: IntArray


@dataclass(frozen=True)
class RecordedCounts:
    """Recorded counts divided among tokens and ranks.

    Which experts met in a token was not recorded: an expert's pairs go to consecutive tokens, so none meets it twice.
    """

    name: str
    steps: tuple[CountStep, ...]
    top_k: int
    layer: int  # its number in the model
    repeats_experts = False

    def ids(self, seed: int, stage: str, step: int, rank: int, num_ranks: int) -> IntArray:
        """[T, K] experts of one rank's tokens."""
        number, counts_E = _of_stage(self.steps, stage, step)
        ids_TK = np.repeat(np.arange(len(counts_E)), counts_E).reshape(self.top_k, -1).T
        order_T = np.random.default_rng([crc32(self.name.encode()), seed, number]).permutation(len(ids_TK))
        return ids_TK[np.array_split(order_T, num_ranks)[rank]]


@dataclass(frozen=True)
class RecordedRoutes:
    """One layer of a routing trace: every token as it was routed, on the rank that its sequence was given to."""

    name: str
    trace: RoutingTrace
    at: int  # place of the layer in the trace
    steps: tuple[slice, ...]  # tokens of each step
    repeats_experts = False

    @property
    def layer(self) -> int:
        """Its number in the model."""
        return self.trace.layers[self.at]

    def ids(self, seed: int, stage: str, step: int, rank: int, num_ranks: int) -> IntArray:
        """[T, K] experts of one rank's tokens."""
        mine_N = self._tokens(stage, step, rank, num_ranks)
        ids_TK: IntArray = self.trace.ids_NLK[mine_N, self.at].astype(np.int64)
        return ids_TK

    def weights(self, stage: str, step: int, rank: int, num_ranks: int) -> npt.NDArray[np.float32]:
        """[T, K] their routing weights."""
        weights_TK: npt.NDArray[np.float32] = self.trace.weights_NLK[
            self._tokens(stage, step, rank, num_ranks), self.at
        ]
        return weights_TK

    def _tokens(self, stage: str, step: int, rank: int, num_ranks: int) -> IntArray:
        tokens = _of_stage(self.steps, stage, step)
        mine_N: IntArray = tokens.start + np.flatnonzero(self.trace.ranks_N(num_ranks)[tokens] == rank)
        return mine_N


Recorded = RecordedCounts | RecordedRoutes


def _of_stage(steps: tuple[S, ...], stage: str, step: int) -> S:
    half = len(steps) // 2
    of_stage = steps[:half] if stage == "calibrate" else steps[half:]
    return of_stage[step % len(of_stage)]


def read_recorded(text: str, shape: Shape) -> Recorded:
    """Read `trace:FILE[:LAYER][+prefill or +decode]`; the file's format says which kind it is.

    Raises:
        UserError: the file is of another model than the shape, damaged, or holds too few steps.
    """
    rest, _, modifier = text.removeprefix("trace:").rpartition("+")
    phase = modifier if modifier in PHASES else None
    path, _, number = (rest if phase else text.removeprefix("trace:")).partition(":")
    source = RoutingTrace.load(path) if is_trace(path) else ExpertStats.load(path)
    top_k = source.ids_NLK.shape[2] if isinstance(source, RoutingTrace) else source.top_k or shape.top_k
    if (source.num_experts, top_k) != (shape.num_experts, shape.top_k):
        sizes = f"{source.num_experts} experts, {top_k} a token"
        raise refused(
            text, f"it has {sizes}, the shape {shape.num_experts} and {shape.top_k}; set --num-experts, --top-k"
        )
    try:
        at = source.layers.index(int(number)) if number else 0
    except ValueError:
        raise refused(text, f"{path} holds layers {', '.join(map(str, source.layers))}") from None
    if isinstance(source, RoutingTrace):
        ends = np.cumsum(source.tokens_S).tolist()
        in_phase_S = _in_phase(text, source.phase_S, phase, len(ends))
        routes = (slice(start, end) for start, end in zip([0, *ends], ends))
        steps = tuple(tokens for tokens, is_in in zip(routes, in_phase_S) if is_in and tokens.start < tokens.stop)
        return RecordedRoutes(text, source, at, _enough(text, steps))
    in_phase_S = _in_phase(text, source.phase, phase, source.num_steps)
    counts = enumerate(source.counts[:, at])
    recorded_steps = tuple(CountStep(i, counts_E) for i, counts_E in counts if in_phase_S[i] and counts_E.any())
    for i, counts_E in _enough(text, recorded_steps):
        num_tokens, remainder = divmod(int(counts_E.sum()), top_k)
        if remainder or counts_E.max() > num_tokens:
            raise refused(text, f"the counts of step {i} are not {top_k} distinct experts of each token")
    return RecordedCounts(text, recorded_steps, top_k, source.layers[at])


def _in_phase(text: str, phase_S: IntArray | None, phase: str | None, num_steps: int) -> BoolArray:
    if phase is None:
        return np.ones(num_steps, bool)
    if phase_S is None:
        raise refused(text, "phases were not recorded")
    in_phase_S: BoolArray = phase_S == PHASES.index(phase)
    return in_phase_S


def _enough(text: str, steps: tuple[S, ...]) -> tuple[S, ...]:
    if len(steps) < 2:
        raise refused(text, f"{len(steps)} steps with routed pairs: one must calibrate and another be measured")
    return steps


def refused(text: str, reason: str) -> UserError:
    """A scenario that cannot be run, and why."""
    return UserError(f"--scenarios {text}: {reason}")
