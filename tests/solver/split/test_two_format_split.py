"""Splits over replicas of two formats: as even as halves allow, few bits only where they help, lowest gates to them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.core.topology import Topology
from rq_ep.solver.objective.step_balance import ExactSplit
from rq_ep.solver.split.two_format_split import TwoFormatSplit
from tests.solver.instances import skewed


def random_mixture(num_experts: int, num_ranks: int, seed: int) -> Replicas:
    """Experts with one or two native replicas, two thirds of them with low ones beside these; the last is low alone."""
    generator = np.random.default_rng(seed)
    replicas = [Replica(int(generator.integers(num_ranks)), num_experts - 1, "int8")]
    for expert in range(num_experts - 1):
        ranks = generator.permutation(num_ranks).tolist()
        num_native = int(generator.integers(1, min(num_ranks, 2) + 1))
        num_low = int(generator.integers(num_ranks - num_native + 1)) if expert % 3 else 0
        replicas += [Replica(rank, expert, "bf16") for rank in ranks[:num_native]]
        replicas += [Replica(rank, expert, "int8") for rank in ranks[num_native : num_native + num_low]]
    return Replicas.of(replicas, ("int8", "bf16"))


def low_of_mixing_P(replicas: Replicas) -> np.ndarray:
    return np.isin(replicas.experts_P, replicas.mixing_experts) & (np.array(replicas.formats_P) == "int8")


def by_replica(two_formats: TwoFormatSplit, quotas_C: np.ndarray) -> np.ndarray:
    quotas_P = np.zeros_like(quotas_C)
    quotas_P[two_formats.by_expert.replicas_C] = quotas_C
    return quotas_P


def least_maximum(replicas: Replicas, totals_E: np.ndarray, num_ranks: int) -> float:
    """Pairs of the fullest rank under the best fractional split whose low replicas keep to the lower halves."""
    num, low_P = len(replicas), low_of_mixing_P(replicas)
    above_RP = np.append((np.arange(num_ranks)[:, None] == replicas.ranks_P).astype(float), -np.ones((num_ranks, 1)), 1)
    of_EP = np.append((np.arange(len(totals_E))[:, None] == replicas.experts_P).astype(float), 0 * totals_E[:, None], 1)
    low_EP = of_EP * np.append(low_P, 0.0)
    right = np.concatenate([np.zeros(num_ranks), totals_E // 2])
    solution = linprog(np.append(np.zeros(num), 1.0), np.concatenate([above_RP, low_EP]), right, of_EP, totals_E)
    return float(solution.fun)


@pytest.mark.parametrize("num_pairs", [7, 301, 10**5])
@pytest.mark.parametrize(("num_experts", "num_ranks"), [(4, 2), (8, 3), (16, 4), (24, 8)])
def test_the_fullest_rank_is_the_optimum_of_the_halves(num_experts: int, num_ranks: int, num_pairs: int) -> None:
    for seed in range(5):
        replicas = random_mixture(num_experts, num_ranks, seed)
        totals_E = skewed(num_experts, num_pairs, seed)[0]
        two_formats = TwoFormatSplit.of(replicas, num_ranks)
        quotas_P = by_replica(two_formats, two_formats.split(totals_E))
        loads_R = np.bincount(replicas.ranks_P, quotas_P, minlength=num_ranks)
        assert loads_R.max() == np.ceil(least_maximum(replicas, totals_E, num_ranks) - 1e-6)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Replicas, Topology, np.ndarray]:
    num_ranks, num_experts = draw(st.integers(1, 5)), draw(st.integers(2, 7))
    values = st.one_of(st.integers(0, 9), st.integers(0, 10**9))
    counts = draw(st.lists(values, min_size=num_ranks * num_experts, max_size=num_ranks * num_experts))
    topology = Topology(num_ranks, draw(st.integers(0, num_ranks)))
    replicas = random_mixture(num_experts, num_ranks, draw(st.integers(0, 99)))
    return replicas, topology, np.array(counts, np.int64).reshape(num_ranks, num_experts)


@given(steps())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_pair_goes_somewhere_and_no_expert_sends_more_than_half_low(
    drawn: tuple[Replicas, Topology, np.ndarray],
) -> None:
    replicas, topology, counts_RE = drawn
    totals_E = counts_RE.sum(axis=0)
    two_formats = TwoFormatSplit.of(replicas, topology.num_ranks)
    quotas_C = two_formats.split(totals_E)
    pairs_RP = two_formats.assign_sources(counts_RE, quotas_C, topology)
    assert (pairs_RP >= 0).all()
    np.testing.assert_array_equal(pairs_RP.sum(axis=0), by_replica(two_formats, quotas_C))
    low_P = low_of_mixing_P(replicas)
    for expert in range(len(totals_E)):
        of_expert_P = replicas.experts_P == expert
        np.testing.assert_array_equal(pairs_RP[:, of_expert_P].sum(axis=1), counts_RE[:, expert])
        low_R = pairs_RP[:, of_expert_P & low_P].sum(axis=1)
        assert low_R.sum() <= totals_E[expert] // 2
        # Each source sends the same part of its pairs there, so that each may choose its lowest gates.
        assert np.abs(low_R - counts_RE[:, expert] * (low_R.sum() / max(totals_E[expert], 1))).max() <= 1 + 1e-6
    np.testing.assert_array_equal(quotas_C, two_formats.split(totals_E))


def test_few_bits_are_left_alone_where_they_are_not_needed() -> None:
    replicas = Replicas.of(
        [Replica(0, 0, "bf16"), Replica(1, 0, "int8"), Replica(1, 1, "bf16"), Replica(0, 1, "int8")], ("int8", "bf16")
    )
    two_formats = TwoFormatSplit.of(replicas, 2)
    low_P = low_of_mixing_P(replicas)
    assert by_replica(two_formats, two_formats.split(np.array([50, 50])))[low_P].sum() == 0
    assert by_replica(two_formats, two_formats.split(np.array([70, 30])))[low_P].tolist() == [0, 20]
    # Half of the pairs is the most, though the other rank idles.
    assert by_replica(two_formats, two_formats.split(np.array([71, 0])))[low_P].tolist() == [0, 35]


def test_what_is_evaluated_is_what_is_planned() -> None:
    replicas, counts_SE = random_mixture(9, 4, 1), skewed(9, 500, 1, num_steps=6)
    two_formats = TwoFormatSplit.of(replicas, 4)
    quotas_SP = np.stack([by_replica(two_formats, two_formats.split(totals_E)) for totals_E in counts_SE])
    balance = ExactSplit(4).balance(replicas, counts_SE)
    np.testing.assert_array_equal(balance.pairs_P, quotas_SP.sum(axis=0))
    loads_SR = np.stack([np.bincount(replicas.ranks_P, row_P, minlength=4) for row_P in quotas_SP])
    np.testing.assert_allclose(balance.ratio_S, loads_SR.max(axis=1) * 4 / 500)


def test_steps_that_wait_for_weights_read_native_replicas_alone() -> None:
    replicas = random_mixture(9, 4, 1)
    two_formats = TwoFormatSplit.of(replicas, 4)
    counts_E = np.arange(9)
    quotas_P = by_replica(two_formats, two_formats.route_to_one_rank(counts_E, np.ones(len(replicas))))
    assert quotas_P[low_of_mixing_P(replicas)].sum() == 0
    np.testing.assert_array_equal(np.bincount(replicas.experts_P, quotas_P), counts_E)
    read = ExactSplit(4).by_reading(
        LayerPlacement.even(0, 9, replicas, replicas.mixed_formats), counts_E[None], np.ones((1, 9))
    )
    np.testing.assert_array_equal(read.pairs_P, quotas_P)


@pytest.mark.parametrize(("counts", "message"), [([1, 2], "counts of 2 experts"), ([1, 2, 3, -4], "expert 3 has -4")])
def test_wrong_counts_are_named(counts: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TwoFormatSplit.of(random_mixture(4, 3, 2), 3).split(np.array(counts))
