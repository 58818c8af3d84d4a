"""Loads that every strategy must survive: small, hand-made or drawn with a seed."""

from dataclasses import dataclass

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.problem import PlacementProblem, standard_ep_bytes
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology

EXPERT_BYTES = {"bf16": 1000, "int8": 504}


@dataclass(frozen=True)
class Case:
    """Calibration counts and one step to plan, as it comes from the ranks."""

    name: str
    counts_SLE: IntArray
    counts_RE: IntArray
    ranks_per_node: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.counts_RE)

    def problem(self, formats: tuple[str, ...] = ("bf16", "int8"), unlimited: bool = False, **limits: int):  # type: ignore[no-untyped-def]
        stats = ExpertStats(self.counts_SLE, ("bf16", "int8"), "bf16", EXPERT_BYTES, top_k=2)
        budget = None if unlimited else (standard_ep_bytes(stats, self.num_ranks),) * self.num_ranks
        topology = Topology(self.num_ranks, self.ranks_per_node)
        return PlacementProblem(stats, topology, budget, formats, **limits)


def zipf(num_experts: int, exponent: float = 1.0, seed: int = 0) -> np.ndarray:
    """[E] popularity, in random order."""
    weights = 1 / np.arange(1, num_experts + 1) ** exponent
    return np.random.default_rng(seed).permutation(weights / weights.sum())


def drawn(name: str, popularity_E: np.ndarray, num_ranks: int, pairs: int = 300, **notes: int) -> Case:
    """Counts drawn with a popularity: 12 steps of 2 layers, and a step from `num_ranks` sources."""
    generator = np.random.default_rng(1)
    counts_SLE = generator.multinomial(pairs * num_ranks, popularity_E, size=(12, 2)).astype(np.int64)
    return Case(name, counts_SLE, generator.multinomial(pairs, popularity_E, size=num_ranks).astype(np.int64), **notes)


def _with_empty_source(case: Case, name: str) -> Case:
    counts_RE = case.counts_RE.copy()
    counts_RE[1] = 0
    return Case(name, case.counts_SLE, counts_RE)


def _times(case: Case, name: str, factor: int) -> Case:
    return Case(name, case.counts_SLE * factor, case.counts_RE * factor)


def one_hot(num_experts: int) -> np.ndarray:
    return np.eye(num_experts)[0]


even = np.full(16, 1 / 16)
CASES = [
    Case("balanced", np.full((4, 2, 16), 30, np.int64), np.full((4, 16), 10, np.int64)),
    drawn("zipf", zipf(16), 4),
    drawn("zipf on two nodes", zipf(16, 1.2), 4, ranks_per_node=2),
    drawn("one hot expert", one_hot(16), 4),
    _with_empty_source(drawn("", zipf(16), 4), "a source without pairs"),
    drawn("experts do not divide by ranks", zipf(10), 3),
    drawn("more ranks than experts", zipf(3), 5),
    drawn("one rank", zipf(6), 1),
    drawn("one expert", np.ones(1), 3),
    Case("no pairs at all", np.zeros((3, 2, 8), np.int64), np.zeros((4, 8), np.int64)),
    Case("no step recorded", np.zeros((0, 2, 8), np.int64), np.full((4, 8), 3, np.int64)),
    Case("every token to every expert", np.full((4, 2, 8), 64, np.int64), np.full((4, 8), 16, np.int64)),
    _times(drawn("", zipf(16), 4), "counts near 1e9", 10**7),
]
