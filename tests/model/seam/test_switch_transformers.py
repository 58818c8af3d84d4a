"""Switch Transformers: what its MoE layers compute, and which tokens they drop, survives being spread over ranks."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from rq_ep.core.errors import UserError
from rq_ep.core.stats import PHASES
from rq_ep.engine.servable import choose_cache
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.model.calibration.forward_stats import DECODE_STEPS
from rq_ep.model.evaluation.evaluate import Candidate, compare
from rq_ep.model.load.load_model import load
from rq_ep.model.seam import switch_transformers as switch
from rq_ep.model.seam.expert_modules import family_of, find_expert_modules
from rq_ep.model.text.byte_tokenizer import byte_tokenizer
from rq_ep.moe import Telemetry
from rq_ep.parallel import run_local
from rq_ep.placing.place import place
from rq_ep.strategies import NATIVE_STRATEGIES, make_strategy
from tests.model.families import SWITCH, logits, prompt, random_model, save

pytestmark = pytest.mark.slow

TOKENS = prompt(3, 24)
LAYERS = (1, 3, 4, 5)  # one of three in the encoder; in the decoder, counted on, all


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(SWITCH), tmp_path_factory.mktemp("switch") / "model")


def kept_tokens(model: PreTrainedModel, tokens_BT: torch.Tensor) -> np.ndarray:
    """[L, E] tokens that each expert of transformers' own model computes."""
    masks: list[torch.Tensor] = []
    routers = [module for name, module in model.named_modules() if name.endswith("router")]
    handles = [router.register_forward_hook(lambda module, args, out: masks.append(out[0])) for router in routers]
    logits(model, tokens_BT)
    for handle in handles:
        handle.remove()
    return np.stack([mask.flatten(0, 1).sum(0).numpy() for mask in masks])


def test_capacity_drops_tokens_of_the_test_model() -> None:
    kept = kept_tokens(random_model(SWITCH), TOKENS).sum(axis=1)
    assert (kept < [36, 39, 39, 39]).all()
    assert (kept > 0).all()


def test_rebuilt_layers_compute_the_same() -> None:
    model = random_model(SWITCH)
    expected = logits(model, TOKENS)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    switch.adapt(model)
    torch.testing.assert_close(logits(model, TOKENS), expected, atol=1e-6, rtol=1e-6)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    modules = find_expert_modules(model)
    assert tuple(experts.layer_index for experts in modules) == LAYERS
    assert modules[1].name == "decoder.block.0.layer.2.mlp.experts"
    family = family_of(modules[0].module)
    assert dict(family.layout.shapes) == {"up_proj": (48, 64), "down_proj": (64, 48)}
    assert torch.equal(family.apply_gate(torch.tensor([-1.0, 3.0])), torch.tensor([0.0, 3.0]))


@pytest.mark.parametrize("strategy", NATIVE_STRATEGIES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])  # at last more than experts
def test_every_strategy_equals_the_dense_model(checkpoint: Path, strategy: str, num_ranks: int) -> None:
    dense, telemetry = random_model(SWITCH), Telemetry()
    expected = logits(dense, TOKENS)
    model = load(checkpoint, strategy=strategy, num_local_ranks=num_ranks, device="cpu", telemetry=telemetry)
    error = (logits(model, TOKENS) - expected).abs().max()
    assert error < 1e-5 * expected.abs().max()
    assert telemetry.layers == LAYERS
    assert np.array_equal(telemetry.counts()[0], kept_tokens(dense, TOKENS))


