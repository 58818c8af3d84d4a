"""The placement solver: inside every limit, better than standard EP, and honest about it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.plan import imbalance
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.topology import home_ranks
from rq_ep.solver.objective.calibration_steps import calibration_steps
from rq_ep.solver.search.cuts import MAX_RANKS_ENUMERATED
from rq_ep.solver.search.solve import solve
from rq_ep.strategies.rq import ReplicateQuantize
from tests.solver.instances import RQ, problem, skewed


def place(given: PlacementProblem, max_moves: int = 400) -> Placement:
    return solve(given, RQ, 32, max_moves)


def replayed(placement: Placement, counts_SLE: np.ndarray) -> float:
    """max/mean of the planner's loads, mean over steps and layers."""
    ratios = []
    for at, layer in enumerate(placement.layers):
        planner = ReplicateQuantize().planner(layer, placement.topology)
        for counts_E in counts_SLE[:, at]:
            counts_RE = np.zeros((placement.topology.num_ranks, len(counts_E)), np.int64)
            counts_RE[0] = counts_E
            ratios.append(imbalance(planner(counts_RE).loads_R))
    return float(np.mean(ratios))


def recorded(num_experts: int, num_layers: int = 2, num_steps: int = 24, pairs: int = 8000) -> np.ndarray:
    return np.stack([skewed(num_experts, pairs, seed, num_steps) for seed in range(num_layers)], axis=1)


def test_balances_a_skewed_model_in_the_bytes_of_standard_ep() -> None:
    counts_SLE = recorded(16, num_layers=4)
    placement = place(problem(counts_SLE, 4))
    certificate = placement.certificate
    assert certificate["standard"] > 1.4
    assert certificate["predicted"] < 1.03
    assert certificate["predicted"] == pytest.approx(replayed(placement, counts_SLE), abs=1e-9)
    assert certificate["bound"] <= certificate["predicted"]
    assert certificate["gap"] == pytest.approx(certificate["predicted"] / certificate["bound"] - 1)
    assert certificate["binding"] in {"mean", "bytes", "hot expert"}
    assert certificate["steps"] == 24
    for layer in placement.layers:
        assert layer.bound <= layer.predicted + 1e-9
    assert 0 < placement.low_precision_planned <= 0.25
    assert set(placement.formats) == {"bf16", "int8"}


def test_more_ranks_than_are_enumerated() -> None:
    num_ranks = MAX_RANKS_ENUMERATED + 4
    counts_SLE = recorded(24, num_layers=1, num_steps=8)
    placement = place(problem(counts_SLE, num_ranks, max_low_precision_share=0.4), max_moves=200)
    assert placement.certificate["predicted"] == pytest.approx(replayed(placement, counts_SLE), abs=1e-9)
    assert placement.certificate["predicted"] < 0.7 * placement.certificate["standard"]


@pytest.mark.parametrize("limits", [{"formats": ("bf16",)}, {"max_low_precision_share": 0.0}])
def test_without_low_precision_it_still_rearranges(limits: dict) -> None:
    placement = place(problem(recorded(16), 4, **limits))
    assert placement.formats == ("bf16",)
    assert [len(layer.replicas) for layer in placement.layers] == [16, 16]
    assert placement.certificate["predicted"] < placement.certificate["standard"] - 0.1


def test_unlimited_bytes_need_no_low_precision() -> None:
    placement = place(problem(recorded(16), 4, budget=None))
    assert placement.formats == ("bf16",)
    assert placement.certificate["predicted"] < 1.002
    assert placement.budget_bytes_R is None


def test_bytes_left_by_cold_experts_of_one_layer_serve_another() -> None:
    counts_SLE = recorded(16)
    counts_SLE[:, 1] = 500
    placement = place(problem(counts_SLE, 4))
    assert len(placement.layers[0].replicas) > len(placement.layers[1].replicas)
    assert placement.layers[1].predicted == pytest.approx(1, abs=1e-3)


def test_ranks_with_unequal_budgets() -> None:
    budget = (16_000, 8_000, 5_000, 4_000)
    placement = place(problem(recorded(16), 4, budget=budget))
    assert all(used <= given for used, given in zip(placement.bytes_R, budget, strict=True))
    assert placement.certificate["predicted"] < placement.certificate["standard"]


def test_a_budget_that_is_too_small_says_what_would_do() -> None:
    counts_SLE = recorded(16)
    with pytest.raises(UserError, match=r"--budget 6000: too small .* raise it to (\d+) bytes per rank") as caught:
        place(problem(counts_SLE, 4, budget=(6000,) * 4))
    enough = int(str(caught.value).split("raise it to ")[1].split()[0])
    assert enough < 8000
    assert max(place(problem(counts_SLE, 4, budget=(enough,) * 4)).bytes_R) <= enough
    with pytest.raises(UserError, match="raise it to 8000 bytes per rank, or allow a smaller format"):
        place(problem(counts_SLE, 4, budget=(6000,) * 4, formats=("bf16",)))


@pytest.mark.parametrize("share", [0.0, 0.03, 0.1, 0.5, 1.0])
def test_the_cap_on_low_precision_pairs_is_kept(share: float) -> None:
    counts_SLE = recorded(16)
    placement = place(problem(counts_SLE, 4, max_low_precision_share=share), max_moves=100)
    low = sum(
        int(counts_SLE[:, at, expert].sum())
        for at, layer in enumerate(placement.layers)
        for expert in {replica.expert for replica in layer.replicas if replica.format == "int8"}
    )
    assert low <= share * counts_SLE.sum()
    assert placement.low_precision_planned == pytest.approx(low / counts_SLE.sum())


