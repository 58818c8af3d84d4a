"""Loads of a model whose experts' popularity changes with the domain, and a problem to place for."""

import numpy as np

from rq_ep.core.arrays import IntArray
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology

SIZES = {"bf16": 1000, "int8": 504, "int4": 270}
NUM_LAYERS, NUM_EXPERTS, NUM_RANKS = 2, 16, 4


def popularity_LE(seed: int) -> np.ndarray:
    """[L, E] chance of each expert in a domain."""
    chance_LE = np.exp(1.2 * np.random.default_rng(seed).standard_normal((NUM_LAYERS, NUM_EXPERTS)))
    return chance_LE / chance_LE.sum(axis=1, keepdims=True)


def steps_SLE(domain: int, num_steps: int, seed: int, pairs: int = 1024) -> IntArray:
    """[S, L, E] steps of a domain, which stray a little from its popularity; neighbours resemble each other."""
    generator = np.random.default_rng((domain, seed))
    counts_SLE = np.empty((num_steps, NUM_LAYERS, NUM_EXPERTS), np.int64)
    stray_LE = np.zeros((NUM_LAYERS, NUM_EXPERTS))
    for counts_LE in counts_SLE:
        stray_LE = 0.8 * stray_LE + 0.1 * generator.standard_normal(stray_LE.shape)
        chance_LE = popularity_LE(domain) * np.exp(stray_LE)
        counts_LE[:] = generator.multinomial(pairs, chance_LE / chance_LE.sum(axis=1, keepdims=True))
    return counts_SLE


def single_requests_SLE(num_steps: int, seed: int) -> IntArray:
    """[S, L, E] steps of one request after another, each of a popularity of its own: a prompt, then tokens."""
    generator = np.random.default_rng(seed)
    counts_SLE = np.zeros((num_steps, NUM_LAYERS, NUM_EXPERTS), np.int64)
    begin = 0
    while begin < num_steps:
        chance_LE = popularity_LE(0) * np.exp(generator.standard_normal((NUM_LAYERS, NUM_EXPERTS)))
        end = begin + int(generator.integers(32, 256))
        for layer, chance_E in enumerate(chance_LE / chance_LE.sum(axis=1, keepdims=True)):
            pairs_S = np.full(len(counts_SLE[begin:end]), 2)
            pairs_S[0] = 2 * 128
            counts_SLE[begin:end, layer] = generator.multinomial(pairs_S, chance_E)
        begin = end
    return counts_SLE


def problem_of(
    counts_SLE: IntArray, formats: tuple[str, ...] = ("bf16", "int8"), cap: float = 0.25
) -> PlacementProblem:
    """Standard EP's bytes, for these loads."""
    sizes = {name: SIZES[name] for name in formats}
    stats = ExpertStats(counts_SLE, formats, "bf16", sizes, top_k=2)
    budget = NUM_EXPERTS // NUM_RANKS * NUM_LAYERS * SIZES["bf16"]
    return PlacementProblem(stats, Topology(NUM_RANKS), (budget,) * NUM_RANKS, formats, max_low_precision_share=cap)
