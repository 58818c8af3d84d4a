"""One MoE layer under several strategies: the same rows, routing, weights and kernels; only the plan differs.

    torchrun --nproc-per-node 2 -m bench layer --shape tiny --scenarios 80:4               # ranks are processes
    python -m bench layer --local-ranks 8 --shape gpt-oss-120b --scenarios llep ...        # all in this process

The protocol is in bench/README.md.
"""

import argparse
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.layer.case import NUM_BATCHES, Case, Contestant
from bench.layer.figure import draw
from bench.layer.measure import measure
from bench.layer.peers import LOGGED, PEERS
from bench.layer.published import SHAPES, Shape, shape_name
from bench.layer.rank_figure import draw_ranks
from bench.layer.tables import show, show_brief
from bench.layer.workloads import GRAMMAR, PAPER_SCENARIOS, parse
from bench.options import bench_parser, check_positive
from bench.result import result_document
from rq_ep.commands.common import parse_dtype, parse_names, parse_strategies
from rq_ep.config import DTYPES, Environment
from rq_ep.core.errors import UserError, check_choice, check_integer
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.core.placement import Placement
from rq_ep.core.topology import Topology
from rq_ep.costs import MACHINES, Profile, cost_model
from rq_ep.formats import get_format, native_format_name
from rq_ep.parallel import EPGroup, TorchGroup, run_local
from rq_ep.parallel.default_group import own_device

log = logging.getLogger(__name__)

