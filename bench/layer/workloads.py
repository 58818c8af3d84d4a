"""What the router chose: every token follows from the name of a workload, a seed and a step, or from a record."""

from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

import numpy as np

from bench.layer.published import PUBLISHED, Shape
from bench.layer.recorded import Recorded, read_recorded, refused
from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.errors import UserError

PAPER_SCENARIOS: tuple[str, ...] = tuple(PUBLISHED["scenarios"])
STAGES = ("calibrate", "measure")  # what is measured was never seen by calibration
MODIFIERS = ("spread", "moving", "ragged")
GRAMMAR = (
    "P:H, distinct:P:H, balanced, zipf:A, idle:N; +spread, +moving, +ragged; trace:FILE[:LAYER], +prefill, +decode"
)


class Router(Protocol):
    """Draws the experts of a number of tokens, all ranks alike."""

    def ids(self, random: np.random.Generator, num_tokens: int, top_k: int) -> IntArray:
        """[T, K] experts of each token."""
        ...


@dataclass(frozen=True)
class HotPairs:
    """A share of the pairs falls evenly on the first experts, the rest on the others; a token may repeat an expert.

    The kind of the LLEP paper (arXiv 2601.17111). No real router repeats an expert within a token.
    """

    share: float
    num_hot: int
    num_experts: int

    def ids(self, random: np.random.Generator, num_tokens: int, top_k: int) -> IntArray:
        is_hot_N = np.arange(num_tokens * top_k) < round(self.share * num_tokens * top_k)
        random.shuffle(is_hot_N)
        hot_N = random.integers(0, self.num_hot, is_hot_N.size)
        cold_N = random.integers(self.num_hot, self.num_experts, is_hot_N.size)
        return np.where(is_hot_N, hot_N, cold_N).reshape(num_tokens, top_k)


@dataclass(frozen=True)
class HotDistinct:
    """The same with distinct experts in a token, as a top-k router chooses them."""

    share: float
    num_hot: int
    num_experts: int

    def ids(self, random: np.random.Generator, num_tokens: int, top_k: int) -> IntArray:
        num_hot_T = np.floor(self.share * top_k + random.random(num_tokens)).astype(np.int64)
        keys_TE = random.random((num_tokens, self.num_experts))
        hot_TH = _smallest(keys_TE[:, : self.num_hot], num_hot_T)
        cold_TC = _smallest(keys_TE[:, self.num_hot :], top_k - num_hot_T)
        return np.nonzero(np.hstack([hot_TH, cold_TC]))[1].reshape(num_tokens, top_k)


@dataclass(frozen=True)
class Popularity:
    """Distinct experts, drawn one after another in proportion to their weights; weight 0 is never drawn."""

    weights: tuple[float, ...]

    def ids(self, random: np.random.Generator, num_tokens: int, top_k: int) -> IntArray:
        with np.errstate(divide="ignore"):
            keys_TE = random.standard_exponential((num_tokens, len(self.weights))) / np.array(self.weights)
        return np.nonzero(_smallest(keys_TE, np.full(num_tokens, top_k)))[1].reshape(num_tokens, top_k)


