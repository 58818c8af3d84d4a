"""Several low formats at once: never worse than each alone, less damage for the same balance, and obeyed afterwards."""

from dataclasses import replace

import numpy as np
import pytest

from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.solver.migration.recover import recover
from rq_ep.solver.migration.refit_formats import refit_formats, saved_bytes
from rq_ep.solver.objective.calibration_steps import calibration_steps
from rq_ep.solver.search.search_state import SearchContext, SearchState, solution_of
from rq_ep.solver.search.spare_replicas import drop_spares
from rq_ep.strategies.rq import ReplicateQuantize
from tests.solver.instances import skewed

SIZES = {"bf16": 1000, "int8": 504, "int4": 270}
RQ = ReplicateQuantize(max_moves=300)


def instance(part: float, *low: str, num_ranks: int = 4, **limits: float) -> PlacementProblem:
    """Two layers of 16 experts in a part of standard EP's bytes."""
    counts_SLE = np.stack([skewed(16, 4000, seed, 16) for seed in (1, 2)], axis=1)
    spread_LE = np.exp(0.3 * np.random.default_rng(0).standard_normal((2, 16)))
    error = np.stack([0 * spread_LE, 0.005 * spread_LE, 0.07 * spread_LE], axis=2)
    stats = ExpertStats(counts_SLE, tuple(SIZES), "bf16", SIZES, top_k=2, error=error)
    budget = (round(part * 2 * 16 / num_ranks * 1000),) * num_ranks
    return PlacementProblem(stats, Topology(num_ranks), budget, ("bf16", *low), **limits)  # type: ignore[arg-type]


def error_of(placement: Placement) -> float:
    return sum(row["error"] for row in placement.certificate["formats"].values())


@pytest.fixture(scope="module")
def together() -> Placement:
    return RQ.place(instance(0.6, "int8", "int4", max_low_precision_share=1.0))


def test_less_damage_for_the_balance_of_the_smallest_format(together: Placement) -> None:
    int8, int4 = (RQ.place(instance(0.6, name, max_low_precision_share=1.0)) for name in ("int8", "int4"))
    assert int8.certificate["predicted"] > int4.certificate["predicted"] + 0.01, "int8 alone does not balance this"
    assert together.certificate["predicted"] <= int4.certificate["predicted"] + 0.003
    assert error_of(together) < 0.8 * error_of(int4)
    assert max(together.bytes_R) <= 4800


def test_better_balance_for_the_damage_of_one_format(together: Placement) -> None:
    int8 = RQ.place(instance(0.6, "int8", max_low_precision_share=1.0))
    cap = 1.5 * error_of(int8)
    both = RQ.place(instance(0.6, "int8", "int4", max_low_precision_share=1.0, max_error=cap))
    assert error_of(both) <= cap
    assert together.certificate["predicted"] < both.certificate["predicted"] < int8.certificate["predicted"] - 0.003
    with pytest.raises(UserError, match="too small"):
        RQ.place(instance(0.6, "int4", max_low_precision_share=1.0, max_error=cap))


def test_the_certificate_says_what_each_allowed_format_stores(together: Placement) -> None:
    rows = together.certificate["formats"]
    assert list(rows) == ["bf16", "int8", "int4"]
    assert sum(row["experts"] for row in rows.values()) == 32
    assert sum(row["pairs"] for row in rows.values()) == pytest.approx(1)
    assert rows["int8"]["pairs"] + rows["int4"]["pairs"] == pytest.approx(together.low_precision_planned)
    unused = RQ.place(instance(2.0, "int8", "int4")).certificate["formats"]
    assert [unused[name]["experts"] for name in ("int8", "int4")] == [0, 0]


def test_spare_replicas_go_while_balance_hardly_misses_them(together: Placement) -> None:
    problem = instance(0.6, "int8", "int4", max_low_precision_share=1.0)
    context = SearchContext.of(problem, 0, together)
    solution = solution_of(problem, context.formats, together.layers)
    assert solution is not None
    state = SearchState(context, calibration_steps(problem, 64), solution)
    value, free_R, number = state.value, state.free_R.copy(), state.held_LER.sum()
    drop_spares(state, 0.02)
    assert value < state.value <= value + 0.02
    assert state.held_LER.sum() < number
    assert state.held_LER.any(axis=2).all()
    assert (state.free_R >= free_R).all()


def test_a_placement_in_several_formats_is_placed_again_and_recovers(together: Placement) -> None:
    problem = instance(0.6, "int8", "int4", max_low_precision_share=1.0)
    again = RQ.place(problem, together)
    assert again.formats == together.formats
    assert again.certificate["predicted"] <= together.certificate["predicted"] + 1e-3
    roomy = replace(problem, budget_bytes_R=(6400,) * 4)
    recovered, _ = recover(roomy, together, (0, 1, 3), room_bytes=1000)
    assert max(recovered.bytes_R) <= 6400
    for layer in recovered.layers:
        assert not layer.replicas.mixing_experts
        assert 2 not in layer.replicas.ranks_P


def test_lost_ranks_leave_experts_in_the_fewest_bits_where_more_do_not_fit() -> None:
    problem = instance(0.6, "int8", "int4", max_low_precision_share=1.0)
    int8 = RQ.place(replace(problem, formats=("bf16", "int8")))
    recovered, _ = recover(problem, int8, (0, 1, 2), room_bytes=1000)
    assert "int4" in recovered.formats
    with pytest.raises(UserError, match="cannot hold every expert"):
        recover(replace(problem, formats=("bf16", "int8")), int8, (0, 1, 2), room_bytes=1000)


def test_on_a_new_load_as_many_bytes_are_saved(together: Placement) -> None:
    problem = instance(0.6, "int8", "int4", max_low_precision_share=1.0)
    counts = problem.stats.counts[:, :, ::-1].copy()
    after_change = replace(problem, stats=replace(problem.stats, counts=counts))
    layers = refit_formats(after_change, together.layers, saved_bytes(problem, together.layers))
    before, after = (
        sum(SIZES[name] for layer in one for name in {row.expert: row.format for row in layer.replicas}.values())
        for one in (together.layers, layers)
    )
    assert before - 500 <= after <= before
