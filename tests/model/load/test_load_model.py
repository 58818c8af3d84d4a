from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from rq_ep.core.errors import UserError
from rq_ep.core.placement import Placement, bytes_by_rank
from rq_ep.core.stats import ExpertStats, ModelIdentity
from rq_ep.formats import get_format
from rq_ep.model.checkpoint.model_identity import model_identity
from rq_ep.model.load import memory
from rq_ep.model.load.load_model import load
from rq_ep.model.seam.expert_modules import family_of, find_expert_modules
from rq_ep.moe import Telemetry
from rq_ep.parallel import run_local, single_group
from rq_ep.placing.place import place
from rq_ep.strategies import NATIVE_STRATEGIES, make_strategy
from tests.model.families import FAMILIES, prompt, random_model, save


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("checkpoints")
    return {family: save(random_model(config), directory / family) for family, config in FAMILIES.items()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(prompt(2, 9)).logits


def skewed_placement(
    path: Path, family: str, formats: tuple[str, ...], num_ranks: int, spare_experts: int
) -> Placement:
    """A placement with replicas of the busy experts and, where formats allow, low bits for some."""
    model = random_model(FAMILIES[family])
    experts = find_expert_modules(model)
    layout = family_of(experts[0].module).layout
    num_experts = experts[0].num_experts
    loads_E = np.arange(1, num_experts + 1) ** 3
    stats = ExpertStats(
        counts=np.tile(loads_E, (4, len(experts), 1)).astype(np.int64),
        formats=formats,
        native_format=formats[0],
        expert_bytes={name: get_format(name).nbytes(layout) for name in formats},
        error=np.full((len(experts), num_experts, len(formats)), 1e-3),
        model=model_identity(path),
        layers=tuple(module.layer_index for module in experts),
    )
    budget = (-(-num_experts // num_ranks) + spare_experts) * len(experts) * stats.expert_bytes[formats[0]]
    return place(stats, num_ranks, budget, strategy="rq", max_low_precision_share=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_strategy_equals_the_dense_model(family: str, checkpoints: dict[str, Path]) -> None:
    expected = logits(random_model(FAMILIES[family]))
    for strategy in NATIVE_STRATEGIES:
        for num_ranks in (1, 2, 3):
            model = load(
                checkpoints[family], strategy=strategy, num_local_ranks=num_ranks, device="cpu",
                attn_implementation="eager",
            )  # fmt: skip
            error = (logits(model) - expected).abs().max()
            assert error < 1e-5 * expected.abs().max(), f"{strategy} on {num_ranks} ranks"


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_replicated_experts_equal_the_dense_model(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    placement = skewed_placement(checkpoints[family], family, ("fp32",), 3, spare_experts=1)
    assert any(len(layer.replicas) > layer.num_experts for layer in placement.layers)
    placement.save(tmp_path / "placement.json")
    telemetry = Telemetry()
    model = load(
        checkpoints[family], tmp_path / "placement.json", num_local_ranks=3, device="cpu",
        attn_implementation="eager", telemetry=telemetry,
    )  # fmt: skip
    torch.testing.assert_close(logits(model), logits(random_model(FAMILIES[family])), atol=1e-5, rtol=1e-5)
    assert model.rq_ep.strategy.name == "rq"
    assert telemetry.layers == tuple(layer.index for layer in placement.layers)


def test_a_machine_lets_strategies_weigh_transfers(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["mixtral"]
    auto = make_strategy("llep", min_tokens_per_gemm="auto", fallback_ratio="auto")
    with pytest.raises(UserError, match="auto"):
        load(path, strategy=auto, num_local_ranks=2)
    expected = logits(AutoModelForCausalLM.from_pretrained(path))
    for strategy in (auto, make_strategy("rq_llep"), make_strategy("rq")):
        actual = logits(load(path, strategy=strategy, num_local_ranks=2, machine="h200"))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    with pytest.raises(UserError, match="did you mean 'h200'"):
        load(path, num_local_ranks=2, machine="h2000")


def test_formats_are_those_of_the_placement(checkpoints: dict[str, Path]) -> None:
    native = skewed_placement(checkpoints["mixtral"], "mixtral", ("fp32", "int8"), 2, spare_experts=0)
    layout = family_of(find_expert_modules(random_model(FAMILIES["mixtral"]))[0].module).layout
    sizes = {name: get_format(name).nbytes(layout) for name in ("fp32", "int8")}
    layers = tuple(
        replace(layer, replicas=replace(layer.replicas, formats_P=tuple(
            "int8" if expert % 2 else "fp32" for expert in layer.replicas.experts_P.tolist()
        )))
        for layer in native.layers
    )  # fmt: skip
    placement = replace(native, layers=layers, bytes_R=tuple(bytes_by_rank(layers, 2, sizes).tolist()))
    model = load(checkpoints["mixtral"], placement, num_local_ranks=2, device="cpu")
    dense = random_model(FAMILIES["mixtral"])
    relative = (logits(model) - logits(dense)).norm() / logits(dense).norm()
    assert 1e-4 < relative < 0.05
    assert set(model.rq_ep.expert_bytes) == {"fp32", "int8"}
    assert sum(model.rq_ep.expert_bytes.values()) == sum(placement.bytes_R)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_generate_equals_the_dense_model(family: str, checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints[family], num_local_ranks=2, device="cpu", attn_implementation="eager")
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    expected = random_model(FAMILIES[family]).generate(prompt(2, 5), **options)
    assert torch.equal(model.generate(prompt(2, 5), **options), expected)


def test_shards_equal_the_single_file(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    sharded = save(random_model(FAMILIES["olmoe"]), tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    one, many = (load(path, num_local_ranks=2, device="cpu") for path in (checkpoints["olmoe"], sharded))
    assert torch.equal(logits(one), logits(many))
    assert one.rq_ep.bytes_read == many.rq_ep.bytes_read


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_rank_reads_and_holds_its_own_experts(family: str, checkpoints: dict[str, Path]) -> None:
    dense = random_model(FAMILIES[family]).state_dict()
    all_experts = sum(tensor.nbytes for name, tensor in dense.items() if ".mlp.experts." in name)
    others = sum(tensor.nbytes for tensor in dense.values()) - all_experts
    reports = run_local(4, lambda group: load(checkpoints[family], group=group, attn_implementation="eager").rq_ep)
    placement = reports[0].placement
    for rank, report in enumerate(reports):
        held = sum(bank.nbytes for bank in (layer.bank for layer in report.layers))
        assert held == sum(report.expert_bytes.values()) == placement.bytes_R[rank]
        assert report.bytes_read - others == pytest.approx(placement.bytes_R[rank], rel=0.01)  # seals, padding
        assert report.bytes_read - others <= all_experts * 0.41  # two of five experts
    assert sum(report.bytes_read - others for report in reports) == all_experts


def test_a_rank_that_joins_later_reads_no_experts_and_adds_nothing_until_then(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["mixtral"]

    def loaded(group: Any) -> Any:
        return load(path, group=group, joins_later=True, movable_formats=["fp32"], keeps_stacks=True).rq_ep

    for report in run_local(2, loaded):
        assert (report.expert_bytes, report.rank_bytes.arriving > 0) == ({}, True)
        for layer in report.layers:
            assert (layer.bank.experts, layer.bank.is_stacked) == ((), True)
            hidden_TD = torch.ones(3, layer.family.hidden_size)
            out_TD = layer(hidden_TD, torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))  # asks nobody
            assert torch.equal(out_TD, torch.zeros_like(hidden_TD))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    config = type(FAMILIES["qwen3_moe"])(**{**FAMILIES["qwen3_moe"].to_dict(), "tie_word_embeddings": True})
    dense = random_model(config)
    path = save(dense, tmp_path / "tied")
    model = load(path, num_local_ranks=2, device="cpu", attn_implementation="eager")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def bf16_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("bf16")
    families = ("olmoe", "deepseek_v3")
    return {family: save(random_model(FAMILIES[family]).bfloat16(), directory / family) for family in families}


def test_a_bf16_checkpoint_served_in_fp32_is_exact(bf16_checkpoints: dict[str, Path]) -> None:
    path = bf16_checkpoints["olmoe"]
    expected = logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    placement = skewed_placement(path, "olmoe", ("bf16",), 2, spare_experts=1)
    for chosen, name in ((None, "fp32"), (placement, "bf16")):
        model = load(path, chosen, num_local_ranks=2, dtype="float32", device="cpu")
        assert list(model.rq_ep.expert_bytes) == [name]
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_dtypes_are_those_transformers_chooses(bf16_checkpoints: dict[str, Path]) -> None:
    path = bf16_checkpoints["deepseek_v3"]
    model = load(path, num_local_ranks=2, device="cpu")
    dense = AutoModelForCausalLM.from_pretrained(path)
    expected = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp.experts." not in name}
    state = model.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16, torch.float32}  # router corrections
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert list(model.rq_ep.expert_bytes) == ["bf16"]
    torch.testing.assert_close(logits(model).float(), logits(dense).float(), atol=0.15, rtol=0.05)


def test_a_loaded_model_is_ready_to_serve(tmp_path: Path) -> None:
    dense = random_model(FAMILIES["mixtral"])
    dense.generation_config.max_new_tokens = 7
    model = load(save(dense, tmp_path / "model"), device="cpu")  # this process alone, no launcher
    assert model.generation_config.max_new_tokens == 7
    assert not model.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    assert [layer.placement.index for layer in model.rq_ep.layers] == [0, 1]
    assert model.rq_ep.placement.strategy == "standard"
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-5)


def test_a_placement_for_others_is_refused_with_both_values(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["mixtral"]
    placement = skewed_placement(path, "mixtral", ("fp32",), 2, spare_experts=1)
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"placement": placement, "num_local_ranks": 3}, "is for 2 ranks, but 3 were started"),
        ({"placement": replace(placement, model=ModelIdentity("other", "f" * 64))}, r"'other' \(f{12}\), not for 'mix"),
        ({"placement": replace(placement, layers=placement.layers[:1])}, "MoE layers 0 of 5 .* has MoE layers 0, 1 of"),
        ({"placement": placement, "strategy": "standard"}, "'standard' serves one replica of each expert"),
        ({"strategy": "reqplicate"}, "unknown strategy 'reqplicate'"),
        ({"dtype": "float64"}, "dtype float64"),
        ({"dtype": "half-ish"}, "dtype 'half-ish': choose from"),
        ({"num_local_ranks": 0}, "num_local_ranks 0"),
        ({"attn_implementation": "no_such"}, "transformers refuses it .*no_such"),
    ]
    for arguments, message in refusals:
        with pytest.raises(UserError, match=message):
            load(path, **{"num_local_ranks": 2, "device": "cpu", **arguments})


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2,
        num_hidden_layers=1,
    )  # fmt: skip
    with pytest.raises(UserError, match=f"{tmp_path}.*: model_type 'qwen2' cannot be served: this model is dense"):
        load(save(AutoModelForCausalLM.from_config(config), tmp_path / "dense"), device="cpu")


def test_weights_that_do_not_fit_are_refused_with_the_numbers(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**18)
    with pytest.raises(UserError, match=r"rank 0 needs 0\.000\d+ GiB: .* of experts\), .* but cpu has 0\.000244 GiB"):
        load(checkpoints["mixtral"], num_local_ranks=2, device="cpu")


def test_rows_and_borrowed_experts_are_counted_before_loading(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lend = make_strategy("rq_llep", max_borrowed=1, transient_format="int8")
    layout = family_of(find_expert_modules(random_model(FAMILIES["mixtral"]))[0].module).layout
    size, low = (get_format(name).nbytes(layout) for name in ("fp32", "int8"))
    path, settings = checkpoints["mixtral"], {"num_local_ranks": 2, "device": "cpu"}
    report = load(path, strategy=lend, max_tokens=64, **settings).rq_ep
    assert (report.rank_bytes.borrowed, report.rank_bytes.repacked) == (size, 4 * low * len(report.layers))
    assert report.layers[0].banks[0].borrow_buffers.max_bytes == size
    assert report.layers[0].banks[1].borrow_buffers is report.layers[1].banks[1].borrow_buffers
    assert [report.layers[0].banks[0].borrow_buffers.is_last(number) for number in range(2)] == [False, True]
    few = load(path, strategy=lend, max_tokens=64, max_dispatch_bytes=1024, **settings).rq_ep
    assert 0 < few.rank_bytes.step < report.rank_bytes.step
    assert load(path, strategy="llep", **settings).rq_ep.rank_bytes.borrowed == 3 * size, "all of rank 0"
    assert load(path, strategy=make_strategy("llep", max_borrowed=1), **settings).rq_ep.rank_bytes.borrowed == size
    movable = load(path, strategy="llep", movable_formats=["fp32"], **settings).rq_ep
    num_experts = movable.layers[0].placement.num_experts
    assert movable.rank_bytes.borrowed == num_experts * size, "all experts may leave a rank"
    assert not any(bank.is_stacked for layer in movable.layers for bank in layer.banks)
    arriving = {"movable_formats": ["int8"], "room_bytes": 3 * size}
    free = replace(movable.placement, budget_bytes_R=tuple(2 * size + held for held in movable.placement.bytes_R))
    assert load(path, free, "rq", **settings, **arriving).rq_ep.rank_bytes.arriving == 2 * 5 * size, "budget and room"
    with monkeypatch.context() as patched:
        full = load(path, strategy="rq", **settings, **arriving).rq_ep.rank_bytes
        assert full.arriving == 2 * 3 * size
        patched.setattr(memory, "available_bytes", lambda device: full.total - 1)
        with pytest.raises(UserError, match=r"GiB for experts that arrive, .* or lower --rebalance-room$"):
            load(path, strategy="rq", **settings, **arriving)
        load(path, strategy="rq", **settings, **arriving | {"room_bytes": 2 * size})
    assert str(load(path, **settings).rq_ep.rank_bytes).endswith("0 GiB to borrow, steps of unknown size")
    monkeypatch.setattr(memory, "available_bytes", lambda device: report.rank_bytes.total - 1)
    with pytest.raises(UserError, match=r"for the largest step; but cpu has .*--max-num-batched-tokens or --max-dis"):
        load(path, strategy=lend, max_tokens=64, **settings)
    with pytest.raises(UserError, match="max_tokens 0"):
        load(path, max_tokens=0, **settings)


def test_available_memory_is_known_for_this_machine() -> None:
    assert (memory.available_bytes(torch.device("cpu")) or 0) > 2**28


def test_one_rank_with_a_problem_stops_all(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def problem(group: Any) -> str:
        with pytest.raises(UserError) as raised:
            load(checkpoints["olmoe"] if group.rank != 1 else tmp_path / "nothing", group=group)
        return str(raised.value)

    problems = run_local(3, problem)
    assert len(set(problems)) == 1
    assert problems[0].startswith("rank 1: ")
    assert "no such directory" in problems[0]


def test_a_group_and_its_device_are_not_contradicted(checkpoints: dict[str, Path]) -> None:
    group = single_group("cpu")
    with pytest.raises(UserError, match="num_local_ranks 2: give it or a group, not both"):
        load(checkpoints["olmoe"], group=group, num_local_ranks=2)
    with pytest.raises(UserError, match="device 'cuda': the group's tensors live on cpu"):
        load(checkpoints["olmoe"], group=group, device="cuda")
