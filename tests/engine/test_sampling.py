"""Sampling: greedy by default, otherwise a function of logits, seed and position alone."""

import numpy as np
import pytest
import torch

from rq_ep.engine.requests import Sampling
from rq_ep.engine.sampling import next_tokens

NUM_TOKENS = 50


@pytest.fixture
def scores_NV() -> torch.Tensor:
    return torch.randn(8, NUM_TOKENS, generator=torch.Generator().manual_seed(0)) * 2


def test_temperature_zero_takes_the_likeliest(scores_NV: torch.Tensor) -> None:
    tokens_N = next_tokens(scores_NV, [Sampling()] * 8, list(range(8)))
    assert torch.equal(tokens_N, scores_NV.argmax(-1))


def test_no_rows_give_no_tokens() -> None:
    assert next_tokens(torch.zeros(0, NUM_TOKENS), [], []).shape == (0,)


def test_a_row_does_not_depend_on_its_neighbours(scores_NV: torch.Tensor) -> None:
    samplings = [Sampling(0.0 if row % 3 == 0 else 1.0, 0.9, seed=row) for row in range(8)]
    together_N = next_tokens(scores_NV, samplings, list(range(8)))
    alone = [int(next_tokens(scores_NV[[row]], [samplings[row]], [row])) for row in range(8)]
    assert together_N.tolist() == alone


def test_seed_and_position_name_the_noise() -> None:
    flat = torch.zeros(64, 1000)
    by_position = next_tokens(flat, [Sampling(1.0, seed=5)] * 64, list(range(64)))
    by_seed = next_tokens(flat, [Sampling(1.0, seed=seed) for seed in range(-32, 32)], [7] * 64)
    assert len(set(by_position.tolist())) > 50
    assert len(set(by_seed.tolist())) > 50
    assert torch.equal(by_position, next_tokens(flat, [Sampling(1.0, seed=5)] * 64, list(range(64))))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_softmax(temperature: float) -> None:
    num_draws = 20_000
    row_V = torch.tensor([2.0, 1.0, 0.0, -1.0])
    drawn_N = next_tokens(row_V.expand(num_draws, 4), [Sampling(temperature, seed=1)] * num_draws, range(num_draws))
    shares_V = torch.bincount(drawn_N, minlength=4) / num_draws
    # four standard deviations of a share
    assert torch.allclose(shares_V, (row_V / temperature).softmax(-1), atol=4 * 0.5 / num_draws**0.5)


def test_top_p_rules_out_the_tail() -> None:
    masses_V = torch.tensor([0.5, 0.3, 0.15, 0.05])
    row_NV = masses_V.log().expand(2000, 4)
    for top_p, allowed in [(0.4, {0}), (0.5, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})]:
        drawn_N = next_tokens(row_NV, [Sampling(1.0, top_p, seed=3)] * 2000, range(2000))
        assert set(drawn_N.tolist()) == allowed


def likely_tokens(row_V: torch.Tensor, temperature: float, top_p: float) -> set[int]:
    """Tokens that a draw may yield: more likely than 1 in 10,000, by the definitions in extended precision."""
    scores_V = row_V.numpy().astype(np.longdouble)
    mass_V = np.exp((scores_V - scores_V.max()) / np.longdouble(temperature))
    mass_V /= mass_V.sum()
    order_V = np.argsort(-scores_V, kind="stable")
    num_kept = max(1, int((np.cumsum(mass_V[order_V]) - mass_V[order_V] < top_p).sum()))
    return {int(token) for token in order_V[:num_kept] if mass_V[token] > 1e-4}


@pytest.mark.parametrize("top_p", [0.0, 5e-324, 1e-50, 0.3, 1 - 1e-12, 1.0])
@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 3e-39, 1e-38, 1e-20, 1e-5, 1.0, 2.0, 1e300])
def test_extreme_settings_draw_from_their_limits(temperature: float, top_p: float) -> None:
    largest = torch.finfo(torch.float32).max
    rows_RV = torch.tensor(
        [
            [1.0, 2.0, 3.0, 2.999999],
            [-4.0, -2.0, -3.0, -2.0],  # the limit of temperature 0 is even between equals
            [largest, -largest, 0.0, largest / 2],
            [float("-inf"), 0.0, 1e-45, float("-inf")],
        ]
    )
    for row_V in rows_RV:
        drawn_N = next_tokens(row_V.expand(400, 4), [Sampling(temperature, top_p, seed=3)] * 400, range(400))
        assert set(drawn_N.tolist()) == likely_tokens(row_V, temperature, top_p)
