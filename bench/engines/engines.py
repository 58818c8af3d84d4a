"""Placements inside vLLM and SGLang: the engines' own answers beside ours, by their own modules; no ranks, no tensors.

    RQ_EP_ENGINES_DIR=engines python -m bench engines
    RQ_EP_ENGINES_DIR=engines python -m bench engines --cases 256x32+32 --layers 58 --seeds 1

`bench/engines/engine_sources.py` says how to fill the folder. All place as many slots for the same recorded steps and
split pairs evenly over an expert's slots. Scored is max/mean of pairs over ranks on steps that none of them saw, mean
over steps and layers. A move is an expert that a rank receives. Scenario `first`: from vLLM's first map; `changed`:
from a placement of ours for text of other domains.

A record of 8 layers gets 8/58 of the time that the plug-ins take: what a model of 58 layers leaves to each layer.
"""

import argparse
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table

from bench.engines.engine_sources import SGLANG_ALGORITHMS, VERSIONS, VLLM_POLICY, engine_modules, engines_folder
from bench.options import bench_parser, check_positive
from bench.result import result_document
from bench.solver.synthetic_traces import LAWS, draw_domain_change, draw_trace
from rq_ep.commands.console import wide_console
from rq_ep.commands.progress_bar import progress_bar
from rq_ep.core.arrays import IntArray
from rq_ep.core.errors import UserError, check_choice, check_integer
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.core.problem import PlacementProblem
from rq_ep.core.stats import ExpertStats
from rq_ep.core.topology import Topology
from rq_ep.placing.engine_slots import EqualSlotsEplb
from rq_ep.plugins.engine_calls import Fallback
from rq_ep.plugins.sglang_algorithm import ImproveAlgorithm, Improved
from rq_ep.plugins.slot_rebalance import SECONDS, Balancing, arrivals, prepare, rebalanced
from rq_ep.plugins.vllm_policy import RecordedSteps, StepPolicy
from rq_ep.solver.objective.calibration_steps import LayerSteps
from rq_ep.solver.search.slots.slot_search import even_imbalance

NUM_LAYERS = 58  # of DeepSeek-V3, for whose sizes the plug-ins' time is meant
SCENARIOS = ("first", "changed")
TOP_K = 8

Place = Callable[[], IntArray]


@dataclass(frozen=True)
class SlotCase:
    """A size of a model and of its group."""

    num_experts: int
    num_ranks: int
    num_extras: int

    @classmethod
    def parse(cls, text: str) -> "SlotCase":
        """Read `256x32+32`: experts, ranks, redundant experts."""
        match = re.fullmatch(r"(\d{1,4})x(\d{1,4})\+(\d{1,5})", text)
        if match is None:
            raise UserError(f"--cases {text}: write EXPERTSxRANKS+REDUNDANT, such as 256x32+32")
        case = cls(*map(int, match.groups()))
        check_integer(f"--cases {text}: experts", case.num_experts, TOP_K)
        if not case.num_ranks or case.num_slots % case.num_ranks:
            raise UserError(f"--cases {text}: {case.num_slots} slots do not divide by {case.num_ranks} ranks")
        return case

    @property
    def num_slots(self) -> int:
        return self.num_experts + self.num_extras

    def first_map(self, num_layers: int) -> IntArray:
        """[L, P] what vLLM begins with: all experts in their order, then the first of them again."""
        return np.tile(np.arange(self.num_slots) % self.num_experts, (num_layers, 1))


CASES = ("64x8+8", "128x8+8", "256x32+32", "256x64+64")


class Record(NamedTuple):
    """Recorded and held-out steps, and what serves before."""

    recorded_SLE: IntArray
    held_out_SLE: IntArray
    old_LP: IntArray


def draw_record(case: SlotCase, scenario: str, tokens: int, args: argparse.Namespace, seed: int) -> Record:
    """A record of one scenario."""
    steps = (args.recorded_steps, args.held_out_steps)
    size = (args.law, case.num_experts, TOP_K, tokens, args.layers)
    first_LP = case.first_map(args.layers)
    if scenario == "first":
        trace = draw_trace(*size, steps, seed)
        return Record(trace.calibration_SLE, trace.held_out_SLE, first_LP)
    trace = draw_domain_change(*size, (args.recorded_steps, sum(steps)), seed)
    old_LP = rebalanced(Balancing(trace.calibration_SLE, first_LP, case.num_ranks, old_LP=first_LP))
    return Record(trace.held_out_SLE[: steps[0]], trace.held_out_SLE[steps[0] :], old_LP)


