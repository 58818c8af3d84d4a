"""The plug-ins inside the modules of vLLM and SGLang, whose managers, recorders and loaders run as far as a CPU can.

Needs `RQ_EP_ENGINES_DIR`; `bench/engines/engine_sources.py` says how to fill that folder.
"""

import importlib.metadata
import json
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from bench.engines.engine_sources import VARIABLE, engine_modules, engines_folder
from bench.engines.engines import main as bench
from bench.solver.synthetic_traces import draw_trace
from rq_ep.core.arrays import IntArray
from rq_ep.interchange import STATS_FORMATS, write_slots
from rq_ep.interchange.slot_map import SlotMap
from rq_ep.plugins.slot_rebalance import arrivals
from rq_ep.solver.objective.calibration_steps import LayerSteps
from rq_ep.solver.search.slots.slot_search import even_imbalance

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no unpacked wheels"),
]
STEPS, LAYERS, EXPERTS, RANKS, EXTRAS = 32, 3, 32, 8, 8
SLOTS = EXPERTS + EXTRAS
ENTRY_POINTS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engines' modules, which find our entry points as if the package were installed, and groups of one rank."""
    installed = importlib.metadata.entry_points
    monkeypatch.setattr(
        "importlib.metadata.entry_points",
        lambda **wanted: (
            [
                *(one for one in installed(**wanted) if one.name != "rq_ep"),
                *(EntryPoint(*item, wanted["group"]) for item in ENTRY_POINTS[wanted["group"]].items()),
            ]
            if wanted.get("group") in ENTRY_POINTS
            else installed(**wanted)
        ),
    )
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    with engine_modules(engines_folder()):
        yield


@pytest.fixture(scope="module")
def counts_SLE() -> IntArray:
    return draw_trace("ln1.2", EXPERTS, 4, 1024, LAYERS, (STEPS, 1), seed=3).calibration_SLE


def imbalance(counts_SLE: IntArray, experts_LP: Any) -> float:
    """max/mean over ranks under an even split, mean over steps and layers."""
    layers = enumerate(np.asarray(experts_LP))
    return float(
        np.mean([even_imbalance(LayerSteps(counts_SLE[:, i], RANKS), row.reshape(RANKS, -1)) for i, row in layers])
    )


