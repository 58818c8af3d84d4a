"""The fidelity bench on the small trained model: experts as they are change nothing, fewer bits change more."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.formats import fidelity
from bench.formats.fitted_routers import fitted_anew, routers_of
from bench.formats.rounded_model import RoundedModel
from rq_ep.model.calibration.loaded_model import LoadedModel
from rq_ep.model.settings import WindowSettings
from rq_ep.model.text.windows import make_windows


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> RoundedModel:
    from rq_ep.model.checkpoint.tokenizer_files import read_tokenizer

    loaded = LoadedModel.open(tiny_checkpoint, torch.float32, "cpu")
    text = tiny_checkpoint / "text" / "held-out"
    settings = WindowSettings(sequence_length=64, max_tokens=1024)
    windows = make_windows(text, read_tokenizer(tiny_checkpoint), settings)
    return RoundedModel.of(loaded, windows.batches)


def test_the_native_format_and_no_expert_change_nothing(model: RoundedModel) -> None:
    everything, nothing = np.ones((2, 8), bool), np.zeros((2, 8), bool)
    for quality in (model.low("fp32", everything), model.low("int4_g32", nothing), model.half_low("fp32", True)):
        assert np.allclose(quality.kl, 0, atol=1e-8)
        assert quality.agreement == [1] * 16


def test_fewer_bits_on_more_experts_cost_more(model: RoundedModel) -> None:
    half = np.arange(16).reshape(2, 8) % 2 == 0
    kl = [np.mean(model.low(name, low).kl) for name, low in (
        ("int8", half), ("int8", half | True), ("int4_g32", half), ("int4_g32", half | True),
    )]  # fmt: skip
    assert min(kl[:2]) > 1e-8
    assert 5 * max(kl[:2]) < kl[2] < kl[3]
    assert kl[3] > np.mean(model.half_low("int4_g32", by_gate=True).kl) > 0
    assert all("forward" not in experts.module.__dict__ for experts in model.experts)


def test_choices_of_the_dense_model_bound_what_routers_can_give(model: RoundedModel) -> None:
    every = np.ones((2, 8), bool)
    exact = model.all_low_on_dense_routes("fp32")
    assert np.allclose(exact.kl, 0, atol=1e-8)
    assert exact.shift == [0] * 16
    plain = model.low("int4_g32", every)
    assert np.mean(plain.shift) > 0
    assert np.mean(model.all_low_on_dense_routes("int4_g32").kl) < np.mean(plain.kl)


def test_routers_fitted_to_the_dense_model_itself_stay_and_come_back(model: RoundedModel) -> None:
    routers = routers_of(model.network, model.experts)
    before = [router.weight.clone() for router in routers]
    with fitted_anew(model.network, routers, nullcontext, model.batches):
        assert all(torch.allclose(router.weight, old) for router, old in zip(routers, before, strict=True))
        routers[1].weight.data.mul_(2)  # whatever happens to them
    assert all(torch.equal(router.weight, old) for router, old in zip(routers, before, strict=True))
    every = np.ones((2, 8), bool)
    with fitted_anew(model.network, routers, partial(model.while_low, "int4_g128", every), model.batches):
        changed = [not torch.allclose(router.weight, old) for router, old in zip(routers, before, strict=True)]
    assert changed == [False, True]  # the first layer's inputs come before any expert


def test_the_command_prints_writes_and_draws(tiny_checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    figures, picture = tmp_path / "fidelity.json", tmp_path / "fidelity.png"
    text = tiny_checkpoint / "text"
    fidelity.main([
        "--model", str(tiny_checkpoint), "--text", str(text / "held-out"),
        "--calibrate-on", str(text / "train"), "--formats", "int4_g32:calibrated", "--max-tokens", "1024",
        "--json", str(figures), "--png", str(picture),
    ])  # fmt: skip
    document = json.loads(figures.read_text())
    assert [(row["chosen"], row["share"]) for row in document["rows"]] == [
        ("least important", 0.25), ("coldest", 0.25), ("by chance", 0.25),
        ("least important", 0.5), ("coldest", 0.5), ("by chance", 0.5), ("all", 1.0),
    ]  # fmt: skip
    assert [row["chosen"] for row in document["importances"]][-1] == "own KL"
    assert len(document["mixed_replicas"]) == 2
    assert [row["routers"] for row in document["routers"]] == ["as they are", "fitted anew", "dense model's choices"]
    assert document["routers"][0]["kl_ratio"]["mean"] == 1
    by_choice = {(row["chosen"], row["share"]): row["kl"]["mean"] for row in document["rows"]}
    ratios = {(row["what"], row["share"]): row["kl_ratio"]["mean"] for row in document["ratios"]}
    assert ratios["by chance / least important", 0.25] == pytest.approx(
        by_choice["by chance", 0.25] / by_choice["least important", 0.25]
    )
    assert len(ratios) == 5
    assert "Mixed replicas" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
