"""Sampling: greedy by default, otherwise a function of logits, seed and position alone."""

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
)

from rq_ep.engine.requests import Sampling
from rq_ep.engine.tokens.logits_processors import TokenHistory, processed_logits
from rq_ep.engine.tokens.sampling import next_tokens

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


def reference_logits(row_V: np.ndarray, sampling: Sampling, history: TokenHistory) -> np.ndarray:
    """The rules in plain NumPy, in vLLM's order."""
    row_V = row_V.astype(np.float64).copy()
    if len(history.answer_ids) < sampling.min_tokens:
        row_V[list(history.end_token_ids)] = -np.inf
    for token_id, bias in sampling.logit_bias:
        row_V[token_id] += bias
    for token_id in {*history.prompt_ids, *history.answer_ids}:
        penalty = sampling.repetition_penalty
        row_V[token_id] = row_V[token_id] / penalty if row_V[token_id] > 0 else row_V[token_id] * penalty
    for token_id in range(len(row_V)):
        count = list(history.answer_ids).count(token_id)
        row_V[token_id] -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)
    return row_V


def reference_support(row_V: np.ndarray, sampling: Sampling) -> set[int]:
    """Tokens that may be drawn from processed logits: min-p, then top-k, then top-p, as vLLM orders them."""
    with np.errstate(divide="ignore"):
        mass_V = np.exp((row_V - row_V.max()) / sampling.temperature)
    kept_V = mass_V >= sampling.min_p
    if sampling.top_k:
        kept_V &= mass_V >= np.sort(np.where(kept_V, mass_V, -1))[::-1][min(sampling.top_k, len(row_V)) - 1]
    mass_V = np.where(kept_V, mass_V, 0.0)
    mass_V /= mass_V.sum()
    order_V = np.argsort(-mass_V, kind="stable")
    before_V = np.cumsum(mass_V[order_V]) - mass_V[order_V]
    return {
        int(token) for token, before in zip(order_V, before_V, strict=True) if mass_V[token] and before < sampling.top_p
    }


SETTINGS = [
    Sampling(1.0, logit_bias=((3, 4.0), (5, -100.0))),
    Sampling(0.0, repetition_penalty=1.7),
    Sampling(0.0, repetition_penalty=0.5, presence_penalty=-1.5),
    Sampling(0.5, presence_penalty=1.0, frequency_penalty=0.7),
    Sampling(1.5, top_k=3),
    Sampling(1.5, top_k=NUM_TOKENS + 7),
    Sampling(2.0, min_p=0.3),
    Sampling(1.0, 0.6, top_k=5, min_p=0.1, repetition_penalty=1.2),
    Sampling(1.0, min_tokens=4),
    Sampling(0.0, min_tokens=3),
]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_settings_do_what_a_reference_in_numpy_does(scores_NV: torch.Tensor, sampling: Sampling) -> None:
    history = TokenHistory([1, 2, 3, 3, 40], [3, 7, 7], frozenset({0, 7}))
    processed_NV = processed_logits(scores_NV, [sampling] * 8, [history] * 8)
    for row, processed_V in zip(scores_NV.numpy(), processed_NV.numpy(), strict=True):
        expected_V = reference_logits(row, sampling, history)
        assert np.allclose(processed_V, expected_V, atol=1e-5)
        if not sampling.temperature:
            assert int(next_tokens(torch.tensor(processed_V)[None], [sampling], [0])) == expected_V.argmax()
            continue
        drawn = next_tokens(torch.tensor(processed_V).expand(3000, -1), [sampling] * 3000, range(3000))
        support = reference_support(expected_V, sampling)
        assert set(drawn.tolist()) <= support
        mass_V = np.exp((expected_V - expected_V.max()) / sampling.temperature)
        assert {token for token in support if mass_V[token] > 0.02 * mass_V.sum()} <= set(drawn.tolist())


def test_penalties_and_limits_agree_with_transformers(scores_NV: torch.Tensor) -> None:
    ids = torch.tensor([[1, 2, 3, 3, 40]])
    history = TokenHistory(ids[0].tolist())
    for sampling, processor in (
        (Sampling(repetition_penalty=1.3), RepetitionPenaltyLogitsProcessor(1.3)),
        (Sampling(logit_bias=((3, 4.0), (5, -9.0))), SequenceBiasLogitsProcessor([[[3], 4.0], [[5], -9.0]])),
    ):
        ours = processed_logits(scores_NV[:1], [sampling], [history])
        assert torch.allclose(ours, processor(ids, scores_NV[:1].clone()))
    for sampling, warper in (
        (Sampling(1.0, top_k=4), TopKLogitsWarper(4)),
        (Sampling(1.0, min_p=0.2), MinPLogitsWarper(0.2)),
    ):
        allowed = set(warper(ids, scores_NV[:1].clone())[0].isfinite().nonzero().flatten().tolist())
        assert reference_support(scores_NV[0].numpy().astype(np.float64), sampling) == allowed


def test_a_row_that_asks_for_nothing_is_left_as_it_is(scores_NV: torch.Tensor) -> None:
    samplings = [Sampling(), Sampling(frequency_penalty=1.0)]
    histories = [TokenHistory(), TokenHistory([1], [2])]
    before_NV = scores_NV.clone()
    processed_NV = processed_logits(scores_NV[:2], samplings, histories)
    assert torch.equal(processed_NV[0], before_NV[0])
    assert torch.equal(scores_NV, before_NV)
