"""One group of three gloo processes, and two of them as a group of their own, load and run every family."""

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from rq_ep.core.errors import UserError
from rq_ep.model.load.load_model import load
from rq_ep.parallel import TorchGroup
from rq_ep.strategies import NATIVE_STRATEGIES
from tests.forkserver import run_forked
from tests.model.families import FAMILIES, SWITCH, logits, prompt, random_model, save

NUM_PROCESSES = 3
TIMEOUT_S = 120

GENERATING: dict[str, PretrainedConfig] = {**FAMILIES, "switch_transformers": SWITCH}

# The last has more ranks than experts.
MODELS: dict[str, PretrainedConfig] = {
    **GENERATING,
    "two_experts": type(FAMILIES["mixtral"])(**{**FAMILIES["mixtral"].to_dict(), "num_local_experts": 2}),
}


def strategies_of(name: str, num_ranks: int) -> list[str]:
    """Three ranks hold unequal numbers of eight experts: a search then goes on for seconds, so one model is enough."""
    searches = num_ranks == 2 or name in ("olmoe", "two_experts")
    return [strategy for strategy in NATIVE_STRATEGIES if searches or not strategy.startswith("rq")]


pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the three processes measured, under names of checks."""
    directory = tmp_path_factory.mktemp("dist")
    for name, config in MODELS.items():
        save(random_model(config), directory / name)
    run_forked(work, (directory,), NUM_PROCESSES)
    return [json.loads((directory / f"findings-{rank}.json").read_text()) for rank in range(NUM_PROCESSES)]


def work(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{directory / 'store'}", timedelta(seconds=TIMEOUT_S), world_size=NUM_PROCESSES, rank=rank
    )
    findings: dict[str, Any] = {}
    world = TorchGroup("cpu", timeout_s=TIMEOUT_S)
    for group in (world, TorchGroup("cpu", ranks=[0, 1], timeout_s=TIMEOUT_S) if rank < 2 else None):
        if group is not None:
            for name in MODELS:
                findings[f"error/{name}/{group.size}"] = run_strategies(directory, name, group)
    for name in GENERATING:
        findings[f"tokens/{name}"] = generate(directory / name, GENERATING[name], world)
    default = load(directory / "olmoe", device="cpu").rq_ep.layers[0].group
    findings["default group"] = [default.rank, default.size]
    findings["bytes"] = bytes_of(directory / "olmoe", world)
    findings["problem"] = problem(lambda: load(directory / ("olmoe" if rank != 1 else "nothing"), group=world))
    world.barrier()
    (directory / f"findings-{rank}.json").write_text(json.dumps(findings))
    dist.destroy_process_group()


@torch.no_grad()
def run_strategies(directory: Path, name: str, group: TorchGroup) -> dict[str, float]:
    """Largest deviation from the dense logits, relative to the largest of them; the last rank has no tokens."""
    config, tokens = MODELS[name], prompt(2, 5 + 3 * group.rank, seed=group.rank)
    expected = logits(random_model(config), tokens)
    errors = {}
    for strategy in strategies_of(name, group.size):
        model = load(directory / name, strategy=strategy, group=group, attn_implementation="eager")
        if group.rank == group.size - 1:
            top_k = getattr(config, "num_experts_per_tok", 1)
            for layer in model.rq_ep.layers:
                out = layer(torch.zeros(0, 64), torch.zeros(0, top_k, dtype=torch.int64), torch.zeros(0, top_k))
                assert out.shape == (0, 64)
            errors[strategy] = 0.0
        else:
            errors[strategy] = float((logits(model, tokens) - expected).abs().max() / expected.abs().max())
    return errors


def generate(path: Path, config: PretrainedConfig, group: TorchGroup) -> list[list[int]]:
    """Tokens of the loaded and of the dense model, from prompts and up to lengths that differ between ranks."""
    tokens = prompt(1, 4 + group.rank, seed=group.rank)
    options = {
        "max_new_tokens": (3, 11, 6)[group.rank],
        "do_sample": False,
        "attention_mask": torch.ones_like(tokens),
    }
    model = load(path, strategy="llep", group=group, attn_implementation="eager")
    return [each.generate(tokens, **options)[0].tolist() for each in (model, random_model(config))]


def bytes_of(path: Path, group: TorchGroup) -> dict[str, int]:
    report = load(path, group=group).rq_ep
    return {
        "read": report.bytes_read,
        "resident": sum(report.expert_bytes.values()),
        "placed": report.placement.bytes_R[group.rank],
    }


def problem(action: Callable[[], Any]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_every_strategy_equals_the_dense_model(findings: list[dict[str, Any]], name: str, num_ranks: int) -> None:
    for rank in range(num_ranks):
        errors = findings[rank][f"error/{name}/{num_ranks}"]
        assert errors.keys() == set(strategies_of(name, num_ranks))
        assert all(error < 1e-5 for error in errors.values()), f"rank {rank}: {errors}"


@pytest.mark.parametrize("name", GENERATING)
def test_generate_survives_ranks_that_finish_apart(findings: list[dict[str, Any]], name: str) -> None:
    for rank, finding in enumerate(findings):
        loaded, dense = finding[f"tokens/{name}"]
        assert loaded == dense, f"rank {rank}"
        prompt_length = 1 if GENERATING[name].is_encoder_decoder else 4 + rank
        assert len(loaded) == prompt_length + (3, 11, 6)[rank]


def test_the_default_group_is_the_launchers(findings: list[dict[str, Any]]) -> None:
    assert [finding["default group"] for finding in findings] == [[0, 3], [1, 3], [2, 3]]


def test_each_process_reads_its_own_experts(findings: list[dict[str, Any]]) -> None:
    dense = random_model(MODELS["olmoe"]).state_dict()
    experts = sum(tensor.nbytes for name, tensor in dense.items() if ".mlp.experts." in name)
    others = sum(tensor.nbytes for tensor in dense.values()) - experts
    sizes = [finding["bytes"] for finding in findings]
    assert all(size["resident"] == size["placed"] for size in sizes)
    assert all(size["read"] - others == pytest.approx(size["placed"], rel=0.01) for size in sizes)
    assert all(size["read"] - others <= experts * 3 / 8 for size in sizes)
    assert sum(size["read"] - others for size in sizes) == experts


def test_one_rank_with_a_problem_stops_all(findings: list[dict[str, Any]]) -> None:
    (problem,) = {finding["problem"] for finding in findings}
    assert problem.startswith("rank 1: ")
    assert "no such directory" in problem
