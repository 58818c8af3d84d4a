"""Which experts are stored in few bits, by hand-made statistics."""

from dataclasses import replace

import numpy as np

from rq_ep.core.problem import PlacementProblem
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.solver.objective.precision import ByteSavings, Formats

STATS = ExpertStats(
    counts=np.array([[[10, 10, 10, 10], [10, 10, 10, 10]]]),
    formats=("bf16", "int8"),
    native_format="bf16",
    expert_bytes={"bf16": 200, "int8": 104},
    importance=np.array([[4.0, 3, 2, 1], [400, 300, 100, 200]]),
    error=np.stack([np.zeros((2, 4)), np.full((2, 4), 0.01)], axis=2),
    visits=np.full((2, 4), 10),
)


def chosen(stats: ExpertStats, share: float) -> list[list[int]]:
    problem = PlacementProblem(stats, Topology(2), formats=("bf16", "int8"), max_low_precision_share=share)
    return [np.flatnonzero(format_E).tolist() for format_E in ByteSavings.of(problem, Formats.of(problem)).format_LE()]


def test_layers_are_compared_by_shares_of_their_damage() -> None:
    assert chosen(STATS, 0.25) == [[3], [2]]
    assert chosen(STATS, 0.5) == [[2, 3], [2, 3]]
    assert chosen(STATS, 0.0) == [[], []]


def test_error_counts_as_much_as_importance() -> None:
    error = STATS.error.copy()
    error[0, 3, 1] = 0.1
    assert chosen(replace(STATS, error=error), 0.25) == [[2], [2]]


def test_measured_answers_go_before_both_and_over_all_layers() -> None:
    kl = np.zeros((2, 4, 2))
    kl[..., 1] = [[1, 2, 3, 4], [50, 60, 70, 80]]
    assert chosen(replace(STATS, kl=kl), 0.5) == [[0, 1, 2, 3], []]


def test_an_expert_that_was_never_visited_is_never_stored_low() -> None:
    visits = STATS.visits.copy()
    visits[0, 3] = 0
    assert chosen(replace(STATS, visits=visits), 0.25) == [[2], [2]]
    assert 3 not in chosen(replace(STATS, visits=visits), 1.0)[0]
    assert chosen(replace(STATS, visits=None), 0.25) == [[3], [2]]


def several(**limits: float) -> PlacementProblem:
    """One layer of four experts of equal importance, with errors in two low formats."""
    error = np.zeros((1, 4, 3))
    error[0, :, 1:] = [[0.02, 0.10], [0.04, 0.20], [0.06, 0.30], [0.08, 1.00]]
    sizes = {"bf16": 200, "int8": 104, "int4": 56}
    stats = ExpertStats(STATS.counts[:, :1], tuple(sizes), "bf16", sizes, importance=np.ones((1, 4)), error=error)
    limits = {"max_low_precision_share": 1.0, **limits}
    return PlacementProblem(stats, Topology(2), formats=("int4", "bf16", "int8"), **limits)  # type: ignore[arg-type]


def test_of_several_formats_a_byte_is_saved_where_it_does_least_damage() -> None:
    problem = several()
    savings = ByteSavings.of(problem, Formats.of(problem))
    assert [Formats.of(problem).names[number] for number in range(3)] == ["bf16", "int8", "int4"]
    assert savings.format_LE().tolist() == [[2, 2, 2, 2]]
    assert savings.saved_A.tolist() == [96, 192, 288, 384, 432, 480, 528, 576]
    assert savings.format_LE(300).tolist() == [[1, 1, 1, 1]]
    assert savings.format_LE(400).tolist() == [[2, 1, 1, 1]]


def test_several_formats_keep_to_the_caps_on_error_and_on_pairs() -> None:
    for limits, expected in (
        ({"max_error": 0.1}, [2, 1, 1, 1]),  # the next step would make it (0.1 + 0.2 + 0.06 + 0.08) / 4
        ({"max_low_precision_share": 0.5}, [2, 2, 0, 0]),
        ({"max_low_precision_share": 0.5, "max_error": 0.06}, [2, 1, 0, 0]),
    ):
        problem = several(**limits)
        assert ByteSavings.of(problem, Formats.of(problem)).format_LE().tolist() == [expected], limits


def test_a_format_that_another_beats_in_bytes_and_damage_is_not_used() -> None:
    problem = several()
    error = problem.stats.error[:, :, [0, 2, 1]]  # type: ignore[index]
    problem = replace(problem, stats=replace(problem.stats, error=error))
    assert ByteSavings.of(problem, Formats.of(problem)).format_LE(288).tolist() == [[2, 2, 0, 0]]
