"""What the deepspeed launcher adds to a command line; `tests/serve/test_launchers.py` has a server started by it."""

from bench.layer.layer import parse_options


def test_the_layer_bench_takes_the_local_rank() -> None:
    assert parse_options(["--shape", "tiny", "--local_rank=1"]).shape == parse_options(["--shape", "tiny"]).shape
