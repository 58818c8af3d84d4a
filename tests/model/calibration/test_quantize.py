"""Experts quantized in advance: the bytes written are the bytes measured, evaluated and served."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement
from rq_ep.core.stats import ModelIdentity
from rq_ep.formats import get_format, is_intact
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.model.calibration.quantize import quantize
from rq_ep.model.calibration.rounding import ROUNDINGS
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.checkpoint.packed_experts import PackedExperts
from rq_ep.model.load.load_model import load
from rq_ep.parallel import run_local
from rq_ep.placing.place import place

SAMPLE = {"sequence_length": 32, "max_tokens": 2048}


@pytest.fixture(scope="module")
def text(tiny_checkpoint: Path) -> Path:
    return tiny_checkpoint / "text" / "train"


@pytest.fixture(scope="module")
def placement(tiny_checkpoint: Path, text: Path) -> Placement:
    stats = calibrate(tiny_checkpoint, text, formats=["int4_g32"], **SAMPLE)
    return place(stats, 2, max_low_precision_share=0.5)


@pytest.fixture(scope="module", params=list(ROUNDINGS))
def written(request, tiny_checkpoint: Path, text: Path, placement: Placement, tmp_path_factory) -> PackedExperts:
    out = tmp_path_factory.mktemp("experts")
    return quantize(tiny_checkpoint, out, placement=placement, rounding=request.param, texts=text, **SAMPLE)


def test_every_low_replica_is_written_and_no_other(written: PackedExperts, placement: Placement) -> None:
    for layer in placement.layers:
        low = {replica.expert for replica in layer.replicas if replica.format == "int4_g32"}
        assert low
        for expert in range(layer.num_experts):
            packed = written.packed(layer.index, expert, "int4_g32")
            assert (packed is not None) == (expert in low)
            assert written.packed(layer.index, expert, "int8") is None


def test_the_bytes_written_are_the_bytes_served(
    written: PackedExperts, tiny_checkpoint: Path, placement: Placement
) -> None:
    model = load(tiny_checkpoint, placement, num_local_ranks=2, packed_experts=written.path)
    for layer in model.rq_ep.layers:
        for bank in layer.banks:
            for expert in bank.experts:
                if bank.format_of(expert).name == "int4_g32":
                    stored = written.packed(layer.placement.index, expert, "int4_g32")
                    assert torch.equal(bank.packed(expert), stored)


def test_written_layers_are_kept_and_other_settings_write_them_anew(
    written: PackedExperts, tiny_checkpoint: Path, text: Path, placement: Placement, tmp_path: Path
) -> None:
    settings = {"placement": placement, "rounding": "nearest"}
    stages = []
    first = quantize(tiny_checkpoint, tmp_path, **settings)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    first.file(1).unlink()
    quantize(tiny_checkpoint, tmp_path, **settings, progress=lambda *stage: stages.append(stage))
    assert stages == [("quantizing", 0, 1), ("quantizing", 1, 1)]
    assert first.file(0).stat().st_mtime_ns == before[first.file(0)]
    quantize(tiny_checkpoint, tmp_path, formats=["int8"], rounding="nearest")
    assert first.packed(0, 3, "int8") is not None
    assert first.packed(0, 3, "int4_g32") is None


@pytest.mark.parametrize("rounding", list(ROUNDINGS))
def test_ranks_write_the_same_experts_as_one_process(
    rounding: str, tiny_checkpoint: Path, text: Path, placement: Placement, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"placement": placement, "rounding": rounding, "texts": text, **SAMPLE}
    one = quantize(tiny_checkpoint, tmp_path / "one", dtype=torch.float32, **settings)
    (two, *_) = run_local(
        3, lambda group: quantize(tiny_checkpoint, tmp_path / "two", dtype=torch.float32, group=group, **settings)
    )
    for layer in range(2):
        expected, actual = load_file(one.file(layer)), load_file(two.file(layer))
        assert actual.keys() == expected.keys() != set()
        for key, packed in expected.items():
            assert is_intact(actual[key])
            differing = float((actual[key] != packed).double().mean())
            assert differing == 0 if rounding == "nearest" else differing < 0.01  # inputs differ in their last bits
    stages: list[str] = []
    settings["progress"] = lambda stage, done, total: stages.append(f"{stage} {done}/{total}")
    run_local(2, lambda group: quantize(tiny_checkpoint, tmp_path / "two", group=group, **settings))
    assert set(stages) == {"quantizing 0/0"}, "all of it is there"


def test_error_is_measured_on_the_packed_experts(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    identity = model_identity(tiny_checkpoint)
    quantize(tiny_checkpoint, tmp_path / "experts", formats=["int8"], rounding="nearest")
    plain = calibrate(tiny_checkpoint, text, formats=["int8"], **SAMPLE)
    again = calibrate(tiny_checkpoint, text, formats=["int8"], packed_experts=tmp_path / "experts", **SAMPLE)
    assert np.array_equal(plain.error, again.error)
    worse = PackedExperts(tmp_path / "worse", identity)
    network = load(tiny_checkpoint, num_local_ranks=1, dtype="float32")
    layout = network.rq_ep.layers[0].banks[0].layout
    wrong = get_format("int8").pack({name: torch.ones(shape) for name, shape in layout.shapes.items()}, layout)
    worse.write(0, {}, {(5, "int8"): wrong})
    measured = calibrate(tiny_checkpoint, text, formats=["int8"], packed_experts=worse.path, **SAMPLE)
    changed = np.argwhere(measured.error[..., 1] != plain.error[..., 1])
    assert changed.tolist() == [[0, 5]]


def test_calibrated_rounding_is_better_than_nearest(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    errors = {}
    for rounding in ROUNDINGS:
        quantize(tiny_checkpoint, tmp_path / rounding, formats=["int4_g64"], rounding=rounding, texts=text)
        held_out = tiny_checkpoint / "text" / "held-out"
        measured = calibrate(
            tiny_checkpoint, held_out, formats=["int4_g64"], packed_experts=tmp_path / rounding, **SAMPLE
        )
        errors[rounding] = measured.error[..., 1].mean()
    assert errors["calibrated"] < 0.9 * errors["nearest"]


def test_users_mistakes_are_named(tiny_checkpoint: Path, text: Path, placement: Placement, tmp_path: Path) -> None:
    for settings, message in (
        ({"formats": ["int8"], "placement": placement}, "either --formats"),
        ({"formats": None}, "either --formats"),
        ({"formats": ["int8"]}, "needs --text"),
        ({"formats": ["bf16"], "rounding": "nearest"}, "other than the stored one, bf16"),
        ({"formats": ["int9"], "rounding": "nearest"}, "did you mean 'int8'"),
        ({"formats": ["int8"], "rounding": "nearset"}, "did you mean 'nearest'"),
    ):
        with pytest.raises(UserError, match=message):
            quantize(tiny_checkpoint, tmp_path / "experts", **settings)
    assert not (tmp_path / "experts").exists()
    with pytest.raises(UserError, match="no quantized experts there"):
        load(tiny_checkpoint, placement, num_local_ranks=2, packed_experts=tmp_path)


def test_bytes_may_be_stored_in_another_type(tmp_path: Path) -> None:
    model = ModelIdentity("tiny", "abc")
    written = PackedExperts(tmp_path, model)
    packed = torch.arange(200, dtype=torch.uint8)
    written.write(0, {}, {(0, "int8"): packed})
    metadata = {"format": '"rq_ep.experts/1"', "model": '["tiny", "abc"]', "how": "{}"}
    for dtype in (torch.int64, torch.float32):
        save_file({"0.int8": packed.to(dtype)}, written.file(0), metadata)
        stored = written.packed(0, 0, "int8")
        assert stored is not None
        assert stored.dtype == torch.uint8
        assert torch.equal(stored, packed)
    save_file({"0.int8": packed + 0.5}, written.file(0), metadata)
    with pytest.raises(UserError, match=r"0\.int8 is torch\.float32 and not all of it are bytes"):
        written.packed(0, 0, "int8")


def test_damaged_and_foreign_files_are_refused(tiny_checkpoint: Path, placement: Placement, tmp_path: Path) -> None:
    written = quantize(tiny_checkpoint, tmp_path, placement=placement, rounding="nearest")
    file = written.file(0)
    whole = file.read_bytes()
    for content, message in ((whole[:-40], "cut short"), (b"nonsense" * 9, "cut short, damaged or foreign")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load(tiny_checkpoint, placement, num_local_ranks=2, packed_experts=tmp_path)
    save_file({"0.int4_g32": torch.zeros(4)}, file, {"format": "another"})
    with pytest.raises(UserError, match="format is 'another'"):
        load(tiny_checkpoint, placement, num_local_ranks=2, packed_experts=tmp_path)
    file.write_bytes(whole)
    with pytest.raises(UserError, match="made for model"):
        PackedExperts(tmp_path, ModelIdentity("other", "0" * 64)).packed(0, 0, "int4_g32")
    tensors = load_file(file)
    key = next(iter(tensors))
    tensors[key][100] ^= 1
    PackedExperts(tmp_path, model_identity(tiny_checkpoint)).write(
        0, {}, {(int(key.split(".")[0]), "int4_g32"): tensors[key]}
    )
    with pytest.raises(UserError, match="does not match its checksum"):
        load(tiny_checkpoint, placement, num_local_ranks=2, packed_experts=tmp_path)