@dataclass(frozen=True)
class Workload:
    """Steps of routed tokens on all ranks, drawn from a router."""

    name: str
    router: Router
    num_experts: int
    top_k: int
    tokens_per_rank: int
    modifiers: frozenset[str] = frozenset()
    layer: int | None = None  # of a model: recorded workloads have one

    @property
    def repeats_experts(self) -> bool:
        """A token may name an expert twice."""
        return isinstance(self.router, HotPairs)

    def ids(self, seed: int, stage: str, step: int, rank: int, num_ranks: int) -> IntArray:
        """[T, K] experts of one rank's tokens; `stage` keeps calibration and measurement apart."""
        key = [crc32(self.name.encode()), seed, STAGES.index(stage), step]
        tokens = self._tokens(np.random.default_rng(key), rank, num_ranks)
        ids_TK = self.router.ids(np.random.default_rng([*key, rank]), tokens, self.top_k)
        if "spread" in self.modifiers:
            ids_TK = self._spread()[ids_TK]
        if "moving" in self.modifiers:
            ids_TK = (ids_TK + np.random.default_rng([*key, num_ranks]).integers(self.num_experts)) % self.num_experts
        return ids_TK

    def _tokens(self, random: np.random.Generator, rank: int, num_ranks: int) -> int:
        """As many as everywhere; ragged: the same sum divided 0 : 1 : 2 : ..., in an order that changes by step."""
        if "ragged" not in self.modifiers or num_ranks == 1:
            return self.tokens_per_rank
        ends = np.cumsum(random.permutation(num_ranks)) * 2 * self.tokens_per_rank // (num_ranks - 1)
        return int(np.diff(ends, prepend=0)[rank])

    def _spread(self) -> IntArray:
        """[E] new numbers of the experts: the hot ones at equal distances, the others in between."""
        assert isinstance(self.router, HotPairs | HotDistinct)
        hot = np.arange(self.router.num_hot) * self.num_experts // self.router.num_hot
        return np.concatenate([hot, np.setdiff1d(np.arange(self.num_experts), hot)])


def parse(text: str, shape: Shape, tokens_per_rank: int) -> Workload | Recorded:
    """Read a scenario, such as `80:4`, `distinct:50:8+spread` or `trace:stats.safetensors:3`.

    Raises:
        UserError: it makes no sense for this shape.
    """
    if text.startswith("trace:"):
        return read_recorded(text, shape)
    base, *modifiers = text.split("+")
    if unknown := [name for name in modifiers if name not in MODIFIERS]:
        raise refused(text, f"+{unknown[0]} is none of {', '.join(MODIFIERS)}")
    router = _parse_router(text, base, shape)
    if "spread" in modifiers and not isinstance(router, HotPairs | HotDistinct):
        raise refused(text, "+spread is for P:H and distinct:P:H, which have hot experts")
    return Workload(text, router, shape.num_experts, shape.top_k, tokens_per_rank, frozenset(modifiers))


def _parse_router(text: str, base: str, shape: Shape) -> Router:
    kind, _, value = base.partition(":")
    num_experts, top_k = shape.num_experts, shape.top_k
    try:
        if base == "balanced":
            return Popularity((1.0,) * num_experts)
        if kind == "zipf":
            if not 0 <= (exponent := float(value)) <= 10:
                raise refused(text, "the exponent must lie in 0..10")
            return Popularity(tuple((1.0 + np.arange(num_experts)) ** -exponent))
        if kind == "idle":
            if not 0 < (num_idle := int(value)) <= num_experts - top_k:
                raise refused(text, f"of {num_experts} experts, 1..{num_experts - top_k} may be idle")
            return Popularity((1.0,) * (num_experts - num_idle) + (0.0,) * num_idle)
        percent, num_hot = map(int, (value if kind == "distinct" else base).split(":"))
    except UserError:
        raise
    except ValueError:
        raise refused(text, f"write {GRAMMAR}") from None
    if not 0 < percent <= 100 or not 0 < num_hot < num_experts:
        raise refused(text, f"percent in 1..100, experts in 1..{num_experts - 1}")
    share = percent / 100
    if kind != "distinct":
        return HotPairs(share, num_hot, num_experts)
    if share * top_k > num_hot or top_k - share * top_k > num_experts - num_hot:
        raise refused(
            text,
            f"with {top_k} distinct experts a token, {num_hot} of {num_experts} experts hold between "
            f"{max(0, top_k - num_experts + num_hot) / top_k:.0%} and {min(1, num_hot / top_k):.0%} of the pairs",
        )
    return HotDistinct(share, num_hot, num_experts)


def _smallest(keys_TE: FloatArray, number_T: IntArray) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """[T, E] which `number_T[t]` keys of each row are its smallest."""
    at_T1 = np.maximum(number_T - 1, 0)[:, None]
    limit_T1 = np.take_along_axis(np.sort(keys_TE, axis=1), at_T1, axis=1)
    return (keys_TE <= limit_T1) & (number_T[:, None] > 0)
