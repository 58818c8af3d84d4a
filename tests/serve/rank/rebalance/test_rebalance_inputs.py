"""What rebalancing cannot do is refused in a line, before anything is loaded."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rq_ep.config import ServeConfig, StrategyConfig
from rq_ep.core.errors import UserError
from rq_ep.core.placement import LayerPlacement, Placement
from rq_ep.core.replicas import Replica
from rq_ep.core.topology import Topology
from rq_ep.formats import is_intact
from rq_ep.model.calibration.quantize import quantize
from rq_ep.serve.check_settings import check_settings
from rq_ep.serve.rank.dry_run import preview
from rq_ep.serve.rank.rebalance.move_inputs import MoveInputs
from rq_ep.serve.rank.rebalance.rebalance_inputs import RebalanceInputs

RQ = StrategyConfig("rq")


def config(**settings: Any) -> ServeConfig:
    return ServeConfig(**{"model": "nowhere", "rebalance": "auto", "strategy": RQ, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": StrategyConfig("standard")}, "strategy 'standard' keeps the placement it has"),
        ({"strategy": None}, "strategy 'standard' keeps the placement it has"),
        ({"placement_out": "/proc/nowhere/p.json"}, "/proc/nowhere/p.json: cannot be written"),
    ],
)
def test_a_setting_that_cannot_be_obeyed_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(UserError) as raised:
        check_settings(config(**settings), 2)
    assert message in str(raised.value)


def test_a_group_that_goes_on_without_ranks_may_use_formats_without_rebalancing(tiny_checkpoint: Path) -> None:
    given = config(model=str(tiny_checkpoint), rebalance="off", formats=("int8",), on_rank_failure="continue")
    assert RebalanceInputs.check(given) is None
    inputs = MoveInputs.of_survivors(given, 2)
    assert inputs is not None
    assert (inputs.formats, inputs.room_bytes) == (("bf16", "int8"), inputs.stats.expert_bytes["bf16"])
    assert inputs.keeps_stacks
    assert MoveInputs.of_survivors(replace(given, on_rank_failure="stop"), 2) is None
    assert MoveInputs.of_survivors(given, 1) is None


def test_without_settings_there_is_nothing_to_check() -> None:
    assert RebalanceInputs.check(ServeConfig(model="nowhere")) is None


def test_the_formats_the_room_and_the_statistics_are_checked_against_the_model(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = str(tiny_checkpoint)
    inputs = RebalanceInputs.check(config(model=model, formats=("int8",)))
    assert inputs is not None
    assert inputs.formats == ("bf16", "int8")
    assert "formats bf16, int8 without calibration" in inputs.summary()
    packed = inputs.read_expert()(0, 3, "int8")
    assert packed.nbytes == inputs.stats.expert_bytes["int8"]
    with pytest.raises(UserError, match=r"--rebalance-room 100: an expert takes \d+ bytes"):
        RebalanceInputs.check(config(model=model, room_bytes=100))
    with pytest.raises(UserError, match="int7"):
        RebalanceInputs.check(config(model=model, formats=("int7",)))
    with pytest.raises(UserError, match=r"nowhere\.safetensors"):
        RebalanceInputs.check(config(model=model, stats="nowhere.safetensors"))
    mixing = LayerPlacement.even(0, 1, [Replica(0, 0, "bf16"), Replica(1, 0, "int8")], ["bf16", "int8"])
    Placement((mixing,), "rq", Topology(2), (1, 1)).save(tmp_path / "mixed.json")
    with pytest.raises(UserError, match="may differ in format: place again with rq"):
        check_settings(config(model=model, placement=str(tmp_path / "mixed.json")), 2)


def _write_last_byte(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"x")


def _replace(file: Path) -> None:
    shutil.copy(file, file.with_name("new"))
    _write_last_byte(file.with_name("new"))
    file.with_name("new").replace(file)


@pytest.mark.parametrize("change", [lambda file: os.truncate(file, 5000), _write_last_byte, _replace, Path.unlink])
def test_a_checkpoint_is_read_as_it_was_opened_or_not_at_all(
    change: Callable[[Path], None], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Reading past the end of a file that was cut short would end the process."""
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("text"))
    inputs = RebalanceInputs.check(config(model=str(model), formats=("int8",)))
    assert inputs is not None
    read = inputs.read_expert()
    before = read(1, 7, "int8").clone()
    change(model / "model.safetensors")
    if change in (_replace, Path.unlink):
        assert torch.equal(read(1, 7, "int8"), before)
    else:
        with pytest.raises(UserError, match=r"model\.safetensors: was written to while it is served"):
            read(1, 7, "int8")


