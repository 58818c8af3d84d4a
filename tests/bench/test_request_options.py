"""What the bench of requests' options makes of its rounds."""

from bench.serving.request_options import goals, median_interval, ratios

RATES = {"plain": 100.0, "plain again": 101.0, "JSON schema": 95.0, "routed experts": 99.0}
ROWS = [
    {"round": number, "kind": kind, "tokens_per_s": scale * rate, "cpu_s_per_token": 1 / rate}
    for number, scale in ((1, 1.0), (2, 3.0), (3, 0.1))
    for kind, rate in RATES.items()
]


def test_ratios_are_those_of_a_round() -> None:
    assert ratios(ROWS, "tokens_per_s", "JSON schema", "plain") == [0.95] * 3


def test_the_table_says_what_is_dearer_beside_the_noise() -> None:
    prefix = [{"round": 1, "kind": kind, "ttft_s": ttft_s} for kind, ttft_s in (
        ("new", 1.0), ("new again", 1.1), ("repeated", 0.3),
    )]  # fmt: skip
    answers = [{"n": 1, "prompt": 416, "computed": 416}, {"n": 4, "prompt": 416, "computed": 512}]
    table = goals({"costs": {"rows": ROWS}, "prefix": {"rows": prefix}, "n": {"rows": answers}})
    assert table[0] == (
        "JSON schema: tokens/s", "costs at most 10 %", "+5.0 % (+5.0 .. +5.0)", "-1.0 % (-1.0 .. -1.0)",
    )  # fmt: skip
    assert table[3][2] == "+1.0 % (+1.0 .. +1.0)", "CPU time of routed experts"
    assert table[4][2:] == ("0.30 x (0.30 .. 0.30)", "1.10 x (1.10 .. 1.10)")
    assert table[5][2] == "512, of one 416"
    masks = [{"at_once": 8, "vocab_size": 150_000, "grammar_s": 0.003, "free_s": 0.001, "again_s": 0.0012}]
    (line,) = goals({"masks": {"rows": masks}})
    assert line[2:] == ("+2.00 ms (1.00 without)", "+0.20 ms")


def test_the_interval_of_a_median_narrows_with_the_rounds() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (1, 2, 3)
    assert median_interval(range(101)) == (40, 50, 60)
