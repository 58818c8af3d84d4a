"""What an expert that arrives beside the steps costs them: products with and without a copy on another stream.

    python -m bench staging --device cuda --shape mixtral --rows 16 1024

A bank whose replicas may be replaced multiplies rows on the main stream. In every second round a thread stages one
expert after another from pinned memory, on a stream of its own, and verifies each, as the mover of a server does.
The slowdown is the median over pairs of rounds.
"""

import argparse
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from bench.layer.published import SHAPES, Shape, shape_name
from bench.options import bench_parser, check_device, check_positive
from bench.result import result_document
from rq_ep.commands.console import wide_console
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.core.replicas import Replica, Replicas
from rq_ep.formats import ExpertBuffers, get_format
from rq_ep.moe import ExpertBank, ExpertFamily
from rq_ep.parallel import Received, single_group
from rq_ep.profiling.timing import wall_seconds

NATIVE = "bf16"
ARRIVING = "int8"


def main(argv: Sequence[str]) -> None:
    """Time rounds of products with and without staging; print the table.

    Raises:
        UserError: an option makes no sense.
    """
    made = bench_parser("staging", __doc__)
    made.add_argument("--shape", default="mixtral", metavar="NAME", help="of shapes.yaml")
    made.add_argument("--experts", type=int, default=4, metavar="N", help="that serve")
    made.add_argument("--rows", nargs="+", type=int, default=[16, 1024], metavar="N", help="of each expert")
    made.add_argument("--rounds", type=int, default=20, metavar="N", help="pairs of rounds")
    made.add_argument("--calls", type=int, default=10, metavar="N", help="of a layer in a round")
    made.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda")
    made.add_argument("--json", metavar="FILE", help="write the figures there")
    options = made.parse_args(argv)
    options.shape = shape_name(options.shape)
    check_device(options.device)
    check_positive(options, "experts", "rounds", "calls", "rows")
    if options.json:
        check_writable(options.json)
    rows = _measure(SHAPES[options.shape], options)
    table = Table("rows", "ms a call", "while staging", "slowdown", "GB/s staged", title=options.shape, box=None)
    for row in rows:
        times = [f"{1e3 * row[name]:.3f}" for name in ("alone_s", "staging_s")]
        table.add_row(str(row["rows"]), *times, f"{row['slowdown']:.3f}", f"{row['staged_bytes_per_s'] / 1e9:.2f}")
    wide_console(100).print(table)
    if options.json:
        write_json(options.json, result_document("staging", argv, options, options.device, rows=rows))


@torch.no_grad()
def _measure(shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of rows."""
    device = torch.device(options.device)
    family = ExpertFamily.gated(shape.hidden_size, shape.intermediate_size)
    replicas = Replicas.of(Replica(0, expert, NATIVE) for expert in range(options.experts))
    bank = ExpertBank(family.layout, replicas, 0, device, expert_buffers=ExpertBuffers(device))
    random = torch.Generator(device).manual_seed(0)
    weights = {
        name: torch.randn(size, generator=random, device=device) * size[-1] ** -0.5
        for name, size in family.layout.shapes.items()
    }
    for expert in bank.experts:
        bank.put(expert, weights)
    arriving = get_format(ARRIVING).pack(weights, family.layout).cpu()
    if device.type == "cuda":
        arriving = arriving.pin_memory()
    group, rows = single_group(device), []
    for number in options.rows:
        received = _received(family, number, options.experts, device)

        def compute(received: Received = received) -> None:
            for _ in range(options.calls):
                bank.compute(received, family, bank.borrow((), group))

        compute()
        alone_s, staging_s, num_staged, staged_s = [], [], 0, 0.0
        for _ in range(options.rounds):
            alone_s.append(wall_seconds(compute, device))
            with _staging(bank, options.experts, arriving) as counted:
                seconds = wall_seconds(compute, device)
            staging_s.append(seconds)
            num_staged, staged_s = num_staged + counted[0], staged_s + seconds
        rows.append(
            {
                "rows": number,
                "alone_s": median(alone_s) / options.calls,
                "staging_s": median(staging_s) / options.calls,
                "slowdown": median(after / before for before, after in zip(alone_s, staging_s, strict=True)),
                "staged_bytes_per_s": num_staged * arriving.nbytes / staged_s,
            }
        )
    return rows


def _received(family: ExpertFamily, num_rows: int, num_experts: int, device: torch.device) -> Received:
    """So many rows for each expert."""
    num_pairs = num_rows * num_experts
    return Received(
        rows_MD=torch.randn(num_pairs, family.hidden_size, device=device, dtype=torch.bfloat16),
        row_N=torch.arange(num_pairs, device=device),
        weight_N=torch.ones(num_pairs, device=device),
        experts=tuple(range(num_experts)),
        offsets=tuple(range(0, num_pairs + 1, num_rows)),
    )


@contextmanager
def _staging(bank: ExpertBank, expert: int, arriving: Tensor) -> Iterator[list[int]]:
    """While open, a thread stages an expert over and over; how often it did."""
    ends, counted = threading.Event(), [0]
    stream = torch.cuda.Stream() if bank.packed(0).is_cuda else None

    @torch.no_grad()
    def stage() -> None:
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            while not ends.is_set():
                bank.stage(expert, ARRIVING).copy_(arriving, non_blocking=True)
                bank.verify_staged(expert)
                bank.discard_staged()
                counted[0] += 1

    thread = threading.Thread(target=stage, daemon=True)
    thread.start()
    try:
        yield counted
    finally:
        ends.set()
        thread.join()
