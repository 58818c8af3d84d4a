"""What a layer spends besides matrix products and collectives, and what moving an expert costs.

    torchrun --nproc-per-node 2 -m bench overhead --shape mixtral --intermediate-size 3584 --tokens-per-rank 4096

Seconds of CPU time of a rank's thread: `products`, `collectives` inside the group's calls, and `around`, the rest:
sorting, copying rows, activations, sums, planning, telemetry. Borrowing an expert, until it can be computed with, is
compared with a plain send of its bytes between the same two processes, in turns, A B and B A: medians, of the ratios
too. Its checksum, which runs beside, is apart.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from bench.layer.case import Case, Contestant
from bench.layer.published import SHAPES, shape_name
from bench.layer.workloads import parse
from bench.options import bench_parser, check_positive
from bench.result import result_document
from rq_ep.commands.common import parse_dtype
from rq_ep.commands.console import wide_console
from rq_ep.config import DTYPES
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.core.plan import WeightTransfer
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.core.topology import Topology
from rq_ep.formats import native_format_name
from rq_ep.moe import EPExperts, ExpertBank, Telemetry
from rq_ep.parallel import TorchGroup
from rq_ep.parallel.host import keep_freed_memory
from rq_ep.strategies import make_strategy

PRODUCTS = ("mm", "addmm", "bmm", "_grouped_mm")
WARM_UP_ROUNDS = 2
NUM_RECORDS = 2000  # calls of telemetry that are timed
NUM_MOVES = 100
MOVES = ("plain", "borrow", "verified")


class TimedProducts(TorchDispatchMode):
    """Adds up the time that matrix products take of the thread."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start_s = time.thread_time()
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCTS:
            self.seconds += time.thread_time() - start_s
        return result


class TimedGroup:
    """A group that adds up the time its calls take of the thread; waiting on a CPU's link takes none."""

    def __init__(self, group: TorchGroup) -> None:
        self._group = group
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def gather_counts(self, *args: Any) -> Any:
        return self._timed(self._group.gather_counts, *args)

    def all_to_all(self, *args: Any) -> Any:
        return self._timed(self._group.all_to_all, *args)

    def start_all_to_all(self, *args: Any) -> "_Timed":
        return _Timed(self, self._timed(self._group.start_all_to_all, *args))

    def start_transfers(self, *args: Any) -> "_Timed":
        return _Timed(self, self._timed(self._group.start_transfers, *args))

    def _timed(self, call: Callable[..., Any], *args: Any) -> Any:
        start_s = time.thread_time()
        result = call(*args)
        self.seconds += time.thread_time() - start_s
        return result


class _Timed:
    """Something under way in a timed group."""

    def __init__(self, group: TimedGroup, handle: Any) -> None:
        self._group, self._handle = group, handle

    def wait(self) -> Any:
        return self._group._timed(self._handle.wait)


def layer_times(case: Case, group: TorchGroup) -> dict[str, float]:
    """Where the time of one layer call goes on this rank, in seconds."""
    timed: Any = TimedGroup(group)
    topology = Topology(group.size)
    placement = case.place("standard", case.stats(group.size), topology)
    planner = case.planner("standard", placement, topology)
    telemetry = Telemetry(max_records=64)
    layer = EPExperts(case.family, placement, planner, timed, telemetry=telemetry)
    for expert in layer.bank.experts:
        layer.bank.put(expert, case.expert(expert, group.device))
    batch = case.batch(0, group.rank, group.size, group.device)

    def call() -> tuple[float, float, float]:
        group.barrier()
        timed.seconds, start_s = 0.0, time.thread_time()
        with TimedProducts() as products:
            layer(batch.hidden_TD, batch.ids_TK, batch.weights_TK)
        return time.thread_time() - start_s, products.seconds, timed.seconds

    calls = [call() for _ in range(WARM_UP_ROUNDS + case.num_rounds)][WARM_UP_ROUNDS:]
    layer_s, products_s, collectives_s = (median(values) for values in zip(*calls, strict=True))
    times = {"layer_s": layer_s, "products_s": products_s, "collectives_s": collectives_s}
    return times | {"around_s": layer_s - products_s - collectives_s, "telemetry_s": _telemetry_s(layer, telemetry)}


def _telemetry_s(layer: EPExperts, telemetry: Telemetry) -> float:
    """Seconds that recording one call takes."""
    _, last = telemetry._calls[-1]
    start_s = time.thread_time()
    for _ in range(NUM_RECORDS):
        timer = telemetry.timer(layer.group)
        for phase in ("gather", "plan", "dispatch", "compute", "combine", "combine"):
            timer.mark(phase)
        telemetry.record(last._replace(timer=timer))
    return (time.thread_time() - start_s) / NUM_RECORDS