MAX_TOKENS_PER_RANK = 2**16
MAX_CPU_SIZE, CPU_SIZE = 256, 128  # hidden and intermediate size up to which a CPU computes as is, and others in time


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = bench_parser("layer", __doc__)
    add = parser.add_argument
    add("--shape", default="tiny", help=f"sizes of the layer: {', '.join(SHAPES)}")
    add("--hidden-size", type=int, help=f"instead of the shape's; default on a CPU, if large: {CPU_SIZE}")
    add("--intermediate-size", type=int, help="the same")
    add("--num-experts", type=int, help="instead of the shape's")
    add("--top-k", type=int, help="instead of the shape's")
    add("--tokens-per-rank", type=int, help=f"1 to {MAX_TOKENS_PER_RANK}; default: 512, for --scenarios llep 4096")
    add("--scenarios", "--scenario", default="80:4", help=f"by commas: {GRAMMAR}; or llep, all of its paper's")
    add("--calibrate-on", metavar="SCENARIO", help="what placements are learnt from; default: the scenario itself")
    add("--local-ranks", type=int, help="ranks inside this process, which compute one at a time; no wall clock")
    add("--ranks-per-node", type=int, help="default: as the launcher says")
    add(
        "--strategies",
        default="standard,eplb,llep,rq,rq_llep",
        help="the first is what ratios refer to; NAME+N: N replicas on top",
    )
    add(
        "--placement",
        action="append",
        default=[],
        metavar="[LABEL=]FILE",
        help="placement.json for the strategy that made it, which then places nothing itself; of its layers the one "
        "that the scenario was recorded in; repeatable",
    )
    add("--set", action="append", default=[], metavar="NAME.SETTING=VALUE", help="a strategy's setting, repeatable")
    add("--peers", default="", help=f"other layers in the same run, under a launcher: {', '.join(PEERS)}")
    add("--comm-log", action="store_true", help=f"have DeepSpeed log communication of its peers: {', '.join(LOGGED)}")
    add("--formats", help="formats rq may use, native first; default: the dtype's own")
    add("--machine", help=f"add modelled links and layers: {', '.join(MACHINES)}, or a file, as in `rq-ep simulate`")
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--batches", dest="num_batches", type=int, default=NUM_BATCHES, help="different steps, which take turns")
    add("--steps", "--pairs", dest="num_rounds", type=int, default=20, help="rounds; each runs every strategy once")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1, help="threads of each rank on a CPU")
    add("--pin", action="store_true", help="bind each rank to a core of its own")
    add("--json", type=Path, metavar="OUT", help="write the result here, from rank 0")
    add("--png", type=Path, metavar="OUT", help="draw speed-up and rows received by scenario")
    add("--ranks-png", type=Path, metavar="OUT", help="draw load and expert compute of every rank by strategy")
    add("--brief", action="store_true", help="print one table of load and expert compute")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args(argv)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Check the options and put together what is measured, scenario by scenario."""
    sizes = ("hidden_size", "intermediate_size", "num_experts", "top_k")
    check_positive(args, *sizes, "local_ranks", "ranks_per_node", "threads")
    check_integer("--steps", args.num_rounds, 1)
    check_integer("--batches", args.num_batches, 1)
    if args.tokens_per_rank is None:
        args.tokens_per_rank = 4096 if args.scenarios == "llep" else 512
    check_integer("--tokens-per-rank", args.tokens_per_rank, 1, MAX_TOKENS_PER_RANK)
    check_integer("--seed", args.seed)
    if args.local_ranks and args.pin:
        raise UserError("--pin: ranks in one process share its cores; drop it, or start processes with torchrun")
    for path in filter(None, (args.json, args.png, args.ranks_png)):
        check_writable(path)
    for name in parse_names(args.peers):
        check_choice("peer", name, PEERS)
    if args.comm_log and not set(parse_names(args.peers)) & set(LOGGED):
        raise UserError(f"--comm-log: sees only what DeepSpeed sends; add --peers {LOGGED[1]}")
    shape = SHAPES[shape_name(args.shape)]
    if own_device(args.device).type == "cpu":
        shape = _affordable(shape, args)
    shape = replace(shape, **{name: getattr(args, name) for name in sizes if getattr(args, name)})
    if shape.top_k > shape.num_experts:
        raise UserError(f"--top-k {shape.top_k}: there are {shape.num_experts} experts")
    machine = cost_model(args.machine) if args.machine else None
    full_shape = replace(SHAPES[shape_name(args.shape)], num_experts=shape.num_experts, top_k=shape.top_k)
    if isinstance(machine, Profile):
        full_shape = shape  # it knows the sizes that were timed, and no others
        if machine.dtype != args.dtype:
            raise UserError(f"--machine {args.machine}: timed in {machine.dtype}; add --dtype {machine.dtype}")
    dtype = parse_dtype(args.dtype)
    native = native_format_name(dtype)
    formats = tuple(parse_names(args.formats or native))
    if get_format(formats[0]).name != native:
        raise UserError(f"--formats {args.formats}: the first must be {native}, the native one of --dtype {args.dtype}")
    names = PAPER_SCENARIOS if args.scenarios == "llep" else parse_names(args.scenarios)
    if not names:
        raise UserError(f"--scenarios: name at least one of {GRAMMAR}")
    workloads = [parse(name, full_shape, args.tokens_per_rank) for name in names]
    calibration = parse(args.calibrate_on, full_shape, args.tokens_per_rank) if args.calibrate_on else None
    case = Case(
        shape=shape,
        full_shape=full_shape,
        workload=workloads[0],
        calibration=workloads[0],
        contestants=_contestants(args),
        formats=formats,
        dtype=dtype,
        machine=machine,
        num_rounds=args.num_rounds,
        seed=args.seed,
        num_batches=args.num_batches,
    )
    return [replace(case, workload=workload, calibration=calibration or workload) for workload in workloads]


def _affordable(shape: Shape, args: argparse.Namespace) -> Shape:
    """The shape with smaller experts, unless sizes were asked for. Loads, plans and rows stay those of the model."""
    asked = args.hidden_size or args.intermediate_size
    if asked or max(shape.hidden_size, shape.intermediate_size) <= MAX_CPU_SIZE:
        return shape
    if Environment.from_os().rank == 0:
        log.info(
            "a CPU would take long for D=%d F=%d: experts are run at %d; --hidden-size %d --intermediate-size %d "
            "runs them in full",
            shape.hidden_size, shape.intermediate_size, CPU_SIZE, shape.hidden_size, shape.intermediate_size,
        )  # fmt: skip
    return replace(shape, hidden_size=CPU_SIZE, intermediate_size=CPU_SIZE)


def _contestants(args: argparse.Namespace) -> dict[str, Contestant]:
    """Read `standard,eplb,eplb+16`: the last one has 16 replicas on top of standard EP's."""
    extras: dict[str, int] = {}
    for label in parse_names(args.strategies):
        _, plus, number = label.partition("+")
        if plus and not number.isdecimal():
            raise UserError(f"--strategies {label}: write NAME+N, with N replicas beyond standard EP's")
        extras[label] = int(number or 0)
    strategies = parse_strategies([label.partition("+")[0] for label in extras], args.set)
    files: dict[str, dict[str, Placement]] = {label: {} for label in extras}  # strategy -> label -> placement
    for text in args.placement:
        label, _, path = text.rpartition("=")
        placement = Placement.load(path)
        of_strategy = files[check_choice(f"strategy of --placement {path}", placement.strategy, files)]
        if (label := label or placement.strategy) in of_strategy:
            raise UserError(f"--placement {text}: {label} is there already; write another LABEL=FILE")
        of_strategy[label] = placement
    contestants: dict[str, Contestant] = {}
    for label, extra in extras.items():
        strategy = strategies[label.partition("+")[0]]
        given = {name: Contestant(strategy, placement=placement) for name, placement in files[label].items()}
        contestants |= given or {label: Contestant(strategy, extra)}
    return contestants


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Run the benchmark on this rank of a launcher's group, or on ranks in this process; returns the result.

    Raises:
        UserError: an option makes no sense.
        RankFailure: another rank has ended.
    """
    args = parse_options(argv)
    cases = cases_of(args)
    torch.set_num_threads(args.threads)
    started_s = time.monotonic()
    if args.local_ranks:
        device = own_device(args.device).type
        topology = Topology(args.local_ranks, args.ranks_per_node or 0)
        rows = run_local(args.local_ranks, lambda group: _run(args, cases, group, topology), device)[0]
        rank, backend = 0, "local"
    else:
        if args.pin:
            _pin(args.threads)
        group = TorchGroup.from_environment(args.device)
        try:
            topology = Topology(group.size, args.ranks_per_node or Environment.from_os().local_world_size)
            rows = _run(args, cases, group, topology)
        finally:
            group.close()
        rank, backend, device = group.rank, group.backend, group.device.type
    result = result_document(
        "layer",
        argv,
        args,
        device,
        num_ranks=topology.num_ranks,
        ranks_per_node=topology.ranks_per_node,
        backend=backend,
        device=device,
        shape_name=shape_name(args.shape) + (" (changed)" if args.num_experts or args.top_k else ""),
        shape=asdict(cases[0].shape),
        formats=cases[0].formats,
        machine=args.machine,
        seed=args.seed,
        seconds=time.monotonic() - started_s,
        rows=rows,
    )
    if rank == 0:
        if args.brief:
            show_brief(result)
        else:
            show(result)
        if args.json:
            write_json(args.json, result)
        if args.png:
            draw(result, args.png)
        if args.ranks_png:
            draw_ranks(result, args.ranks_png)
    return result


def _run(args: argparse.Namespace, cases: list[Case], group: EPGroup, topology: Topology) -> list[dict[str, Any]]:
    """Rows of all scenarios, on rank 0."""
    peers = {name: PEERS[name] for name in parse_names(args.peers)}
    rows = []
    for case in cases:
        name = case.workload.name
        logged = [key for key in peers if key in LOGGED] if args.comm_log else []
        scenario_rows = measure(case, group, topology, {key: build for key, (_, build) in peers.items()}, logged)
        for row in scenario_rows:
            label = peers[row["strategy"]][0] if row["strategy"] in peers else row["strategy"]
            rows.append({"scenario": name, "repeats_experts": case.workload.repeats_experts, "label": label, **row})
        if scenario_rows and len(cases) > 1:
            log.info("%s done", name)
    return rows


def _pin(num_cores: int) -> None:
    """Bind this process to its share of the cores it may use, before it starts threads."""
    cores = sorted(os.sched_getaffinity(0))
    first = Environment.from_os().local_rank * num_cores
    if first + num_cores > len(cores):
        raise UserError(f"--pin: {len(cores)} cores are too few for local rank {first // num_cores} x {num_cores}")
    os.sched_setaffinity(0, cores[first : first + num_cores])
