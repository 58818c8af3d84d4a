"""Calibration of the small trained model: laws that must hold, bands that experience gives."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rq_ep.core.errors import UserError
from rq_ep.core.stats import PHASES, ExpertStats
from rq_ep.formats import get_format
from rq_ep.model import tiny
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.model.calibration.forward_stats import DECODE_STEPS
from rq_ep.model.calibration.layer_records import recording
from rq_ep.model.calibration.output_error import output_errors_EQ
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.seam.adapters import ADAPTERS
from rq_ep.model.seam.expert_modules import find_expert_modules
from rq_ep.model.tiny_recipe import FAMILIES, TrainingRecipe

PREFILL, DECODE = (PHASES.index(name) for name in ("prefill", "decode"))


@pytest.fixture(scope="module")
def stats(tiny_checkpoint) -> ExpertStats:
    return calibrate(tiny_checkpoint, tiny_checkpoint / "text" / "train", dtype=torch.float32, max_tokens=16_384)


def test_every_token_is_counted_top_k_times_in_every_layer(stats: ExpertStats) -> None:
    assert stats.counts.shape[1:] == (2, 8)
    assert (stats.counts.sum(axis=2) == 2 * stats.tokens[:, None]).all()
    prefill = stats.phase == PREFILL
    assert stats.tokens[prefill].sum() == stats.num_tokens == 16_384
    assert (stats.counts[prefill].sum(axis=0) == stats.visits).all()


def test_both_phases_and_all_domains_are_recorded(stats: ExpertStats) -> None:
    assert stats.domains == ("c", "code", "prose", "table")
    for phase, tokens in ((PREFILL, 8 * 128), (DECODE, 8)):
        of_phase = stats.phase == phase
        assert set(stats.domain[of_phase]) == {0, 1, 2, 3}
        assert (stats.tokens[of_phase] == tokens).all()
    assert (stats.phase == DECODE).sum() == DECODE_STEPS * (stats.phase == PREFILL).sum() / 2


def test_sizes_and_identity_are_the_checkpoints(stats: ExpertStats, tiny_checkpoint) -> None:
    assert (stats.native_format, stats.formats) == ("bf16", ("bf16", "int8"))
    assert (stats.hidden_size, stats.intermediate_size, stats.top_k, stats.layers) == (64, 32, 2, (0, 1))
    assert stats.model == model_identity(tiny_checkpoint)
    weights = 3 * 64 * 32
    assert 2 * weights <= stats.expert_bytes["bf16"] <= 2 * weights * 1.05
    assert weights < stats.expert_bytes["int8"] <= weights * 1.2


def test_int8_costs_a_little_and_the_native_format_nothing(stats: ExpertStats) -> None:
    assert (stats.error[..., 0] == 0).all()
    assert (stats.error[..., 1] > 1e-4).all()
    assert (stats.error[..., 1] < 0.03).all()


def test_importance_is_not_frequency(stats: ExpertStats) -> None:
    assert (stats.importance[stats.visits > 0] > 0).all()
    assert (stats.gate_mass <= stats.visits + 1e-6).all()
    assert stats.gate_mass.sum(axis=1) == pytest.approx([stats.num_tokens] * 2, rel=1e-5)  # gates sum to one a token
    per_visit = stats.importance / stats.visits.clip(min=1)
    assert (per_visit.max(axis=1) > 1.3 * per_visit.min(axis=1)).all()


def test_popularity_carries_over_to_other_text_of_the_same_domains(stats: ExpertStats) -> None:
    rounds = stats.counts[stats.phase == PREFILL].reshape(-1, 4, 2, 8)  # the domains take turns
    first, second = rounds[::2].sum(axis=(0, 1)), rounds[1::2].sum(axis=(0, 1))
    assert all(np.corrcoef(a, b)[0, 1] >= 0.8 for a, b in zip(first, second, strict=True))


def test_record_survives_the_file(stats: ExpertStats, tmp_path) -> None:
    stats.save(tmp_path / "stats.safetensors")
    again = ExpertStats.load(tmp_path / "stats.safetensors")
    for name in ("counts", "tokens", "phase", "domain", "importance", "visits", "gate_mass", "error"):
        assert np.array_equal(getattr(again, name), getattr(stats, name))
    assert (again.model, again.domains, again.importance_definition) == (
        stats.model, stats.domains, stats.importance_definition,
    )  # fmt: skip


def test_same_text_same_record_also_from_a_model_in_memory(tiny_checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    text = {"d": ["The quick brown fox jumps over the lazy dog. " * 20]}
    first, second = (calibrate(m, text, sequence_length=16, max_tokens=512) for m in (model, tiny_checkpoint))
    assert np.array_equal(first.counts, second.counts)
    assert np.array_equal(first.importance, second.importance)
    assert first.model == second.model
    assert first.native_format == "bf16"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ADAPTERS])
def test_every_family_is_recorded_without_changing_what_it_computes(family: str, tmp_path) -> None:
    recipe = TrainingRecipe(family, steps=2, num_experts=8, num_layers=2, hidden_size=32, intermediate_size=16)
    tiny.tiny_model(tmp_path / "model", recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    modules = [experts.module for experts in find_expert_modules(model)]
    tokens_BT = torch.arange(96).view(3, 32)
    with torch.no_grad():
        plain = model(tokens_BT).logits
        with recording(modules, 8, rows_per_batch=4):
            watched = model(tokens_BT).logits
    torch.testing.assert_close(watched, plain, atol=1e-5, rtol=1e-5)
    stats = calibrate(tmp_path / "model", {"d": ["ab" * 999]}, sequence_length=16, max_tokens=160)
    assert stats.layers == ((1,) if family.startswith("deepseek") else (0, 1))
    assert (stats.counts.sum(axis=2) == 2 * stats.tokens[:, None]).all()
    assert ((stats.error[..., 1] > 0) & (stats.error[..., 1] < 0.05)).all()
    assert (stats.hidden_size, stats.intermediate_size) == (32, 16)


def test_a_small_sample_is_warned_about(tiny_checkpoint, caplog) -> None:
    seen = []
    calibrate(
        tiny_checkpoint, {"d": ["ab" * 999]}, formats=[], sequence_length=16, max_tokens=160,
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )  # fmt: skip
    assert "160 tokens in 10 windows" in caplog.text
    assert seen == [("routing", 1, 2), ("routing", 2, 2), ("formats", 1, 2), ("formats", 2, 2)]


def test_recording_changes_no_result_and_leaves_no_trace(tiny_checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    tokens_BT = torch.arange(96).view(3, 32)
    modules = [experts.module for experts in find_expert_modules(model)]
    with torch.no_grad():
        plain = model(tokens_BT).logits
        with recording(modules, 8, rows_per_batch=4) as records:
            watched = model(tokens_BT).logits
    torch.testing.assert_close(watched, plain, atol=1e-5, rtol=1e-5)
    assert all("forward" not in module.__dict__ for module in modules)
    for record in records:
        assert record.visits_E.sum() == 96 * 2
        for visits, rows in zip(record.visits_E, record.rows, strict=True):
            assert len(torch.cat(rows)) == min(visits, 4) or 2 <= len(torch.cat(rows)) <= 4


def test_importance_is_gate_times_norm_of_the_experts_output() -> None:
    class Doubling(torch.nn.Module):
        """Expert e multiplies by e + 1."""

        def forward(self, hidden_TD, topk_ids_TK, topk_weights_TK):
            return hidden_TD * ((topk_ids_TK + 1) * topk_weights_TK).sum(1, keepdim=True)

    module = Doubling()
    hidden_TD = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    ids_TK, weights_TK = torch.tensor([[0, 2], [2, 2]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    with recording([module], 4, rows_per_batch=8) as (record,):
        out_TD = module(hidden_TD, ids_TK, weights_TK)
    torch.testing.assert_close(out_TD, torch.tensor([[4.5, 6.0], [0.0, 3.0]]))
    assert record.visits_E.tolist() == [1, 0, 3, 0]
    assert record.gate_mass_E.tolist() == pytest.approx([0.75, 0, 1.25, 0])
    assert record.importance_E.tolist() == pytest.approx([0.75 * 5, 0, 0.25 * 15 + 2 * 0.5 * 3, 0])
    assert [len(torch.cat(rows)) for rows in record.rows] == [1, 0, 2, 0]


def test_an_expert_without_inputs_is_measured_on_those_of_the_others(tiny_checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    experts = find_expert_modules(model)[0]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 64, generator=generator) for n in (5, 0, 9, 4, 4, 4, 4, 4)]
    formats = [get_format("fp32"), get_format("fp16"), get_format("int8")]
    error_EQ = output_errors_EQ(experts, experts.family, rows, formats)
    assert (error_EQ[:, 0] == 0).all()
    assert (error_EQ[:, 1] < 1e-3).all()
    assert ((error_EQ[:, 2] > 1e-4) & (error_EQ[:, 2] < 0.05)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"formats": ["bf16", "int9"]}, "did you mean 'int8'"), ({"sequence_length": 513}, "at most 512 tokens")],
)
def test_unsupported_settings_are_refused(tiny_checkpoint, settings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibrate(tiny_checkpoint, {"d": ["text " * 1000]}, **settings)


def test_missing_checkpoint_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        calibrate(tmp_path / "nowhere", {"d": ["text"]})
