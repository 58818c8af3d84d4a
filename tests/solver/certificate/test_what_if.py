"""What more of a limit would buy is solved, not guessed."""

import numpy as np
import pytest

from rq_ep.core.problem import PlacementProblem
from rq_ep.solver.certificate.what_if import GIB, changes, what_if
from rq_ep.strategies.standard import Standard
from tests.solver.instances import problem, skewed


def instance(**limits: object) -> PlacementProblem:
    counts = np.stack([skewed(8, 600, layer, 12) for layer in range(2)], axis=1)
    return problem(counts, 4, **limits)  # type: ignore[arg-type]


def test_each_limit_is_moved_alone() -> None:
    proposed = changes(instance())
    assert [change.name for change in proposed] == ["10% more bytes", "low pairs up to 30%"]
    assert proposed[0].problem.budget_bytes_R == (4400,) * 4
    assert proposed[1].problem.max_low_precision_share == pytest.approx(0.30)
    large = changes(instance(budget=(4 * GIB, 0, 4 * GIB, 4 * GIB)))
    assert large[1].name == "1 GiB per rank more (25.0%)"
    assert large[1].problem.budget_bytes_R == (5 * GIB, 0, 5 * GIB, 5 * GIB)
    assert [change.name for change in changes(instance(budget=None, formats=("bf16",)))] == []


def test_rows_are_those_of_the_solver_and_the_last_is_held_out() -> None:
    rows = what_if(instance(), Standard())
    assert [row["predicted"] for row in rows[:2]] == [Standard().place(instance()).certificate["predicted"]] * 2
    assert rows[2]["change"] == "placed for half of the record"
    second = instance().stats.counts[6:]
    loads_SLR = second.reshape(6, 2, 4, 2).sum(axis=3)
    assert rows[2]["held_out"] == pytest.approx((loads_SLR.max(axis=2) / loads_SLR.mean(axis=2)).mean())


def test_one_step_cannot_be_halved() -> None:
    rows = what_if(problem(np.ones((1, 1, 8), np.int64), 4), Standard())
    assert all("held_out" not in row for row in rows)


def test_steps_of_next_to_no_pairs_do_not_tell_what_is_held_out() -> None:
    large = instance().stats.counts
    tiny = np.zeros_like(large)
    tiny[:, :, 0] = 1  # a pair on one rank: max/mean 4
    mixed = np.concatenate([large[:6], tiny[:6], large[6:], tiny[6:]])
    held_out = [what_if(problem(counts, 4), Standard())[-1]["held_out"] for counts in (large, mixed)]
    assert held_out[1] == pytest.approx(held_out[0])