def test_generate_equals_the_dense_model(checkpoint: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    expected = random_model(SWITCH).generate(TOKENS, **options)
    for num_ranks in (2, 3):
        model = load(checkpoint, strategy="rq", num_local_ranks=num_ranks, device="cpu")
        assert torch.equal(model.generate(TOKENS, **options), expected)


def test_bf16_is_exact_when_computed_in_fp32(tmp_path: Path) -> None:
    path = save(random_model(SWITCH).bfloat16(), tmp_path / "model")
    dense = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32)
    model = load(path, num_local_ranks=2, dtype="float32", device="cpu")
    torch.testing.assert_close(logits(model, TOKENS), logits(dense, TOKENS), atol=1e-5, rtol=1e-5)
    both = load(path, num_local_ranks=2, device="cpu"), AutoModelForSeq2SeqLM.from_pretrained(path)
    assert {model.dtype for model in both} == {torch.bfloat16}
    ours, theirs = (logits(model, TOKENS).float() for model in both)
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_a_rank_reads_and_holds_its_own_experts(checkpoint: Path) -> None:
    dense = random_model(SWITCH)
    all_experts = sum(tensor.nbytes for name, tensor in dense.named_parameters() if ".expert_" in name)
    stored = sum(tensor.nbytes for tensor in dense.parameters())  # tied ones once, as in the file
    reports = run_local(3, lambda group: load(checkpoint, group=group).rq_ep)
    read = [report.bytes_read - (stored - all_experts) for report in reports]
    assert sum(read) == all_experts
    assert read == pytest.approx(list(reports[0].placement.bytes_R), rel=0.01)  # seals, padding


def test_a_missing_expert_is_named(checkpoint: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    del tensors["decoder.block.1.layer.2.mlp.experts.expert_3.wo.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"expert 3 of decoder\.block\.1\.layer\.2\.mlp\.experts\.down_proj"):
        load(path, num_local_ranks=2, device="cpu")


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that has a tokenizer."""
    path = tmp_path_factory.mktemp("switch") / "complete"
    config = type(SWITCH)(**{**SWITCH.to_dict(), "vocab_size": 260})
    byte_tokenizer(512).save_pretrained(save(random_model(config), path))
    return path


TEXT = {"letters": ["The quick brown fox jumps over the lazy dog. " * 40], "digits": ["0123456789" * 200]}


def test_calibration_counts_what_is_computed(complete: Path) -> None:
    stats = calibrate(complete, TEXT, sequence_length=24, max_tokens=24 * 16, batch_size=4, dtype=torch.float32)
    assert (stats.layers, stats.top_k, stats.hidden_size, stats.intermediate_size) == (LAYERS, 1, 64, 48)
    counts = stats.counts.sum(axis=2)
    decode = stats.phase == PHASES.index("decode")
    assert decode.sum() == DECODE_STEPS * (~decode).sum() / 2
    assert (counts[decode] == [0, 4, 4, 4]).all()  # the encoder is done, and no token that comes alone is dropped
    assert (counts[~decode] < [4 * 12, *[4 * 13] * 3]).all()
    assert (counts[~decode] > 0).all()
    assert (stats.counts.sum(axis=0) == stats.visits).all()
    assert ((stats.error[..., 1] > 0) & (stats.error[..., 1] < 0.05)).all()
    settings = {"sequence_length": 24, "max_tokens": 24 * 16, "batch_size": 4, "dtype": torch.float32}
    for spread in run_local(2, lambda group: calibrate(complete, TEXT, group=group, **settings)):
        assert np.array_equal(spread.counts, stats.counts)
        assert np.allclose(spread.error, stats.error)


def test_placements_are_evaluated_against_the_dense_model(complete: Path) -> None:
    settings = {"sequence_length": 24, "max_tokens": 24 * 16}
    stats = calibrate(complete, TEXT, **settings)
    candidates = [Candidate(name, make_strategy(name)) for name in NATIVE_STRATEGIES]
    candidates.append(Candidate("placed", make_strategy("rq"), place(stats, 3, max_low_precision_share=0)))
    for name in ("rq", "rq_paper"):
        placement = place(stats, 3, strategy=name, max_low_precision_share=0.3)
        candidates.append(Candidate(f"int8 {name}", make_strategy(name), placement))
    for row in compare(complete, TEXT, candidates, num_ranks=3, **settings):
        assert row.num_tokens == 16 * 12
        assert row.imbalance_worst <= 3
        if row.label.startswith("int8"):
            assert 1e-9 < row.kl.mean < 0.01
        else:
            assert abs(row.kl.mean) < 1e-8
            assert row.agreement.mean == 1


def test_a_window_that_cannot_be_halved_is_refused(complete: Path) -> None:
    with pytest.raises(UserError, match="--sequence-length 1"):
        calibrate(complete, TEXT, sequence_length=1)


def test_serving_it_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="'switch_transformers' is an encoder-decoder, which cannot be served"):
        choose_cache(SWITCH)
