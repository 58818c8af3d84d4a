"""Every placement carries its certificate, whoever made it; and it says when not to trust it."""

import json
from pathlib import Path

import numpy as np
import pytest

from rq_ep.core.placement import Placement
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.rules import Rules, Selection
from rq_ep.solver.certificate.certify import certify
from rq_ep.strategies import STRATEGIES, make_strategy
from rq_ep.strategies.standard import Standard
from tests.solver.instances import problem, skewed


def recorded(num_steps: int = 24, num_layers: int = 2, seed: int = 0) -> np.ndarray:
    return np.stack([skewed(8, 800, seed + layer, num_steps) for layer in range(num_layers)], axis=1)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_certifies_what_it_placed(name: str, tmp_path: Path) -> None:
    instance = problem(recorded(), 4)
    placement = make_strategy(name).place(instance)
    certificate = placement.certificate
    assert certificate["split"] == {
        "standard": "home", "llep": "home", "eplb": "even", "rq_paper": "even", "rq": "exact", "rq_llep": "exact",
    }[name]  # fmt: skip
    assert 1 <= certificate["bound"] <= certificate["predicted"] + 1e-9
    assert certificate["gap"] == pytest.approx(certificate["predicted"] / certificate["bound"] - 1)
    assert certificate["predicted"] == pytest.approx(np.mean([layer.predicted for layer in placement.layers]))
    assert certificate["predicted"] <= certificate["p90"] * 1.1
    assert certificate["cvar90"] <= certificate["worst"]
    assert np.mean(certificate["load"]) == pytest.approx(1)
    assert np.sum(list(certificate["bytes_by_format"].values()), axis=0).tolist() == list(placement.bytes_R)
    assert sum(certificate["replicas_by_format"].values()) == sum(len(layer.replicas) for layer in placement.layers)
    assert all(layer.bound is not None and layer.bound <= layer.predicted + 1e-9 for layer in placement.layers)
    placement.save(tmp_path / "placement.json")
    assert Placement.load(tmp_path / "placement.json").certificate == json.loads(json.dumps(dict(certificate)))


def test_standard_ep_is_the_reference() -> None:
    certificate = Standard().place(problem(recorded(), 4)).certificate
    assert certificate["predicted"] == pytest.approx(certificate["standard"])


def test_few_steps_are_named() -> None:
    certificate = Standard().place(problem(recorded(5), 4)).certificate
    assert certificate["warnings"][0].startswith("calibrated on 5 steps, fewer than 16")
    assert not Standard().place(problem(np.repeat(recorded(1), 24, axis=0), 4)).certificate["warnings"]


def test_a_load_that_drifts_is_named() -> None:
    counts = recorded(32)
    counts[16:] = counts[16:, :, ::-1]
    counts[16:, :, 0] += 3000
    certificate = Standard().place(problem(counts, 4)).certificate
    assert certificate["halves"][1] > certificate["halves"][0]
    assert "drifts" in certificate["warnings"][0]


def test_steps_the_solver_never_saw_tell_of_over_fitting() -> None:
    calm, hot = np.full((1, 1, 8), 100), np.full((1, 1, 8), 100)
    hot[..., 0] = 1996
    seen = [18 * step + 9 for step in range(16)]  # where 16 looks into 288 like steps fall
    counts = np.repeat(calm, 288, axis=0)
    instance = problem(counts, 4)
    even = certify(instance, Standard(), Standard().place(instance).layers, max_steps=16)
    assert even.certificate["unseen"] == {"steps": 16, "predicted": 1.0}
    assert not even.certificate["warnings"]
    counts = np.repeat(hot, 288, axis=0)
    counts[seen] = 337  # as many pairs, evenly
    instance = problem(counts, 4)
    fitted = certify(instance, Standard(), Standard().place(instance).layers, max_steps=16)
    assert fitted.certificate["predicted"] < fitted.certificate["unseen"]["predicted"]
    assert any("over-fitted" in warning for warning in fitted.certificate["warnings"])


def test_no_pairs_and_no_steps_are_balanced() -> None:
    for counts in (np.zeros((3, 2, 8), np.int64), np.zeros((0, 2, 8), np.int64)):
        certificate = make_strategy("rq").place(problem(counts, 4)).certificate
        assert (certificate["predicted"], certificate["bound"], certificate["binding"], certificate["unseen"]) == (
            1.0,
            1.0,
            "mean",
            None,
        )


def test_rules_and_empty_ranks_are_in_the_bound() -> None:
    instance = problem(recorded(), 4, budget=(4000, 4000, 4000, 4000))
    stats = instance.stats
    drained = PlacementProblem(
        stats,
        instance.topology,
        (8000, 8000, 8000, 0),
        instance.formats,
        rules=Rules(forbidden=(Selection(ranks=(3,)),)),
    )
    layers = [
        layer for layer in make_strategy("eplb").place(PlacementProblem(stats, type(instance.topology)(3))).layers
    ]
    certificate = certify(drained, make_strategy("eplb"), layers).certificate
    assert certificate["bound"] >= 4 / 3
