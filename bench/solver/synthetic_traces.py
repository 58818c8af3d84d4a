"""Synthetic routing of a model whose load moves: domains that mix anew, drift, noise, distinct experts in a token.

A layer has a popularity that its domains share and one of each domain's own. A step's tokens come from the domains by
weights that are drawn afresh every `FRESH_EVERY` steps and drift from one draw to the next in between; every expert's
popularity wanders slowly besides. Calibration sees every `FRESH_EVERY`th step of a record, what is held out is another
stretch of consecutive steps.
"""

from dataclasses import dataclass

import numpy as np

from rq_ep.core.arrays import FloatArray, IntArray

LAWS = ("ln1.2", "ln0.7", "zipf1.0")
NUM_DOMAINS = 6
MIXING = 0.3  # of the Dirichlet weights: most steps are of one or two domains
FRESH_EVERY = 8
NOISE_SD, NOISE_MEMORY = 0.1, 0.9  # of log popularity, from step to step
NUM_DRAWN_TOKEN_BY_TOKEN = 512  # larger steps are drawn expert by expert from the chance of being chosen


@dataclass(frozen=True)
class Trace:
    """Calibration and held-out counts of one model: the same domains, other mixtures and other noise."""

    calibration_SLE: IntArray
    held_out_SLE: IntArray


def draw_trace(
    law: str, num_experts: int, top_k: int, num_tokens: int, num_layers: int, num_steps: tuple[int, int], seed: int
) -> Trace:
    """Draw both parts of a trace.

    Args:
        law: of the experts' popularity: log-normal of a standard deviation, or a power of the rank.
        num_tokens: tokens of a step, over all ranks.
        num_steps: calibration steps and held-out ones.
    """
    parts = tuple(np.empty((steps, num_layers, num_experts), np.int64) for steps in num_steps)
    for layer in range(num_layers):
        generator = np.random.default_rng([seed, layer])
        log_popularity_DE = _domains(law, num_experts, generator)
        for part_SLE, every in zip(parts, (FRESH_EVERY, 1), strict=True):
            steps = np.arange(len(part_SLE)) * every
            part_SLE[:, layer] = _draw_steps(log_popularity_DE, top_k, num_tokens, steps, generator)
    return Trace(*parts)


def draw_domain_change(
    law: str, num_experts: int, top_k: int, num_tokens: int, num_layers: int, num_steps: tuple[int, int], seed: int
) -> Trace:
    """Draw a trace whose two parts are of different domains: half of the model's, then the other half."""
    parts = tuple(np.empty((steps, num_layers, num_experts), np.int64) for steps in num_steps)
    for layer in range(num_layers):
        generator = np.random.default_rng([seed, layer])
        halves = np.split(_domains(law, num_experts, generator), 2)
        for part_SLE, log_popularity_DE, every in zip(parts, halves, (FRESH_EVERY, 1), strict=True):
            steps = np.arange(len(part_SLE)) * every
            part_SLE[:, layer] = _draw_steps(log_popularity_DE, top_k, num_tokens, steps, generator)
    return Trace(*parts)


def _domains(law: str, num_experts: int, generator: np.random.Generator) -> FloatArray:
    """[D, E] log popularity; half of its variance is common to all domains."""
    shared_E = generator.standard_normal(num_experts)
    normal_DE = np.sqrt(0.5) * (shared_E + generator.standard_normal((NUM_DOMAINS, num_experts)))
    if law.startswith("zipf"):
        ranks_DE = (-normal_DE).argsort(axis=1).argsort(axis=1)
        normal_DE = -np.log(1.0 + ranks_DE)
    popularity_DE: FloatArray = float(law.removeprefix("zipf").removeprefix("ln")) * normal_DE
    return popularity_DE


def _draw_steps(
    log_popularity_DE: FloatArray, top_k: int, num_tokens: int, steps: IntArray, generator: np.random.Generator
) -> IntArray:
    """[S, E] pairs of each expert in these steps, which lie at equal distances."""
    num_domains, num_experts = log_popularity_DE.shape
    counts_SE = np.empty((len(steps), num_experts), np.int64)
    noise_E = NOISE_SD * generator.standard_normal(num_experts)
    memory = NOISE_MEMORY ** float(steps[1] - steps[0] if len(steps) > 1 else 1)
    draws_WD = generator.dirichlet([MIXING] * num_domains, int(steps[-1]) // FRESH_EVERY + 2)
    for step, counts_E in zip(steps.tolist(), counts_SE, strict=True):
        last, drifted = step // FRESH_EVERY, step % FRESH_EVERY / FRESH_EVERY
        weights_D = (1 - drifted) * draws_WD[last] + drifted * draws_WD[last + 1]
        log_step_DE = log_popularity_DE + noise_E
        if num_tokens <= NUM_DRAWN_TOKEN_BY_TOKEN:
            domains_T = generator.choice(num_domains, num_tokens, p=weights_D)
            scores_TE = log_step_DE[domains_T] + generator.gumbel(size=(num_tokens, num_experts))
            chosen_TK = np.argpartition(-scores_TE, top_k - 1, axis=1)[:, :top_k]
            counts_E[:] = np.bincount(chosen_TK.ravel(), minlength=num_experts)
        else:
            chances_E = np.clip(weights_D @ _chosen_DE(np.exp(log_step_DE), top_k), 0, 1)
            counts_E[:] = generator.binomial(num_tokens, chances_E)
        noise_E = memory * noise_E + NOISE_SD * np.sqrt(1 - memory**2) * generator.standard_normal(num_experts)
    return counts_SE


def _chosen_DE(popularity_DE: FloatArray, top_k: int) -> FloatArray:
    """[D, E] chance that a token chooses an expert among its `top_k` distinct ones.

    The first of independent exponential clocks to ring are chosen (Gumbel top-k); stopped at a common time instead of
    after exactly k rings, each has rung with chance 1 - exp(-time * rate). The time is found by bisection.
    """
    rates_DE = popularity_DE / popularity_DE.sum(axis=1, keepdims=True)
    low_D1, high_D1 = np.zeros((len(rates_DE), 1)), top_k / rates_DE.min(axis=1, keepdims=True)
    for _ in range(60):
        middle_D1 = (low_D1 + high_D1) / 2
        too_late_D1 = (-np.expm1(-middle_D1 * rates_DE)).sum(axis=1, keepdims=True) > top_k
        high_D1, low_D1 = np.where(too_late_D1, middle_D1, high_D1), np.where(too_late_D1, low_D1, middle_D1)
    chances_DE: FloatArray = -np.expm1(-low_D1 * rates_DE)
    return chances_DE