def placers(case: SlotCase, record: Record, seconds: float) -> Iterator[tuple[str, Place]]:
    """Everyone who places, by name."""
    algorithms = import_module(SGLANG_ALGORITHMS)
    kinds = algorithms.EplbAlgorithm
    vllm = import_module(VLLM_POLICY).EPLB_POLICIES["default"]
    steps_SLE, old_LP = torch.from_numpy(record.recorded_SLE), torch.from_numpy(record.old_LP)
    totals_LE = steps_SLE.sum(dim=0)
    fallback = Fallback("the engine")
    sums = StepPolicy(vllm, fallback, seconds)
    with_steps = replace(sums, recorded=[RecordedSteps(totals_LE.numpy(), record.recorded_SLE)])
    improve = ImproveAlgorithm(fallback, seconds)
    sizes = (case.num_slots, case.num_slots // case.num_ranks, None, 1)

    def by_vllm(policy: Any) -> Place:
        return lambda: policy.rebalance_experts(totals_LE, case.num_slots, 1, 1, case.num_ranks, old_LP).numpy()

    def by_sglang(algorithm: Any) -> Place:
        return lambda: algorithms.rebalance_experts(steps_SLE, *sizes, algorithm)[0].cpu().numpy()

    yield "vllm", by_vllm(vllm)
    yield "sglang_deepseek", by_sglang(kinds.deepseek)
    yield "sglang_deepseek_vec", by_sglang(kinds.deepseek_vec)
    yield "rq_in_vllm", by_vllm(with_steps)
    yield "rq_in_vllm_sums", by_vllm(sums)
    serving = SimpleNamespace(physical_to_logical_map_cpu=old_LP)
    resources = import_module("sglang.srt.runtime_context").get_resources
    resources.return_value = SimpleNamespace(expert_location_metadata=serving)
    original = algorithms.rebalance_experts
    yield "rq_in_sglang", lambda: improve.around(original, steps_SLE, *sizes, Improved(kinds.deepseek))[0].numpy()
    yield "place", lambda: offline(case, record.recorded_SLE)
    yield "place_sums", lambda: offline(case, record.recorded_SLE.sum(axis=0, keepdims=True))
    assert not fallback.failed, "a plug-in has left the placement to its engine"


def offline(case: SlotCase, counts_SLE: IntArray) -> IntArray:
    """[L, P] by `place --for`, which knows no old placement."""
    stats = ExpertStats(counts_SLE, ("bf16",), "bf16", {"bf16": 1}, top_k=TOP_K)
    problem = PlacementProblem(stats, Topology(case.num_ranks), None, ("bf16",), num_redundant_experts=case.num_extras)
    return np.stack([layer.replicas.experts_P for layer in EqualSlotsEplb().place(problem).layers])


def imbalance(counts_SLE: IntArray, experts_LP: IntArray, num_ranks: int) -> float:
    """max/mean over ranks under an even split, mean over steps and layers."""
    layers = (
        even_imbalance(LayerSteps(counts_SE[counts_SE.any(axis=1)], num_ranks), experts_P.reshape(num_ranks, -1))
        for counts_SE, experts_P in zip(counts_SLE.swapaxes(0, 1), experts_LP, strict=True)
    )
    return float(np.mean(list(layers)))


def measure(case: SlotCase, record: Record, seconds: float) -> dict[str, dict[str, float]]:
    """Figures of everyone who places, and of staying."""
    totals_SLE = record.recorded_SLE.sum(axis=0, keepdims=True)
    num_layers = len(record.old_LP)

    def figures(experts_LP: IntArray, cpu_s: float) -> dict[str, float]:
        return {
            "held_out": imbalance(record.held_out_SLE, experts_LP, case.num_ranks),
            "of_mean_load": imbalance(totals_SLE, experts_LP, case.num_ranks),
            "moves_per_layer": arrivals(record.old_LP, experts_LP, case.num_ranks) / num_layers,
            "cpu_s": cpu_s,
        }

    rows = {"stay": figures(record.old_LP, 0.0)}
    for name, place in placers(case, record, seconds):
        started = time.process_time()
        experts_LP = place()
        rows[name] = figures(experts_LP, time.process_time() - started)
    return rows


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each (case, scenario, tokens, who places): means over seeds."""
    rows = []
    sizes = list(product(args.cases, args.scenarios, args.tokens))
    prepare()
    seconds = SECONDS * min(args.layers / NUM_LAYERS, 1)
    with engine_modules(args.engines), progress_bar() as progress:
        task = progress.add_task("placing", total=len(sizes) * args.seeds)
        for case, scenario, tokens in sizes:
            runs = []
            for seed in range(args.seeds):
                runs.append(measure(case, draw_record(case, scenario, tokens, args, seed), seconds))
                progress.advance(task)
            means: dict[str, dict[str, Any]] = {
                name: {key: float(np.mean([one[name][key] for one in runs])) for key in runs[0][name]}
                for name in runs[0]
            }
            for name, row in means.items():
                removed = means["stay"]["held_out"] - row["held_out"]
                row["moves_per_unit"] = row["moves_per_layer"] / removed if removed > 0 else None
                rows.append(vars(case) | {"scenario": scenario, "tokens": tokens, "placed_by": name} | row)
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    columns = ["experts", "ranks", "extra", "scenario", "tokens", "placed by", "held-out max/mean", "of the mean load"]
    table = Table(*columns, "moves per layer", "moves per unit removed", "CPU s", box=None)
    for row in rows:
        size = (str(row[key]) for key in ("num_experts", "num_ranks", "num_extras", "scenario", "tokens", "placed_by"))
        figures = (f"{row['held_out']:.3f}", f"{row['of_mean_load']:.4f}", f"{row['moves_per_layer']:.0f}")
        per_unit = "" if row["moves_per_unit"] is None else f"{row['moves_per_unit']:.0f}"
        table.add_row(*size, *figures, per_unit, f"{row['cpu_s']:.2f}")
    return table


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = bench_parser("engines", __doc__)
    parser.add_argument("--engines", metavar="FOLDER", help="unpacked wheels; default: RQ_EP_ENGINES_DIR")
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="ExR+N", help="experts x ranks + redundant")
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), metavar="NAME", help="; ".join(SCENARIOS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 64], metavar="N", help="of all ranks in a step")
    parser.add_argument("--law", default="ln1.2", metavar="LAW", help="of the experts' popularity: " + ", ".join(LAWS))
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="MoE layers")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="traces to average over")
    parser.add_argument("--recorded-steps", type=int, default=256, metavar="N", help="steps that the engines recorded")
    parser.add_argument("--held-out-steps", type=int, default=96, metavar="N", help="steps that score")
    parser.add_argument("--quick", action="store_true", help="one small case, to see that all of it runs")
    parser.add_argument("--json", metavar="FILE", help="write the figures with command, commit and versions")
    args = parser.parse_args(argv)
    if args.quick:
        args.cases, args.tokens, args.layers, args.seeds = ["64x8+8"], [256], 1, 1
        args.recorded_steps = args.held_out_steps = 16
    args.cases = [SlotCase.parse(text) for text in args.cases]
    for name in args.scenarios:
        check_choice("scenario", name, SCENARIOS)
    check_choice("law", args.law, LAWS)
    check_positive(args, "layers", "seeds", "recorded_steps", "held_out_steps", "tokens")
    if args.json:
        check_writable(args.json)
    args.engines = engines_folder(args.engines)
    return args


def main(argv: Sequence[str]) -> None:
    """Place by all, score, print the table."""
    args = parse_options(argv)
    rows = run(args)
    wide_console(180).print(table_of(rows))
    if args.json:
        shown = argparse.Namespace(**{key: value for key, value in vars(args).items() if key != "engines"})
        write_json(args.json, result_document("engines", argv, shown, engines=VERSIONS, rows=rows))
