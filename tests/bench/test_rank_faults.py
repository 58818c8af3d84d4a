"""The figures of ranks that die under load, from answers whose times are known."""

import pytest

from bench.serving.faults_figures import WATCHED_S, binned, goals, mean_of_each, pauses_after
from bench.serving.load_generator import Answer, Job

JOB = Job((1, 2), 4)


def answer(sent_s: float, *token_s: float) -> Answer:
    return Answer(JOB, sent_s, list(token_s), token_s[-1], len(token_s))


def test_a_pause_is_the_longest_gap_of_a_stream_that_was_under_way() -> None:
    answers = [
        answer(0.0, 1.0, 2.1, 2.6, 2.8),  # from the signal to the first token after it is not its longest gap
        answer(0.0, 1.0, 2.9),
        answer(1.5, 4.0, 4.1),  # its prompt was under way
        answer(0.0, 1.0, 1.5),  # it had ended
        answer(2.5, 3.0),  # it came later
        answer(0.0, 1.0, 2.0 + WATCHED_S + 1),  # nothing as long as it was watched
    ]
    assert pauses_after(answers, 2.0) == pytest.approx([0.5, 0.9, 2.0, WATCHED_S])


def test_the_table_compares_a_pause_with_the_restart_of_the_whole_group() -> None:
    pause = {"median": 0.5, "p90": 0.6, "worst": 0.7, "num": 3}
    kills = {
        "rows": [{}], "num_failed": 0, "num_wrong": 1, "num_answers": 9, "back_s": pause,
        "pauses_s": {"survivors": pause, "lost": None},
    }  # fmt: skip
    rows = goals({"kills": kills, "restart": {"interruption_s": {"median": 10.0}}})
    reached = {row[0]: row[2] for row in rows}
    assert reached["kills: 1 x kill -9"] == "0 failed, 1 wrong of 9"
    assert reached["pause of survivors' streams, median / worst"] == "0.50 s / 0.70 s (3)"
    assert reached["pause of the lost rank's streams"] == "none"
    assert reached["whole-group restart, and times of a pause"] == "10.0 s, 20 x"


def test_seconds_are_means_of_what_came_in_between() -> None:
    before, after = {"a": (2.0, 3.0), "b": (1.0, 1.0)}, {"a": (4.0, 4.0), "b": (1.0, 1.0), "c": (1.0, 0.5)}
    assert mean_of_each(before, after) == {"a": 0.5, "c": 0.5}


def test_tokens_are_counted_by_bins() -> None:
    assert binned([0.0, 0.1, 0.3, 1.0]) == [2, 1, 0, 0, 1]
