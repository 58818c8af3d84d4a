"""The load generator's jobs and figures."""

import pytest

from bench.serving.load_generator import Answer, Job, figures, random_jobs


def answer(sent_s: float, token_s: list[float], *, error: str | None = None, left: bool = False) -> Answer:
    return Answer(
        Job((1, 2, 3), 4), sent_s, token_s, token_s[-1], len(token_s), "x", None if left else "length", error, left
    )


def test_figures_are_those_of_a_hand_made_case() -> None:
    summary = figures(
        [
            answer(0.0, [1.0, 1.5, 2.5]),
            answer(1.0, [2.0, 3.0]),
            answer(0.5, [0.6], error="500: it broke"),
            answer(0.5, [0.7, 0.8], left=True),
        ]
    )
    assert (summary["completed"], summary["failed"], summary["duration"]) == (2, 1, 3.0)
    assert (summary["total_input"], summary["total_output"]) == (6, 5)
    assert summary["output_throughput"] == pytest.approx(5 / 3)
    assert summary["median_ttft_ms"] == pytest.approx(1000)
    assert summary["mean_itl_ms"] == pytest.approx(1e3 * (0.5 + 1.0 + 1.0) / 3)
    assert summary["mean_tpot_ms"] == pytest.approx(1e3 * (1.5 / 2 + 1.0) / 2)
    assert summary["p99_e2el_ms"] == pytest.approx(2000 + 0.99 * 500)


def test_jobs_are_cut_out_of_texts_and_the_same_for_a_seed() -> None:
    texts = [list(range(100)), list(range(7))]
    jobs = random_jobs(texts, 50, 16, 8, seed=3)
    assert jobs == random_jobs(texts, 50, 16, 8, seed=3) != random_jobs(texts, 50, 16, 8, seed=4)
    for job in jobs:
        assert 8 <= len(job.prompt_ids) <= 24
        assert 4 <= job.max_tokens <= 12
        assert list(job.prompt_ids) == list(range(job.prompt_ids[0], job.prompt_ids[0] + len(job.prompt_ids)))
