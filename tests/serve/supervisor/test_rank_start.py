"""What supervisors and ranks say to each other."""

from typing import Any

import pytest

from rq_ep.config import ServeConfig, StrategyConfig
from rq_ep.serve.supervisor.rank_start import (
    EndFailed,
    Ending,
    HubAddress,
    Late,
    Leave,
    PassSignal,
    RankStart,
    Rejoin,
    Serving,
    from_line,
    to_line,
)

HUB = HubAddress(("::1", 5), "token")
CONFIG = ServeConfig(model="m", strategy=StrategyConfig("llep", {"min_tokens_per_gemm": 16}), formats=("bf16", "int8"))


@pytest.mark.parametrize(
    "message",
    [
        RankStart(CONFIG), RankStart(CONFIG, HUB), RankStart(CONFIG, problem="port 5 is taken\nby others"),
        RankStart(CONFIG, rejoin=Rejoin(HUB, 2)), PassSignal("SIGTERM"), Leave(), EndFailed("x"), Serving(HUB),
        Ending(), Late(HUB),
    ],
)  # fmt: skip
def test_a_message_is_a_line_that_reads_as_it_was(message: Any) -> None:
    line = to_line(message)
    assert line.count(b"\n") == 1
    assert from_line(line) == message
