"""How much experts matter: laws and hand-made cases of every definition."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rq_ep.core.errors import UserError
from rq_ep.core.stats import ExpertStats
from rq_ep.formats import ExpertLayout, get_format
from rq_ep.model.calibration.calibrate import calibrate
from rq_ep.model.calibration.divergence import KLDivergence, kl_when_dropped_LE, kl_when_quantized_LEQ
from rq_ep.model.calibration.importance import wanda_E
from rq_ep.model.calibration.stability import ranking_agreement
from rq_ep.model.seam.expert_modules import ExpertsModule, family_of, find_expert_modules
from rq_ep.model.text.windows import WindowBatch
from rq_ep.moe.expert_family import ExpertFamily


@pytest.fixture(scope="module")
def network(tiny_checkpoint):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def batches(tiny_checkpoint) -> list[WindowBatch]:
    text = next((tiny_checkpoint / "text" / "held-out").rglob("*.txt")).read_bytes()[: 8 * 64]
    return [WindowBatch(torch.tensor(list(text)).view(8, 64), 0)]


def test_an_unchanged_model_does_not_diverge(network, batches) -> None:
    assert KLDivergence(network, batches).measure() == pytest.approx(0, abs=1e-9)


def test_dropping_any_expert_costs_something_and_leaves_the_model_whole(network, batches) -> None:
    experts = find_expert_modules(network)
    divergence = KLDivergence(network, batches)
    asked = []
    lost_LE = kl_when_dropped_LE(divergence, experts, lambda: asked.append(1))
    assert lost_LE.shape == (2, 8)
    assert len(asked) == 16
    assert (lost_LE >= 0).all()
    assert lost_LE.max() > 1e-3
    assert divergence.measure() == pytest.approx(0, abs=1e-9)


def test_fewer_bits_cost_more_and_the_weights_come_back(network, batches) -> None:
    experts = find_expert_modules(network)
    before = [parameter.clone() for layer in experts for parameter in layer.module.parameters()]
    formats = [get_format(name) for name in ("fp32", "bf16", "int8")]
    lost_LEQ = kl_when_quantized_LEQ(
        KLDivergence(network, batches), experts, family_of(experts[0].module).layout, formats
    )
    after = [parameter for layer in experts for parameter in layer.module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert np.allclose(lost_LEQ[..., 0], 0, atol=1e-9)
    assert lost_LEQ[..., 2].mean() > 1e-8
    assert lost_LEQ[..., 2].mean() < kl_when_dropped_LE(KLDivergence(network, batches), experts).mean() / 10


def test_wanda_of_a_hand_made_expert() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = torch.nn.Parameter(torch.tensor([[[1.0, -2.0]], [[5.0, 5.0]]]))  # [E, F, D]
            self.down_proj = torch.nn.Parameter(torch.tensor([[[3.0], [-1.0]], [[5.0], [5.0]]]))  # [E, D, F]

    layout = ExpertLayout({"up_proj": (1, 2), "down_proj": (2, 1)})
    rows = [torch.tensor([[3.0, 0.0], [4.0, 1.0]]), torch.zeros(0, 2)]
    score = 1 * 5 + 2 * 1 + (3 + 1) * np.hypot(3, 4 - 2)  # |W| x norms of the inputs; the first matrix gives 3 and 2
    experts = ExpertsModule(0, "experts", Experts())
    found_E = wanda_E(experts, ExpertFamily(layout, lambda x: x), rows, np.array([8, 0]))
    assert found_E.tolist() == pytest.approx([score * 2, 0])  # two of eight inputs were kept


@pytest.mark.parametrize("name", ["output", "gate-mass", "load", "wanda", "drop"])
def test_every_definition_goes_into_the_statistics(name: str, network, tiny_checkpoint, tmp_path) -> None:
    text = tiny_checkpoint / "text" / "held-out"
    settings = {"sequence_length": 32, "max_tokens": 1024, "sensitivity_tokens": 256, "formats": ["int8"]}
    stats = calibrate(network, text, importance=name, measure_kl=name == "drop", **settings)
    assert stats.importance.shape == (2, 8)
    assert (stats.importance[stats.visits > 100] > 0).all()
    assert (stats.kl is not None) == (name == "drop")
    if name == "load":
        assert np.array_equal(stats.importance, stats.visits)
    stats.save(tmp_path / "stats.safetensors")
    again = ExpertStats.load(tmp_path / "stats.safetensors")
    assert again.importance_definition == stats.importance_definition
    if stats.kl is not None:
        assert np.array_equal(again.kl, stats.kl)
        assert (stats.kl[..., stats.formats.index(stats.native_format)] == 0).all()


def test_unknown_definitions_and_undefined_outputs_are_refused(tiny_checkpoint) -> None:
    with pytest.raises(UserError, match="did you mean 'output'"):
        calibrate(tiny_checkpoint, {"d": ["text " * 1000]}, importance="outputs")
    broken = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    find_expert_modules(broken)[1].module.down_proj.data[5, 0, 0] = torch.inf
    with pytest.raises(UserError, match="layer 1: expert 5 gives infinite or undefined outputs"):
        calibrate(broken, {"d": ["The quick brown fox. " * 200]}, max_tokens=2048)


def test_ranking_agreement_of_hand_made_steps() -> None:
    steady = np.array([[[3, 2, 1]], [[6, 4, 2]], [[9, 5, 1]], [[4, 3, 2]]])
    domain_S = np.array([0, 1, 0, 1])
    assert ranking_agreement(steady, domain_S) == pytest.approx(1)
    turned = steady.copy()
    turned[2:] = turned[2:, :, ::-1]
    assert ranking_agreement(turned, domain_S) == pytest.approx(-1)
    assert ranking_agreement(steady[:1], domain_S[:1]) is None
    assert ranking_agreement(np.ones((4, 1, 3), np.int64), domain_S) is None