class Model:
    """What vLLM's EPLB asks of a model."""

    num_moe_layers, num_expert_groups = LAYERS, 1
    num_routed_experts = num_logical_experts = EXPERTS
    num_redundant_experts, num_physical_experts = EXTRAS, SLOTS
    expert_weights: list[list[torch.Tensor]] = [[torch.zeros(SLOTS // RANKS, 1)]] * LAYERS
    moe_layers = ()

    def set_eplb_state(self, *tensors: torch.Tensor) -> None:
        """Models read their tensors here."""


def vllm_state(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """vLLM's EPLB state of one model with the asynchronous path chosen, and its module."""
    import vllm.plugins

    monkeypatch.setenv("VLLM_PLUGINS", "rq_ep")
    importlib.import_module("vllm.envs").VLLM_PLUGINS = ["rq_ep"]
    vllm.plugins.load_general_plugins()
    module = importlib.import_module("vllm.distributed.eplb.eplb_state")
    module.PIN_MEMORY = False
    module.CpuGpuEvent = MagicMock
    module.get_node_count.return_value = 1
    module.get_ep_group.return_value.device_group.size.return_value = RANKS
    module.get_ep_group.return_value.device_group.rank.return_value = 0
    settings = SimpleNamespace(
        window_size=STEPS, step_interval=STEPS, use_async=True, policy="default", communicator="torch_gloo"
    )
    state = module.EplbState(
        SimpleNamespace(eplb_config=settings, enable_elastic_ep=False, num_ubatches=0), torch.device("cpu")
    )
    config = MagicMock()
    state.add_model(Model(), config)
    state.expert_rearrangement_step = 0  # vLLM begins at three quarters of the interval
    return state, module


def test_vllm_rearranges_in_its_asynchronous_path(monkeypatch: pytest.MonkeyPatch, counts_SLE: IntArray) -> None:
    state, module = vllm_state(monkeypatch)
    worker = importlib.import_module("vllm.distributed.eplb.async_worker")
    (model_state,) = state.model_states.values()
    before_LP = model_state.physical_to_logical_map.clone()
    for counts_LE in torch.from_numpy(counts_SLE):
        for slot, expert in enumerate(before_LP[0].tolist()):  # all pairs to the first slot of each expert
            model_state.expert_load_pass[:, slot] = counts_LE[:, expert] if slot < EXPERTS else 0
        state.step()
    assert model_state.rebalanced, "vLLM's own step has not come to its rearrangement"
    (recorded,) = state.policy.recorded
    np.testing.assert_array_equal(recorded.total_LE, model_state.eplb_stats.global_expert_load_window)
    np.testing.assert_array_equal(recorded.steps_SLE, counts_SLE)

    new_LP = worker.run_rebalance_experts(model_state, state, before_LP, None)
    own_LP = state.policy.own.rebalance_experts(
        torch.from_numpy(recorded.total_LE), SLOTS, 1, 1, RANKS, before_LP
    ).numpy()
    assert imbalance(counts_SLE, new_LP) < imbalance(counts_SLE, own_LP) < imbalance(counts_SLE, before_LP)
    moved = arrivals(before_LP.numpy(), new_LP.numpy(), RANKS)
    assert moved < arrivals(before_LP.numpy(), own_LP, RANKS)
    scheduler = importlib.import_module("vllm.distributed.eplb.migration_scheduler")
    batches = scheduler.schedule_migration_batches_for_layers(SLOTS // RANKS, before_LP.numpy(), new_LP.numpy())
    assert moved == sum(len(flow.expert_ids) for layer in batches for batch in layer for flow in batch)

    for layer, experts_P in enumerate(new_LP):
        module._commit_eplb_maps_for_layer(model_state, experts_P, layer)
    torch.testing.assert_close(model_state.physical_to_logical_map, new_LP.to(before_LP.dtype))
    assert (model_state.logical_replica_count.sum(dim=1) == SLOTS).all()
    assert (model_state.logical_replica_count >= 1).all()


def test_vllm_policy_with_nodes_new_slots_and_faults(monkeypatch: pytest.MonkeyPatch, counts_SLE: IntArray) -> None:
    state, _ = vllm_state(monkeypatch)
    loads_LE = torch.from_numpy(counts_SLE.sum(axis=0))
    first_LP = torch.from_numpy(np.tile(np.arange(SLOTS) % EXPERTS, (LAYERS, 1)))
    new_LP = state.policy.rebalance_experts(loads_LE, SLOTS, 4, 2, RANKS, first_LP)
    on_node_LNP = new_LP.reshape(LAYERS, 2, -1)
    groups = [[set((experts // (EXPERTS // 4)).tolist()) for experts in layer] for layer in on_node_LNP]
    assert all(not one & two for one, two in groups), "a group of experts is on two nodes"
    grown_LP = torch.cat([first_LP[:, :EXPERTS], torch.full((LAYERS, EXTRAS), -1)], dim=1)
    mean_SLE = loads_LE[None].numpy()
    own_LP = state.policy.own.rebalance_experts(loads_LE, SLOTS, 1, 1, RANKS)
    for old_LP in (first_LP, grown_LP, torch.cat([first_LP, first_LP[:, : SLOTS // RANKS]], dim=1), None):
        answer_LP = state.policy.rebalance_experts(loads_LE, SLOTS, 1, 1, RANKS, old_LP)
        assert imbalance(mean_SLE, answer_LP) <= imbalance(mean_SLE, own_LP)
    own_LP = state.policy.own.rebalance_experts(loads_LE * np.nan, SLOTS, 1, 1, RANKS)
    torch.testing.assert_close(state.policy.rebalance_experts(loads_LE * np.nan, SLOTS, 1, 1, RANKS), own_LP)
    assert state.policy.fallback.failed


def sglang(monkeypatch: pytest.MonkeyPatch, **moe: Any) -> tuple[Any, Any]:
    """SGLang's expert locations for a model of ours, with its plug-ins loaded, and what stands for its resources."""
    context = importlib.import_module("sglang.srt.runtime_context")
    settings = {
        "eplb_algorithm": "rq_ep", "ep_num_redundant_experts": EXTRAS, "ep_dispatch_algorithm": None,
        "ep_join_mode": None, "moe_a2a_backend": "none", "expert_distribution_recorder_mode": None,
    }  # fmt: skip
    context.get_exec.return_value.moe = SimpleNamespace(**(settings | moe))
    context.get_parallel.return_value = SimpleNamespace(nnodes=1, ep_size=RANKS, elastic_ep_initial_size=None)
    context.get_device.return_value.device = "cpu"
    context.get_resources.return_value = SimpleNamespace(expert_location_metadata=None)
    context.get_platform.return_value.is_hip = False
    context.reports_expert_balancedness.return_value = False
    environ = importlib.import_module("sglang.srt.environ")
    environ.envs.SGLANG_PLUGINS.get.return_value = environ.envs.SGLANG_PLATFORM.get.return_value = None
    importlib.import_module("sglang.srt.plugins").load_plugins()
    location = importlib.import_module("sglang.srt.eplb.expert_location")
    sizes = location.ModelConfigForExpertLocation(num_layers=LAYERS, num_logical_experts=EXPERTS)
    monkeypatch.setattr(location.ModelConfigForExpertLocation, "from_model_config", lambda config: sizes)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *args: 0)
    return location, context.get_resources()


def test_sglang_places_by_the_named_algorithm(monkeypatch: pytest.MonkeyPatch, counts_SLE: IntArray) -> None:
    location, resources = sglang(monkeypatch)
    moe = importlib.import_module("sglang.srt.runtime_context").get_exec().moe
    counts = torch.from_numpy(counts_SLE).int()
    place = location.ExpertLocationMetadata.init_by_eplb
    fresh = place(None, counts)
    resources.expert_location_metadata = first = location.ExpertLocationMetadata.init_trivial(None, 0)
    near = place(None, counts)
    for metadata in (fresh, near):
        assert (metadata.logical_to_all_physical_map_num_valid >= 1).all()
        experts_LP = metadata.physical_to_logical_map
        for expert in range(EXPERTS):
            slots = torch.nonzero(experts_LP[1] == expert).flatten().tolist()
            assert metadata.logical_to_all_physical(1, expert) == slots
    moe.eplb_algorithm = "auto"
    own_LP = place(None, counts).physical_to_logical_map
    assert imbalance(counts_SLE, near.physical_to_logical_map) < imbalance(counts_SLE, own_LP)
    assert imbalance(counts_SLE, fresh.physical_to_logical_map) < imbalance(counts_SLE, own_LP)
    first_LP, near_LP = first.physical_to_logical_map.numpy(), near.physical_to_logical_map.numpy()
    assert arrivals(first_LP, near_LP, RANKS) < arrivals(first_LP, own_LP.numpy(), RANKS)
    assert "changed_physical_slots" in location.format_expert_location_layout_diff(first, near)


class Withable:
    """A value that is set for a while, as SGLang's recorder has them."""

    def __init__(self) -> None:
        self.value: Any = None

    @contextmanager
    def with_value(self, value: Any) -> Iterator[None]:
        self.value = value
        yield
        self.value = None


@pytest.mark.parametrize("mode", ["stat", "per_pass"])
def test_sglang_records_are_read_as_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, counts_SLE: IntArray
) -> None:
    location, _ = sglang(
        monkeypatch, expert_distribution_recorder_mode=mode, expert_distribution_recorder_buffer_size=-1
    )
    utils = importlib.import_module("sglang.srt.utils")
    utils.Withable, utils.get_device.return_value = Withable, "cpu"
    environ = importlib.import_module("sglang.srt.environ")
    environ.envs.SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR.get.return_value = str(tmp_path)
    module = importlib.import_module("sglang.srt.eplb.expert_distribution")
    recorder = module.ExpertDistributionRecorder.init_new(location.ExpertLocationMetadata.init_trivial(None, 0), 0)
    recorder._accumulator._first_dump = False  # it empties the cache of a device
    recorder.start_record()
    for number, counts_LE in enumerate(counts_SLE[:4]):
        with recorder.with_forward_pass(number, MagicMock()):
            for layer, counts_E in enumerate(counts_LE):
                with recorder.with_current_layer(layer):
                    experts = np.repeat(np.arange(EXPERTS), counts_E)
                    is_second = np.arange(len(experts)) % 2 == 1  # every other pair to an expert's second slot
                    slots = np.where(is_second & (experts < EXTRAS), experts + EXPERTS, experts)
                    recorder.on_select_experts(torch.from_numpy(slots)[:, None])
    recorder.dump_record("file")
    recorded = STATS_FORMATS["sglang"].read(sorted(tmp_path.glob("*.pt")))
    np.testing.assert_array_equal(recorded.counts_SLE, counts_SLE[:4])


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_sglang_loads_what_convert_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str) -> None:
    location, _ = sglang(monkeypatch)
    experts_LS = np.stack([np.roll(np.arange(SLOTS) % EXPERTS, layer) for layer in range(LAYERS)])
    path = tmp_path / f"location{suffix}"
    write_slots(SlotMap(experts_LS, tuple(range(LAYERS)), RANKS, EXPERTS), "sglang", path)
    moe = importlib.import_module("sglang.srt.runtime_context").get_exec().moe
    for data in (str(path), *([json.dumps(json.loads(path.read_text()))] if suffix == ".json" else [])):
        moe.init_expert_location = data
        metadata = location.compute_initial_expert_location_metadata(None, 0)
        np.testing.assert_array_equal(metadata.physical_to_logical_map, experts_LS)
        assert metadata.ep_size == RANKS


def test_the_bench_places_by_all(tmp_path: Path) -> None:
    bench(["--quick", "--scenarios", "first", "--json", str(tmp_path / "figures.json")])
    rows = {row["placed_by"]: row for row in json.loads((tmp_path / "figures.json").read_text())["rows"]}
    for ours, own in (("rq_in_vllm", "vllm"), ("rq_in_sglang", "sglang_deepseek_vec")):
        assert rows[ours]["held_out"] < rows[own]["held_out"] < rows["stay"]["held_out"]
        assert rows[ours]["moves_per_unit"] < rows[own]["moves_per_unit"]
    assert rows["rq_in_vllm_sums"]["of_mean_load"] <= rows["vllm"]["of_mean_load"]
