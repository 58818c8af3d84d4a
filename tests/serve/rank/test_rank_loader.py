"""What a group is to hold that begins without some of its ranks."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rq_ep.config import ServeConfig
from rq_ep.core.errors import UserError
from rq_ep.serve.rank.rank_loader import place_first
from rq_ep.serve.rank.rebalance.move_inputs import MoveInputs


def test_the_ranks_that_are_there_hold_every_expert_or_are_too_few(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = ServeConfig(model=str(tiny_checkpoint), min_ranks=2).for_ranks(3)
    moves = MoveInputs.of_survivors(config, 3)
    assert moves is not None
    group: Any = SimpleNamespace(size=3, members=(0, 1))
    home, first = place_first(config, group, moves)
    assert {replica.rank for layer in home.layers for replica in layer.replicas} == {0, 1, 2}
    for layer in first.layers:
        assert {replica.rank for replica in layer.replicas} == {0, 1}
        assert {replica.expert for replica in layer.replicas} == set(range(layer.num_experts))
    assert first.bytes_R[2] == 0

    home.save(tmp_path / "placement.json")  # in the bytes of standard EP on three ranks
    config = replace(config, placement=str(tmp_path / "placement.json"))
    moves = MoveInputs.of_survivors(config, 3)
    assert moves is not None
    with pytest.raises(UserError, match=r"--min-ranks 2: .* bytes are missing: .*, or wait for more ranks"):
        place_first(config, group, moves)