def transfer_times(case: Case, group: TorchGroup) -> dict[str, float]:
    """Rank 1 gets an expert of rank 0: by a plain send, borrowed, and until it is verified. Ratios are to a plain send.

    Wall clock is that of rank 1; CPU time that of all threads of both ranks, those of gloo included.
    """
    name = native_format_name(case.dtype)
    bank = ExpertBank(case.family.layout, Replicas.of([Replica(0, 0, name)]), group.rank)
    for expert in bank.experts:
        bank.put(expert, case.expert(expert, group.device))
    num_bytes = group.all_gather_object(bank.nbytes)[0]
    landing = torch.zeros(num_bytes, dtype=torch.uint8)
    swept = torch.zeros(1 << 26, dtype=torch.uint8)

    def plain() -> list[tuple[float, float]]:
        if group.rank == 0:
            dist.send(bank.packed(0), 1)
        elif group.rank == 1:
            dist.recv(landing, 0)
        return [clocks()]

    def borrow() -> list[tuple[float, float]]:
        borrowed = bank.borrow((WeightTransfer(0, 0, 1, name),), group)
        borrowed.wait()
        arrived = clocks()
        borrowed.verify()
        return [arrived, clocks()]

    def clocks() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    rounds = []
    for number in range(WARM_UP_ROUNDS + NUM_MOVES):
        ends = {}
        for move in (plain, borrow) if number % 2 else (borrow, plain):
            swept.add_(1)  # neither finds the expert in the cache
            group.barrier()
            start = clocks()
            ends[move.__name__] = np.array(move()) - start
        rounds.append(np.concatenate([ends["plain"], ends["borrow"]]))
    times_RN32 = np.array(group.all_gather_object(rounds[WARM_UP_ROUNDS:]))
    times = {"expert_bytes": num_bytes}
    for clock, times_N3 in (("wall", times_RN32[1, ..., 0]), ("cpu", times_RN32[:2, ..., 1].sum(axis=0))):
        medians = np.median(times_N3, axis=0).tolist()
        times |= {f"{name}_{clock}_s": value for name, value in zip(MOVES, medians, strict=True)}
        times[f"borrow_{clock}_ratio"] = float(np.median(times_N3[:, 1] / times_N3[:, 0]))
    return times


def main(argv: Sequence[str]) -> None:
    """Run on this rank of a launcher's gloo group; rank 0 shows every rank's times."""
    parser = bench_parser("overhead", __doc__)
    parser.add_argument("--shape", default="mixtral", help=f"sizes of the layer: {', '.join(SHAPES)}")
    parser.add_argument("--hidden-size", type=int, help="instead of the shape's")
    parser.add_argument("--intermediate-size", type=int, help="instead of the shape's")
    parser.add_argument("--tokens-per-rank", type=int, default=4096, help="in a call of the layer")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of rows and weights")
    parser.add_argument("--steps", type=int, default=5, help="rounds whose median counts")
    parser.add_argument("--keep-freed", action="store_true", help="the process keeps memory that it frees")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result here, from rank 0")
    args = parser.parse_args(argv)
    check_positive(args, "hidden_size", "intermediate_size", "tokens_per_rank", "steps")
    if args.json:
        check_writable(args.json)
    torch.set_num_threads(1)
    sizes = {name: value for name in ("hidden_size", "intermediate_size") if (value := getattr(args, name))}
    full_shape = SHAPES[shape_name(args.shape)]
    workload = parse("balanced", full_shape, args.tokens_per_rank)
    dtype = parse_dtype(args.dtype)
    case = Case(
        shape=replace(full_shape, **sizes),
        full_shape=full_shape,
        workload=workload,
        calibration=workload,
        contestants={"standard": Contestant(make_strategy("standard"))},
        formats=(native_format_name(dtype),),
        dtype=dtype,
        machine=None,
        num_rounds=args.steps,
        seed=0,
    )
    if args.keep_freed:
        keep_freed_memory()
    group = TorchGroup.from_environment("cpu")
    try:
        transfer = transfer_times(case, group) if group.size > 1 else {}
        ranks = group.all_gather_object({"layer": layer_times(case, group), "transfer": transfer})
    finally:
        group.close()
    if group.rank == 0:
        _show(ranks)
        if args.json:
            write_json(args.json, result_document("overhead", argv, args, ranks=ranks))


def _show(ranks: list[dict[str, dict[str, float]]]) -> None:
    table = Table("rank", "layer", "products", "collectives", "around", "of the layer", "telemetry")
    for rank, rank_times in enumerate(ranks):
        times = rank_times["layer"]
        shares = [times["around_s"] / times["layer_s"], times["telemetry_s"] / times["layer_s"]]
        cells = [f"{times[key] * 1e3:.1f} ms" for key in ("layer_s", "products_s", "collectives_s", "around_s")]
        table.add_row(str(rank), *cells, f"{shares[0]:.1%}", f"{times['telemetry_s'] * 1e6:.1f} us ({shares[1]:.4%})")
    wide_console().print(table)
    if len(ranks) > 1:
        moved = ranks[1]["transfer"]
        wide_console().print(f"an expert of {moved['expert_bytes'] / 2**20:.1f} MiB, medians of {NUM_MOVES} rounds:")
        for clock, whose in (("wall", "wall clock"), ("cpu", "CPU of both ranks")):
            plain, borrow, verified = (f"{moved[f'{name}_{clock}_s'] * 1e3:.2f} ms" for name in MOVES)
            ratio = moved[f"borrow_{clock}_ratio"]
            wide_console().print(f"{whose}: plain send {plain}, borrowed {borrow} ({ratio:.2f} x), verified {verified}")
