"""Small random layers for the solver's tests, and the linear program whose solution is optimal."""

import numpy as np
from scipy.optimize import linprog

from rq_ep.core.arrays import IntArray
from rq_ep.core.problem import PlacementProblem, standard_ep_bytes
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.solver.search.neighborhood import LayerLimits
from rq_ep.strategies.rq import ReplicateQuantize

RQ = ReplicateQuantize()  # what the solver places for


def random_replicas(num_experts: int, num_ranks: int, num_extra: int, seed: int) -> Replicas:
    """A replica of each expert on a random rank, and `num_extra` more."""
    generator = np.random.default_rng(seed)
    held_ER = np.arange(num_ranks) == generator.integers(num_ranks, size=num_experts)[:, None]
    free = np.flatnonzero(~held_ER)
    held_ER.flat[generator.permutation(free)[:num_extra]] = True
    return Replicas.of(Replica(rank, expert, "bf16") for expert, rank in np.argwhere(held_ER).tolist())


def skewed(num_experts: int, num_pairs: int, seed: int, num_steps: int = 1) -> IntArray:
    """[S, E] counts with a log-normal popularity that wanders from step to step."""
    generator = np.random.default_rng(seed)
    log_popularity_SE = 1.2 * generator.standard_normal(num_experts) + 0.4 * generator.standard_normal(
        (num_steps, num_experts)
    )
    popularity_SE = np.exp(log_popularity_SE)
    popularity_SE /= popularity_SE.sum(axis=1, keepdims=True)
    return np.stack([generator.multinomial(num_pairs, popularity_E) for popularity_E in popularity_SE])


def best_maximum(replicas: Replicas, totals_E: IntArray, num_ranks: int) -> float:
    """Pairs of the fullest rank under the best fractional split, by HiGHS."""
    num_replicas = len(replicas)
    above_RP = np.zeros((num_ranks, num_replicas + 1))
    above_RP[replicas.ranks_P, np.arange(num_replicas)] = 1
    above_RP[:, -1] = -1
    sums_EP = np.zeros((len(totals_E), num_replicas + 1))
    sums_EP[replicas.experts_P, np.arange(num_replicas)] = 1
    objective = np.append(np.zeros(num_replicas), 1.0)
    return float(linprog(objective, above_RP, np.zeros(num_ranks), sums_EP, totals_E, method="highs").fun)


def problem(
    counts_SLE: IntArray,
    num_ranks: int,
    budget: tuple[int, ...] | str | None = "ep",
    formats: tuple[str, ...] = ("bf16", "int8"),
    notes: dict[str, np.ndarray] | None = None,
    **limits: float,
) -> PlacementProblem:
    """A problem in units of 1000 bytes for an expert, 504 in int8."""
    stats = ExpertStats(
        counts_SLE.astype(np.int64), ("bf16", "int8"), "bf16", {"bf16": 1000, "int8": 504}, top_k=2, **(notes or {})
    )
    if budget == "ep":
        budget = (standard_ep_bytes(stats, num_ranks),) * num_ranks
    return PlacementProblem(stats, Topology(num_ranks), budget, formats, **limits)  # type: ignore[arg-type]


def random_held(num_experts: int, num_ranks: int, num_extra: int, seed: int) -> np.ndarray:
    """[E, R] the same as a table of who holds what."""
    replicas = random_replicas(num_experts, num_ranks, num_extra, seed)
    held_ER = np.zeros((num_experts, num_ranks), bool)
    held_ER[replicas.experts_P, replicas.ranks_P] = True
    return held_ER


def no_limits(num_experts: int, num_ranks: int) -> LayerLimits:
    """Experts of one byte and as many bytes as one could want, no rules, nothing to move from."""
    anywhere_ER = np.ones((num_experts, num_ranks), bool)
    return LayerLimits(
        np.ones(num_experts, np.int64), np.full(num_ranks, 2**40), anywhere_ER, ~anywhere_ER,
        np.zeros(num_ranks, np.int64), 1, anywhere_ER, 0.0, np.array([2**40]),
    )  # fmt: skip