def test_experts_that_matter_keep_their_bits() -> None:
    counts_SLE = recorded(16, num_layers=1)
    coldest = int(counts_SLE.sum(axis=(0, 1)).argmin())
    importance = np.ones((1, 16))
    plain = place(problem(counts_SLE, 4, notes={"importance": importance}))
    importance[0, coldest] = 1e6
    valued = place(problem(counts_SLE, 4, notes={"importance": importance}))
    error = np.zeros((1, 16, 2))
    error[0, :, 1] = 1e-6
    error[0, coldest, 1] = 0.9
    sensitive = place(problem(counts_SLE, 4, notes={"error": error}))

    def low(placement: Placement) -> set[int]:
        return {replica.expert for replica in placement.layers[0].replicas if replica.format == "int8"}

    assert coldest in low(plain)
    assert coldest not in low(valued)
    assert coldest not in low(sensitive)
    assert low(valued)


def test_an_even_load_needs_nothing_but_contiguous_blocks() -> None:
    placement = place(problem(np.full((4, 2, 16), 8), 4))
    homes = home_ranks(16, 4).tolist()
    for layer in placement.layers:
        assert {(replica.expert, replica.rank) for replica in layer.replicas} == set(enumerate(homes))
        assert set(layer.replicas.formats_P) == {"bf16"}
        assert layer.predicted == layer.bound == 1
        assert layer.binding == "mean"


def test_shares_are_those_of_the_mean_split() -> None:
    placement = place(problem(np.tile([90, 10, 10, 10], (5, 1, 1)), 2, budget=None))
    layer = placement.layers[0]
    pairs_P = np.array([90, 10, 10, 10])[layer.replicas.experts_P] * layer.shares_P
    np.testing.assert_allclose(np.bincount(layer.replicas.ranks_P, pairs_P), [60, 60])


def test_steps_are_spread_over_the_record() -> None:
    counts_SLE = np.full((100, 2, 4), 100)
    counts_SLE[:, :, 0] = np.arange(100)[:, None]
    counts_SLE[:, :, 1] = 200 - counts_SLE[:, :, 0]
    assert calibration_steps(problem(counts_SLE, 2), 5)[0].counts_SE[:, 0].tolist() == [10, 30, 50, 70, 90]
    assert len(calibration_steps(problem(counts_SLE[:7], 2), 64)[1].counts_SE) == 7


def test_a_step_counts_by_its_pairs() -> None:
    counts_SLE = np.concatenate([np.full((4, 1, 4), 1000), np.full((400, 1, 4), 1)])
    sizes = calibration_steps(problem(counts_SLE, 2), 50)[0].counts_SE.sum(axis=1)
    assert (sizes == 4000).sum() == 4
    assert (sizes == 4).sum() == 5


def test_steps_are_thinned_to_the_size_served() -> None:
    counts_SLE = np.full((6, 2, 4), 100)
    thinned = calibration_steps(problem(counts_SLE, 2, tokens_per_step=8), 5)
    assert [layer.counts_SE.sum(axis=1).tolist() for layer in thinned] == [[16] * 5] * 2  # top-2
    again = calibration_steps(problem(counts_SLE, 2, tokens_per_step=8), 5)
    np.testing.assert_array_equal(thinned[1].counts_SE, again[1].counts_SE)
    other = calibration_steps(problem(counts_SLE, 2, tokens_per_step=8, seed=1), 5)
    assert (other[1].counts_SE != again[1].counts_SE).any()
    as_recorded = calibration_steps(problem(counts_SLE, 2, tokens_per_step=10**6), 5)
    assert (as_recorded[0].counts_SE == 100).all()


def test_steps_without_pairs_do_not_count() -> None:
    counts_SLE = recorded(8, num_layers=1, num_steps=6)
    with_gaps = np.concatenate([counts_SLE, np.zeros_like(counts_SLE)])
    assert place(problem(with_gaps, 2)).certificate["steps"] == 6


def test_progress_rises_to_one() -> None:
    seen: list[float] = []
    solve(replace(problem(recorded(8), 2), on_progress=seen.append), RQ, 8, 50)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(seen) > 2


@pytest.mark.slow
@given(
    num_experts=st.integers(1, 9),
    num_ranks=st.integers(1, 10),
    num_layers=st.integers(1, 3),
    rooms=st.lists(st.integers(0, 6000), min_size=10, max_size=10),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_whatever_is_asked_it_fits_or_says_what_would(
    num_experts: int, num_ranks: int, num_layers: int, rooms: list[int], share: float, seed: int
) -> None:
    counts_SLE = np.stack([skewed(num_experts, 500, seed + layer, 4) for layer in range(num_layers)], axis=1)
    budget = tuple(rooms[:num_ranks])
    try:
        placement = place(problem(counts_SLE, num_ranks, budget=budget, max_low_precision_share=share), max_moves=20)
    except UserError as error:
        enough = int(str(error).split("raise it to ")[1].split()[0])
        budget = (enough,) * num_ranks
        placement = place(problem(counts_SLE, num_ranks, budget=budget, max_low_precision_share=share), max_moves=20)
    assert all(used <= room for used, room in zip(placement.bytes_R, budget, strict=True))
    assert placement.low_precision_planned <= share + 1e-12
    assert placement.certificate["bound"] <= placement.certificate["predicted"] + 1e-9
    assert all(layer.bound <= layer.predicted + 1e-9 for layer in placement.layers)
