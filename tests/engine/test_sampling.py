"""Sampling: greedy by default, otherwise a function of logits, seed and position alone."""

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
