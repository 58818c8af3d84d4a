"""What rebalancing cannot do is refused in a line, before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest

from rq_ep.config import ServeConfig, StrategyConfig
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.replicas import Replica
from rq_ep.core.topology import Topology
from rq_ep.serve.rank.rebalance.rebalance_inputs import RebalanceInputs

RQ = StrategyConfig("rq")


def config(**settings: Any) -> ServeConfig:
    return ServeConfig(**{"model": "nowhere", "rebalance": "auto", "strategy": RQ, **settings})


@pytest.mark.parametrize(
    ("settings", "num_ranks", "message"),
    [
        ({}, 1, "--rebalance auto: one rank has nothing to balance"),
        ({"strategy": StrategyConfig("standard")}, 2, "strategy 'standard' keeps the placement it has"),
        ({"strategy": None}, 2, "strategy 'standard' keeps the placement it has"),
        ({"placement_out": "/proc/nowhere/p.json"}, 2, "/proc/nowhere/p.json: cannot be written"),
        ({"rebalance": "off", "formats": ("bf16", "int8")}, 2, "--formats bf16,int8: needs --rebalance auto"),
        ({"rebalance": "off", "interval": 7}, 2, "--rebalance-interval 7: needs --rebalance auto"),
        ({"rebalance": "off", "placement_out": "p"}, 2, "--placement-out p: needs --rebalance auto"),
    ],
)
def test_a_setting_that_cannot_be_obeyed_is_refused(settings: Any, num_ranks: int, message: str) -> None:
    with pytest.raises(UserError) as raised:
        RebalanceInputs.check(config(**settings), num_ranks)
    assert message in str(raised.value)


def test_without_settings_there_is_nothing_to_check() -> None:
    assert RebalanceInputs.check(ServeConfig(model="nowhere"), 1) is None


def test_the_formats_the_room_and_the_statistics_are_checked_against_the_model(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = str(tiny_checkpoint)
    inputs = RebalanceInputs.check(config(model=model, formats=("int8",)), 2)
    assert inputs is not None
    assert inputs.formats == ("bf16", "int8")
    assert "formats bf16, int8 without calibration" in inputs.summary()
    packed = inputs.read_expert()(0, 3, "int8")
    assert packed.nbytes == inputs.stats.expert_bytes["int8"]
    with pytest.raises(UserError, match=r"--rebalance-room 100: an expert takes \d+ bytes"):
        RebalanceInputs.check(config(model=model, room_bytes=100), 2)
    with pytest.raises(UserError, match="int7"):
        RebalanceInputs.check(config(model=model, formats=("int7",)), 2)
    with pytest.raises(UserError, match=r"nowhere\.safetensors"):
        RebalanceInputs.check(config(model=model, stats="nowhere.safetensors"), 2)
    mixing = LayerPlacement.even(0, 1, [Replica(0, 0, "bf16"), Replica(1, 0, "int8")], ["bf16", "int8"])
    Placement((mixing,), "rq", Topology(2), (1, 1)).save(tmp_path / "mixed.json")
    with pytest.raises(UserError, match="--mixed-replicas"):
        RebalanceInputs.check(config(model=model, placement=str(tmp_path / "mixed.json")), 2)


def test_a_group_that_is_started_again_begins_with_the_placement_that_was_saved(tmp_path: Path) -> None:
    saved = tmp_path / "served.json"
    given = config(placement="first.json", placement_out=str(saved))
    assert given.restarted(1) is given, "none was saved"
    saved.write_text("{}")
    assert given.restarted(0) is given
    assert given.restarted(1).placement == str(saved)