def test_experts_quantized_in_advance_that_have_vanished_are_not_quantized_anew(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    quantize(tiny_checkpoint, tmp_path / "experts", formats=["int8"], rounding="nearest")
    given = config(model=str(tiny_checkpoint), formats=("int8",), experts=str(tmp_path / "experts"))
    inputs = RebalanceInputs.check(given)
    assert inputs is not None
    assert inputs.reads_formats
    assert f"those in few bits from {given.experts}" in preview(given, 2, 2)
    read = inputs.read_expert()
    assert is_intact(read(1, 7, "int8"))
    shutil.rmtree(tmp_path / "experts")
    with pytest.raises(UserError, match=r"experts/layer-00001\.safetensors: has vanished"):
        read(1, 7, "int8")


def test_a_folder_must_hold_all_experts_that_may_be_stored_in_few_bits(tiny_checkpoint: Path, tmp_path: Path) -> None:
    experts, model = str(tmp_path / "experts"), str(tiny_checkpoint)
    quantize(tiny_checkpoint, experts, formats=["int8"], rounding="nearest")
    with pytest.raises(UserError, match=r"not hold expert 0 of layer 0 in int4_g32, nor 15 others .*--formats int4"):
        RebalanceInputs.check(config(model=model, formats=("int4_g32",), experts=experts))
    with pytest.raises(UserError, match=r"--experts .*: --formats bf16 stores no expert in low bits"):
        RebalanceInputs.check(config(model=model, experts=experts))


def test_a_group_that_is_started_again_begins_with_the_placement_that_was_saved(tmp_path: Path) -> None:
    saved = tmp_path / "served.json"
    given = config(placement="first.json", placement_out=str(saved))
    assert given.restarted(1) is given, "none was saved"
    saved.write_text("{}")
    assert given.restarted(0) is given
    assert given.restarted(1).placement == str(saved)


def test_a_preview_counts_the_room_for_what_arrives_in_the_bytes_of_every_rank(tiny_checkpoint: Path) -> None:
    def bytes_of_rank_0(given: ServeConfig) -> int:
        (line,) = (line for line in preview(given, 2, 2).splitlines() if line.startswith("rank 0:"))
        return int(line.split()[2].replace(",", ""))

    model = str(tiny_checkpoint)
    plain = bytes_of_rank_0(config(model=model, rebalance="off", on_rank_failure="stop"))
    assert bytes_of_rank_0(config(model=model, room_bytes=10**6)) == plain + 10**6
    inputs = RebalanceInputs.check(config(model=model))
    assert inputs is not None
    assert bytes_of_rank_0(config(model=model)) == plain + inputs.stats.expert_bytes["bf16"], "one expert by default"
    survives = bytes_of_rank_0(config(model=model, rebalance="off"))
    assert survives == plain + (1 + 4) * inputs.stats.expert_bytes["bf16"], "one expert, and a layer while it is copied"


@pytest.mark.parametrize("text", ["", '{"format": "rq_ep.placement/1", "layers": [', '{"format": "another"}', "{}"])
def test_a_saved_placement_that_cannot_be_read_is_named_and_no_other_is_served_instead(
    text: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "served.json"
    saved.write_text(text)
    given = config(model=str(tiny_checkpoint), placement_out=str(saved))
    with pytest.raises(UserError, match=r"served\.json: "):
        check_settings(given.restarted(1), 2)
