"""What a weight format costs and saves: bytes, error, and the time of one layer's experts against bf16.

    python -m bench formats                                      # Mixtral and DeepSeek-V3, a quarter of each size
    python -m bench formats --shapes gpt-oss-120b --rows 1 16 --formats int8 mxfp4
    python -m bench formats --device cuda --scale 1 --json bench/results/formats_h200.json
    python -m bench formats --table bench/results/formats_cpu.json bench/results/fidelity_demo.json   # measures nothing

Every format holds the same random experts, and computes the same rows, every expert as many. In a round each format is
called once, A B C and C B A in turn; ratios are to bf16 in the same round. On a CPU times are a thread's CPU time.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.formats.formats_table import markdown
from bench.layer.published import SHAPES, Shape, shape_name
from bench.options import bench_parser, check_device, check_positive
from bench.result import result_document
from rq_ep.commands.console import wide_console
from rq_ep.core.errors import UserError, check_choice, check_integer
from rq_ep.core.files.documents import check_writable, write_json
from rq_ep.formats import FORMATS, get_format
from rq_ep.moe import ExpertFamily
from rq_ep.moe.expert_compute import GroupedExperts, add_outputs
from rq_ep.moe.grouped_gemm import Stack
from rq_ep.parallel import Received
from rq_ep.profiling.timing import own_seconds

NATIVE = "bf16"
NUM_ERROR_ROWS = 64
WARM_UP_ROUNDS = 2


def family_of(shape: Shape) -> ExpertFamily:
    return ExpertFamily.gated(shape.hidden_size, shape.intermediate_size)


def draw_expert(family: ExpertFamily, number: int, args: argparse.Namespace) -> dict[str, Tensor]:
    """Weights in bf16, the same for every format."""
    random = torch.Generator().manual_seed(args.seed * 100_003 + number)
    return {
        name: (torch.randn(shape, generator=random) * shape[1] ** -0.5).bfloat16().to(args.device)
        for name, shape in family.layout.shapes.items()
    }


def stack_of(family: ExpertFamily, name: str, args: argparse.Namespace) -> Stack:
    stack = Stack.empty(get_format(name), family.layout, args.experts, torch.device(args.device))
    for number in range(args.experts):
        stack.at(number).copy_(stack.format.pack(draw_expert(family, number, args), family.layout))
    return stack


def received_rows(family: ExpertFamily, num_rows: int, args: argparse.Namespace) -> Received:
    """`num_rows` rows for each expert."""
    random = torch.Generator().manual_seed(args.seed)
    num_pairs = num_rows * args.experts
    return Received(
        rows_MD=torch.randn(num_pairs, family.hidden_size, generator=random).to(args.device, torch.bfloat16),
        row_N=torch.arange(num_pairs, device=args.device),
        weight_N=torch.ones(num_pairs, device=args.device),
        experts=tuple(range(args.experts)),
        offsets=tuple(range(0, num_pairs + 1, num_rows)),
    )


def compute(stack: Stack, received: Received, family: ExpertFamily) -> Tensor:
    partial_MD = torch.zeros(received.rows_MD.shape, device=received.rows_MD.device)
    every = list(range(len(received.experts)))
    add_outputs(partial_MD, received, GroupedExperts(stack, every, every), family)
    return partial_MD


def relative_errors(family: ExpertFamily, stacks: dict[str, Stack], args: argparse.Namespace) -> dict[str, Any]:
    """Of the weights of expert 0, and of its output, against the bf16 weights computed with in fp32."""
    weights = {name: weight.float() for name, weight in draw_expert(family, 0, args).items()}
    x_ND = received_rows(family, NUM_ERROR_ROWS, args).rows_MD[:NUM_ERROR_ROWS].float()
    exact_ND = family.forward(x_ND, FORMATS["fp32"], weights)
    errors = {}
    for name, stack in stacks.items():
        views = stack.experts[0]
        unpacked = {n: stack.format.dequantize(views, n, family.layout, torch.float32) for n in weights}
        differences = torch.stack([(unpacked[n] - weight).norm() for n, weight in weights.items()]).norm()
        size = torch.stack([weight.norm() for weight in weights.values()]).norm()
        output_ND = family.forward(x_ND.bfloat16(), stack.format, views).float()
        errors[name] = {
            "weight_error": float(differences / size),
            "output_error": float((output_ND - exact_ND).norm() / exact_ND.norm()),
        }
    return errors


def measure(shape: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each format and number of rows."""
    full = SHAPES[shape]
    family = family_of(
        Shape(full.hidden_size // args.scale, full.intermediate_size // args.scale, full.num_experts, full.top_k)
    )
    stacks = {name: stack_of(family, name, args) for name in args.formats}
    errors = relative_errors(family, stacks, args)
    device = torch.device(args.device)
    rows = []
    for num_rows in track(args.rows, f"{shape}, rows", console=Console(stderr=True)):
        received = received_rows(family, num_rows, args)
        seconds: dict[str, list[float]] = {name: [] for name in args.formats}
        for number in range(WARM_UP_ROUNDS + args.rounds):
            for name in args.formats if number % 2 else reversed(args.formats):
                own_s = own_seconds(partial(compute, stacks[name], received, family), device)
                if number >= WARM_UP_ROUNDS:
                    seconds[name].append(own_s)
        for name in args.formats:
            own_s = median(seconds[name])
            rows.append(
                {
                    "shape": shape,
                    "hidden_size": family.hidden_size,
                    "intermediate_size": full.intermediate_size // args.scale,
                    "experts": args.experts,
                    "format": name,
                    "rows_per_expert": num_rows,
                    "bytes_per_expert": stacks[name].format.nbytes(family.layout),
                    "bytes_per_full_expert": get_format(name).nbytes(family_of(full).layout),
                    **errors[name],
                    "seconds": own_s,
                    "ratio": median(np.array(seconds[name]) / np.array(seconds[NATIVE])),
                    "weight_bytes_per_second": stacks[name].nbytes / own_s,
                }
            )
    return rows


def tables(rows: list[dict[str, Any]], device: str) -> list[Table]:
    """For every shape: what each format is, and its time against bf16."""
    by_shape = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        of_shape = [row for row in rows if row["shape"] == shape]
        sizes = tuple(dict.fromkeys(row["rows_per_expert"] for row in of_shape))
        first = of_shape[0]
        what = f"{shape}: hidden {first['hidden_size']}, intermediate {first['intermediate_size']}; time against bf16"
        columns = [f"{size} rows" for size in sizes] + ["GB/s" if device == "cuda" else "us at 1st"]
        table = Table(
            "format", "MiB, full size", "of bf16", "weight error", "output error", *columns, box=None, title=what
        )
        native_bytes = next(row["bytes_per_full_expert"] for row in of_shape if row["format"] == NATIVE)
        for name in dict.fromkeys(row["format"] for row in of_shape):
            by_size = {row["rows_per_expert"]: row for row in of_shape if row["format"] == name}
            row = by_size[sizes[0]]
            speed = row["weight_bytes_per_second"] / 1e9 if device == "cuda" else 1e6 * row["seconds"]
            table.add_row(
                name,
                f"{row['bytes_per_full_expert'] / 2**20:.1f}", f"{row['bytes_per_full_expert'] / native_bytes:.3f}",
                f"{row['weight_error']:.2%}", f"{row['output_error']:.2%}",
                *(f"{by_size[size]['ratio']:.2f}" for size in sizes), f"{speed:,.0f}",
            )  # fmt: skip
        by_shape.append(table)
    return by_shape


def check(args: argparse.Namespace) -> None:
    """Check the options; bf16 comes first."""
    args.shapes = [shape_name(shape) for shape in args.shapes]
    args.formats = list(dict.fromkeys([NATIVE, *(check_choice("format", name, FORMATS) for name in args.formats)]))
    check_device(args.device)
    check_positive(args, "scale", "experts", "rounds", "threads", "rows")
    for shape in args.shapes:
        if args.scale > min(SHAPES[shape].hidden_size, SHAPES[shape].intermediate_size):
            raise UserError(f"--scale {args.scale}: leaves nothing of {shape}")
    check_integer("--seed", args.seed, 0)
    if args.json:
        check_writable(args.json)


def main(argv: Sequence[str]) -> None:
    """Time all formats; print a table of each shape."""
    parser = bench_parser("formats", __doc__)
    lows = [name for name, format_ in FORMATS.items() if not format_.is_native]
    parser.add_argument(
        "--shapes", nargs="+", default=["mixtral", "deepseek-v3"], metavar="NAME", help="of shapes.yaml"
    )
    parser.add_argument("--scale", type=int, default=4, metavar="N", help="divide hidden and intermediate size by it")
    parser.add_argument("--formats", nargs="+", default=lows, metavar="NAME", help="besides bf16")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 256, 1024], metavar="N",
                        help="rows of each expert")  # fmt: skip
    parser.add_argument("--experts", type=int, default=4, metavar="N", help="computed in one call")
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="times each format is called")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of a CPU")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and rows")
    parser.add_argument("--json", metavar="FILE", help="write the figures with command, commit and versions")
    parser.add_argument(
        "--table", nargs=2, metavar="FILE",
        help="print the README's table out of a file of this bench and one of fidelity.py",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.table:
        print(markdown(*args.table))
        return
    check(args)
    torch.set_num_threads(args.threads)
    rows = [row for shape in args.shapes for row in measure(shape, args)]
    for table in tables(rows, args.device):
        wide_console(160).print(table)
    if args.json:
        write_json(args.json, result_document("formats", argv, args, args.device, rows=rows))
