"""Choosing the next tokens, so that a request's answer does not depend on its neighbours in the batch.

The noise of a sampled token is a function of (seed, position, token), not a draw from a shared generator. Adding Gumbel
noise to the logits and taking the maximum samples from their softmax (Gumbel-max).
"""

from collections.abc import Sequence

import torch

from rq_ep.engine.requests import Sampling

# The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection whose output bits look random for counters.
_GAMMA, _MIX_A, _MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def next_tokens(scores_NV: torch.Tensor, samplings: Sequence[Sampling], positions: Sequence[int]) -> torch.Tensor:
    """Choose a token for each row.

    Args:
        scores_NV: [N, V] float32 logits over the vocabulary.
        samplings: N, how each row's token is chosen.
        positions: N, place of the new token in its sequence; with the seed it names the row's noise.

    Returns:
        [N] int64 token ids.
    """
    tokens_N = scores_NV.argmax(dim=-1)
    rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not rows:
        return tokens_N
    device = scores_NV.device
    index_n = torch.tensor(rows, device=device)
    temperature_n1 = _column([samplings[row].temperature for row in rows], device)
    chosen = [samplings[row] for row in rows]
    keys = [_signed(_mix(_mix(samplings[row].seed) + positions[row])) for row in rows]
    chosen_nV = scores_NV[index_n]
    # The largest becomes 0, so that no temperature, however small, makes an infinity of it.
    scaled_nV = chosen_nV.double().sub_(chosen_nV.amax(dim=-1, keepdim=True)).div_(temperature_n1)
    if any(sampling.min_p > 0 for sampling in chosen):
        scaled_nV = _keep_min_p(scaled_nV, _column([sampling.min_p for sampling in chosen], device))
    if any(sampling.top_k > 0 for sampling in chosen):
        scaled_nV = _keep_top_k(scaled_nV, chosen_nV, [sampling.top_k for sampling in chosen])
    if any(sampling.top_p < 1 for sampling in chosen):
        top_p_n1 = _column([sampling.top_p for sampling in chosen], device)
        scaled_nV = _keep_top_p(scaled_nV, chosen_nV.argsort(dim=-1, descending=True), top_p_n1)
    noise_nV = _gumbel(torch.tensor(keys, device=device), scores_NV.shape[1])
    tokens_N[index_n] = scaled_nV.add_(noise_nV).argmax(dim=-1)
    return tokens_N


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """[N, 1] float64, which holds every temperature and top-p that a request can have."""
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]


def _keep_min_p(scaled_NV: torch.Tensor, min_p_N1: torch.Tensor) -> torch.Tensor:
    """Rule out every token that is less than `min_p` times as likely as the likeliest; the largest value is 0."""
    return scaled_NV.masked_fill_(scaled_NV < min_p_N1.log(), float("-inf"))


def _keep_top_k(scaled_NV: torch.Tensor, scores_NV: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    """Rule out every token that is less likely than the k-th; 0 rules out none. Equals of the k-th stay.

    Args:
        scaled_NV: logits divided by the temperature, which makes equals of close ones.
        scores_NV: the logits themselves.
        top_k: N.
    """
    num_tokens = scores_NV.shape[1]
    rank_N1 = torch.tensor([min(k or num_tokens, num_tokens) - 1 for k in top_k], device=scores_NV.device)[:, None]
    ordered_NV = scores_NV.sort(dim=-1, descending=True).values
    return scaled_NV.masked_fill_(scores_NV < ordered_NV.gather(1, rank_N1), float("-inf"))


def _keep_top_p(scaled_NV: torch.Tensor, order_NV: torch.Tensor, top_p_N1: torch.Tensor) -> torch.Tensor:
    """Rule out every token outside the smallest set of likeliest ones that holds a mass of `top_p`, the first at least.

    Args:
        scaled_NV: logits divided by the temperature.
        order_NV: tokens, likeliest first.
        top_p_N1: a mass of 1 or more rules out none.
    """
    mass_NV = scaled_NV.gather(1, order_NV).softmax(dim=-1)
    before_NV = mass_NV.cumsum(dim=-1).sub_(mass_NV)
    outside_NV = (before_NV >= top_p_N1) & (top_p_N1 < 1)
    outside_NV[:, 0] = False
    return scaled_NV.masked_fill_(outside_NV.scatter(1, order_NV, outside_NV), float("-inf"))


def _gumbel(keys_N: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[N, num_tokens] float64 Gumbel noise, a function of the key and the token alone, the same on every device."""
    counters_V = torch.arange(1, num_tokens + 1, device=keys_N.device) * _signed(_GAMMA)
    bits_NV = keys_N[:, None] + counters_V
    bits_NV = (bits_NV ^ _shifted(bits_NV, 30)) * _signed(_MIX_A)
    bits_NV = (bits_NV ^ _shifted(bits_NV, 27)) * _signed(_MIX_B)
    bits_NV = bits_NV ^ _shifted(bits_NV, 31)
    uniform_NV = (_shifted(bits_NV, 12).double() + 0.5) * 2.0**-52
    return -(-uniform_NV.log()).log()


def _shifted(bits: torch.Tensor, places: int) -> torch.Tensor:
    """Shift right without the sign: torch has no unsigned arithmetic."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _mix(value: int) -> int:
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * _MIX_A) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_B) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
