"""What arriving replicas relieve adds up to the gain of the migration; those of most relief for a byte come first."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rq_ep.core.replicas import Replica, Replicas
from rq_ep.solver.migration.rounds.relief import relief_of_arrivals
from rq_ep.solver.search.layer_state import LayerSplit

SIZES = {"bf16": 1000, "int8": 504}


def held(*pairs: tuple[int, int], name: str = "bf16") -> Replicas:
    return Replicas.of(Replica(rank, expert, name) for rank, expert in pairs)


def balance(pairs_SE: np.ndarray, replicas: Replicas, num_ranks: int) -> float:
    held_ER = replicas.mask(pairs_SE.shape[1], num_ranks)
    return LayerSplit.of(pairs_SE / (pairs_SE.sum(axis=1, keepdims=True) / num_ranks), held_ER).value


def test_what_relieves_the_fullest_rank_is_worth_most() -> None:
    pairs_SE = np.array([[70, 10, 10, 10]])
    before = held((0, 0), (0, 1), (1, 2), (1, 3))
    relief = relief_of_arrivals(pairs_SE, before, held((0, 0), (0, 3), (1, 1), (1, 0)), SIZES, 2)
    assert relief[Replica(1, 0, "bf16")] == pytest.approx(0.6), "1.6 -> 1"
    assert relief[Replica(1, 1, "bf16")] == relief[Replica(0, 3, "bf16")] == pytest.approx(0.0)


def test_replicas_that_gain_only_together_share_it_by_their_bytes() -> None:
    """Two ranks are equally full: to relieve one of them alone gains nothing."""
    pairs_SE = np.array([[40, 40, 10, 10]])
    before = held((0, 0), (1, 1), (2, 2), (3, 3))
    after = Replicas.of([*before, Replica(2, 0, "bf16"), Replica(3, 1, "int8")])
    relief = relief_of_arrivals(pairs_SE, before, after, SIZES, 4)
    gains = {one.format: gain for one, gain in relief.items()}
    assert sum(gains.values()) == pytest.approx(0.6), "1.6 -> 1"
    assert gains["bf16"] / SIZES["bf16"] == pytest.approx(gains["int8"] / SIZES["int8"])


@pytest.mark.parametrize("pairs_SE", [np.zeros((0, 2), int), np.zeros((3, 2), int)])
def test_without_load_nothing_is_relieved(pairs_SE: np.ndarray) -> None:
    assert relief_of_arrivals(pairs_SE, held((0, 0), (0, 1)), held((0, 0), (1, 1)), SIZES, 2) == {}


def test_what_only_goes_relieves_nothing() -> None:
    assert relief_of_arrivals(np.ones((1, 1), int), held((0, 0), (1, 0)), held((1, 0)), SIZES, 2) == {}


@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(2, 9), st.integers(1, 40))
def test_reliefs_add_up_to_the_gain_of_the_migration(
    seed: int, num_ranks: int, num_experts: int, num_steps: int
) -> None:
    """Where every surplus replica is replaced, and no steps are summed."""
    generator = np.random.default_rng(seed)
    pairs_SE = generator.multinomial(500, generator.dirichlet(np.full(num_experts, 0.4)), size=min(num_steps, 16))
    before, after = (
        held(*((int(rank), expert) for expert, rank in enumerate(generator.integers(0, num_ranks, num_experts))))
        for _ in range(2)
    )
    more = held(*{(one.rank, one.expert) for one in after} | {(int(generator.integers(num_ranks)), 0)})
    relief = relief_of_arrivals(pairs_SE, before, more, SIZES, num_ranks)
    gain = balance(pairs_SE, before, num_ranks) - balance(pairs_SE, more, num_ranks)
    assert sum(relief.values()) == pytest.approx(gain, abs=1e-4)


def test_many_steps_and_ranks_are_summed_and_bounded() -> None:
    generator = np.random.default_rng(1)
    pairs_SE = generator.multinomial(4096, generator.dirichlet(np.full(64, 0.3)), size=50)
    before = held(*((expert // 4, expert) for expert in range(64)))
    after = held(*(((expert * 7) % 16, expert) for expert in range(64)))
    relief = relief_of_arrivals(pairs_SE, before, after, SIZES, 16)
    arriving = {one for one in after if one not in set(before)}
    assert relief.keys() == arriving
    assert max(relief.values()) > 0
