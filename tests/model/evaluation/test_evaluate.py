"""The comparison on the small trained model: full precision must be exact, int8 must be close, loads must add up."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement, bytes_by_rank
from rq_ep.core.stats import ExpertStats, ModelIdentity
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.model.evaluation.candidate import Candidate
from rq_ep.model.evaluation.evaluate import compare
from rq_ep.model.evaluation.evaluation_result import Evaluation
from rq_ep.model.evaluation.quality import Estimate, Quality, routing_shift
from rq_ep.placing.place import place
from rq_ep.strategies import STRATEGIES, make_strategy

NUM_RANKS = 4


@pytest.fixture(scope="module")
def placements(tiny_checkpoint: Path) -> dict[str, Placement]:
    stats = calibrate(tiny_checkpoint, tiny_checkpoint / "text" / "train", max_tokens=16_384)
    return {
        "rq": place(stats, NUM_RANKS, max_low_precision_share=0.25),
        "all int8": in_format(place(stats, NUM_RANKS, formats=["bf16"], strategy="standard"), "int8", stats),
        "rq native": place(stats, NUM_RANKS, budget=None, formats=["bf16"], num_redundant_experts=4, strategy="eplb"),
    }


def in_format(placement: Placement, name: str, stats: ExpertStats) -> Placement:
    """The same replicas, all of them in another format."""
    layers = tuple(
        replace(layer, replicas=replace(layer.replicas, formats_P=(name,) * len(layer.replicas)))
        for layer in placement.layers
    )
    bytes_R = bytes_by_rank(layers, NUM_RANKS, stats.expert_bytes).tolist()
    return replace(placement, layers=layers, bytes_R=tuple(bytes_R))


@pytest.fixture(scope="module")
def rows(tiny_checkpoint: Path, placements: dict[str, Placement]) -> dict[str, Evaluation]:
    candidates = [
        Candidate("standard", make_strategy("standard")),
        Candidate("eplb", make_strategy("eplb"), placements["rq native"]),
        Candidate("llep", make_strategy("llep", min_tokens_per_gemm=16, fallback_ratio=1.05)),
        Candidate("rq alone", make_strategy("rq")),
        Candidate("rq", make_strategy("rq"), placements["rq"]),
        Candidate("all int8", make_strategy("standard"), placements["all int8"]),
    ]
    text = tiny_checkpoint / "text" / "held-out"
    evaluations = compare(tiny_checkpoint, text, candidates, num_ranks=NUM_RANKS, max_tokens=8192)
    return {row.label: row for row in evaluations}


def test_rows_come_in_order_and_count_predicted_tokens(rows: dict[str, Evaluation]) -> None:
    assert list(rows) == ["standard", "eplb", "llep", "rq alone", "rq", "all int8"]
    assert {row.num_tokens for row in rows.values()} == {64 * 127}


@pytest.mark.parametrize("label", ["standard", "eplb", "llep", "rq alone"])
def test_full_precision_equals_the_dense_model(rows: dict[str, Evaluation], label: str) -> None:
    row = rows[label]
    assert abs(row.kl.mean) < 1e-8
    assert row.agreement.mean == 1
    assert row.perplexity.mean == pytest.approx(row.dense.perplexity.mean, rel=1e-5)


def test_int8_is_close_to_the_dense_model(rows: dict[str, Evaluation], placements: dict[str, Placement]) -> None:
    assert "int8" in placements["rq"].formats
    row = rows["rq"]
    assert 1e-8 < row.kl.mean <= 5e-4
    assert 0 < row.kl.error < row.kl.mean
    assert row.agreement.mean >= 0.995
    assert row.perplexity.mean == pytest.approx(row.dense.perplexity.mean, rel=2e-3)


def test_perplexity_is_that_of_a_trained_byte_model(rows: dict[str, Evaluation]) -> None:
    dense = rows["standard"].dense.perplexity
    assert 2 < dense.mean < 20
    assert 0 < dense.error < 0.2 * dense.mean


def test_loads_and_times_are_consistent(rows: dict[str, Evaluation]) -> None:
    for row in rows.values():
        assert 1 <= row.imbalance_mean <= row.imbalance_worst <= NUM_RANKS
        assert row.sorted_loads_R.mean() == pytest.approx(1)
        assert row.sorted_loads_R[0] == pytest.approx(row.imbalance_mean)
        assert 0 < row.compute_s_p50 <= row.compute_s_p99
    assert rows["rq"].imbalance_mean < rows["standard"].imbalance_mean


def test_bytes_are_those_of_the_placement(rows: dict[str, Evaluation], placements: dict[str, Placement]) -> None:
    assert rows["rq"].bytes_R == placements["rq"].bytes_R
    assert max(rows["rq"].bytes_R) <= max(rows["standard"].bytes_R)


def test_only_llep_moves_experts_and_needs_buffers_for_them(rows: dict[str, Evaluation]) -> None:
    assert max(rows["llep"].bytes_R) > max(rows["standard"].bytes_R)
    assert [label for label, row in rows.items() if row.transfer_bytes > 0] == ["llep"]


def test_plain_values_for_json(rows: dict[str, Evaluation]) -> None:
    values = rows["rq"].as_dict()
    assert values["kl"]["mean"] == rows["rq"].kl.mean
    assert len(values["sorted_loads_R"]) == len(values["bytes_R"]) == NUM_RANKS


def test_one_candidate_alone_gets_the_same_figures(tiny_checkpoint: Path, rows: dict[str, Evaluation]) -> None:
    (row,) = compare(
        tiny_checkpoint, tiny_checkpoint / "text" / "held-out", [Candidate("standard", STRATEGIES["standard"]())],
        num_ranks=NUM_RANKS, max_tokens=8192, noise_floor=False, greedy_tokens=0,
    )  # fmt: skip
    assert row.dense.bf16_kl is None
    assert row.greedy_match is None
    assert row.imbalance_mean == rows["standard"].imbalance_mean
    assert row.dense.perplexity == rows["standard"].dense.perplexity


def test_placement_for_something_else_is_refused(tiny_checkpoint: Path, placements: dict[str, Placement]) -> None:
    text, rq = {"d": ["text " * 1000]}, make_strategy("rq")
    with pytest.raises(UserError, match=r"4 ranks, but 3 were started"):
        compare(tiny_checkpoint, text, [Candidate("rq", rq, placements["rq"])], num_ranks=3)
    foreign = replace(placements["rq"], model=ModelIdentity("another", "0" * 64))
    with pytest.raises(UserError, match="made for model 'another'"):
        compare(tiny_checkpoint, text, [Candidate("rq", rq, foreign)], num_ranks=NUM_RANKS)


def test_quality_of_logits_made_by_hand() -> None:
    tokens_BT = torch.tensor([[0, 1, 1]])
    dense_BTV = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [1.0, 1.0]]]).log()
    other_BTV = torch.tensor([[[0.5, 0.5], [0.75, 0.25], [9.0, 1.0]]]).log()  # the last position predicts nothing
    quality = Quality()
    quality.add(dense_BTV, other_BTV, tokens_BT)
    kl = 0.25 * np.log(0.25 / 0.75) + 0.75 * np.log(0.75 / 0.25)
    assert quality.kl == pytest.approx([kl / 2])
    assert quality.nll == pytest.approx([-(np.log(0.5) + np.log(0.25)) / 2])
    assert quality.agreement == [0.5]


def test_standard_error_is_that_of_the_mean_over_windows() -> None:
    estimate = Estimate.of([1.0, 2.0, 3.0])
    assert (estimate.mean, estimate.error) == pytest.approx((2, 1 / np.sqrt(3)))
    assert (estimate.exp().mean, estimate.exp().error) == pytest.approx((np.exp(2), np.exp(2) / np.sqrt(3)))


def test_routing_shift_counts_choices_that_are_missing() -> None:
    dense = [torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])]
    shifted = [torch.tensor([[1, 0], [2, 9], [4, 5], [8, 9]])]
    assert routing_shift(dense, shifted, 2) == [[0.25, 0.5]]
    assert routing_shift(dense, dense, 4) == [[0, 0, 0, 0]]


def test_formats_shift_later_routers_and_native_ones_none(rows: dict[str, Evaluation]) -> None:
    assert [shift.mean for shift in rows["standard"].routing_shift_L] == [0, 0]
    first, second = rows["all int8"].routing_shift_L
    assert first.mean == 0 < second.mean < 0.02


def test_native_formats_continue_a_text_as_the_dense_model_does(rows: dict[str, Evaluation]) -> None:
    for label in ("standard", "eplb", "llep"):
        match = rows[label].greedy_match
        assert match is not None
        assert match.mean == 1
    assert rows["rq"].greedy_match is not None
    assert rows["rq"].greedy_match.mean >= 0.5


def test_noise_floor_is_that_of_bf16(rows: dict[str, Evaluation]) -> None:
    dense = rows["standard"].dense
    assert dense.bf16_kl is not None
    assert dense.bf16_agreement is not None
    assert 1e-7 < dense.bf16_kl.mean < 1e-3
    assert 0.98 < dense.bf16_agreement.mean < 1
