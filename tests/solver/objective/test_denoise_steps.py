"""Denoised steps: rates are estimated through the noise, and placements made for them hold on unseen steps."""

from dataclasses import replace

import numpy as np
import pytest

import rq_ep.solver.objective.denoise_steps as denoise_module
from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.placement import Placement
from rq_ep.solver.certificate.generalization import mean_of
from rq_ep.solver.objective.calibration_steps import LayerSteps, calibration_steps
from rq_ep.solver.objective.denoise_steps import (
    MAX_DRAWS,
    MIN_DRAWS,
    NOISY,
    denoise_steps,
    denoised_rates_SE,
    noise_share,
)
from rq_ep.solver.objective.objective import step_balance
from rq_ep.solver.objective.step_balance import ExactSplit
from rq_ep.solver.search.solve import solve
from tests.solver.instances import RQ, problem

NUM_STEPS, NUM_EXPERTS, NUM_PAIRS = 32, 32, 128


def true_rates(seed: int, num_steps: int = NUM_STEPS) -> FloatArray:
    """[S, E] rates of steps that mix three domains."""
    popularity_DE = np.exp(1.2 * np.random.default_rng(seed).standard_normal((3, NUM_EXPERTS)))
    weights_SD = np.random.default_rng([seed, num_steps]).dirichlet([0.3] * 3, num_steps)
    rate_SE: FloatArray = weights_SD @ (popularity_DE / popularity_DE.sum(axis=1, keepdims=True))
    return rate_SE


def drawn(rate_SE: FloatArray, num_pairs: int = NUM_PAIRS) -> IntArray:
    counts_SE: IntArray = np.random.default_rng(1).multinomial(num_pairs, rate_SE)
    return counts_SE


@pytest.mark.parametrize("seed", range(3))
def test_rates_are_found_behind_the_chance(seed: int) -> None:
    rate_SE = true_rates(seed)
    counts_SE = drawn(rate_SE)
    estimate_SE = denoised_rates_SE(counts_SE)
    np.testing.assert_allclose(estimate_SE.sum(axis=1), 1)
    assert (estimate_SE > 0).all()
    assert ((estimate_SE - rate_SE) ** 2).sum() < 0.5 * ((counts_SE / NUM_PAIRS - rate_SE) ** 2).sum()
    assert NOISY < noise_share(counts_SE) < 1


def test_steps_that_differ_by_chance_alone_become_one() -> None:
    estimate_SE = denoised_rates_SE(drawn(np.tile(true_rates(0)[:1], (NUM_STEPS, 1))))
    np.testing.assert_allclose(estimate_SE, np.tile(estimate_SE[:1], (NUM_STEPS, 1)), rtol=0.5, atol=0.01)
    assert noise_share(np.random.default_rng(0).poisson(5.0, (50, 50))) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "counts_SE",
    [drawn(true_rates(0), 10**5), np.full((8, NUM_EXPERTS), 4), drawn(true_rates(0))[:1], np.zeros((0, 4), np.int64)],
    ids=["many pairs", "even", "one step", "none"],
)
def test_what_is_not_chance_is_left_as_recorded(counts_SE: IntArray) -> None:
    layer = LayerSteps(counts_SE, 4)
    instance = problem(np.ones((1, 1, NUM_EXPERTS)), 4)
    assert denoise_steps(instance, [layer]) == [layer]


def test_reading_is_placed_for_as_recorded() -> None:
    counts_SLE = drawn(true_rates(0))[:, None]
    instance = problem(counts_SLE, 4)
    steps = calibration_steps(instance, NUM_STEPS)
    assert denoise_steps(replace(instance, objective="decode"), steps)[0] is steps[0]
    assert denoise_steps(instance, steps)[0] is not steps[0]


def test_as_many_pairs_from_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    counts_SLE = drawn(true_rates(0))[:, None]
    instance = problem(counts_SLE, 4)
    steps = calibration_steps(instance, NUM_STEPS)
    one, again, other = (denoise_steps(replace(instance, seed=seed), steps)[0].counts_SE for seed in (0, 0, 1))
    assert one.shape == (MAX_DRAWS * NUM_STEPS, NUM_EXPERTS)
    assert (one.sum(axis=1) == NUM_PAIRS).all()
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    monkeypatch.setattr(denoise_module, "MAX_WORK", 1)
    assert len(denoise_steps(instance, steps)[0].counts_SE) == MIN_DRAWS * NUM_STEPS


def test_thinned_steps_have_the_rates_of_the_large_ones() -> None:
    rate_SE = true_rates(0)
    instance = replace(problem(drawn(rate_SE, 10**5)[:, None], 4), tokens_per_step=NUM_PAIRS // 2)  # top-2
    (layer,) = denoise_steps(instance, calibration_steps(instance, NUM_STEPS))
    assert (layer.counts_SE.sum(axis=1) == NUM_PAIRS).all()
    assert layer.counts_SE.shape == (MAX_DRAWS * NUM_STEPS, NUM_EXPERTS)
    off_E = layer.counts_SE.mean(axis=0) - NUM_PAIRS * rate_SE.mean(axis=0)
    assert (np.abs(off_E) < 5 * np.sqrt(rate_SE.mean(axis=0) * NUM_PAIRS / len(layer.counts_SE))).all()


def test_holds_better_on_steps_nobody_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    num_ranks = 4
    recorded_SLE = np.stack([drawn(true_rates(seed), 64) for seed in range(6)], axis=1)
    unseen_SLE = np.stack([drawn(true_rates(seed, 100), 64) for seed in range(6)], axis=1)
    instance = problem(recorded_SLE, num_ranks)

    def attained(placement: Placement, counts_SLE: IntArray) -> float:
        layers = [LayerSteps(counts_SLE[:, at], num_ranks) for at in range(counts_SLE.shape[1])]
        pairs = zip(placement.layers, layers, strict=True)
        return mean_of(
            [step_balance(instance, layer, of_layer, ExactSplit(num_ranks)).ratio_S for layer, of_layer in pairs]
        )

    anew = solve(instance, RQ, NUM_STEPS, 1000)
    monkeypatch.setattr(denoise_module, "NOISY", 2.0)
    as_recorded = solve(instance, RQ, NUM_STEPS, 1000)
    parts = 1024  # of a pair: whole ones would hide what is gained
    assert attained(anew, parts * unseen_SLE) < attained(as_recorded, parts * unseen_SLE) - 0.001
    for placement in (anew, as_recorded):  # what is promised is what was recorded, whatever was placed for
        assert placement.certificate["predicted"] == pytest.approx(attained(placement, recorded_SLE))
