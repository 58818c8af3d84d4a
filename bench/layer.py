"""One MoE layer under several strategies: the same rows, routing, weights and kernels; only the plan differs.

    torchrun --nproc-per-node 2 bench/layer.py --shape tiny --scenario 80:4       # ranks are processes
    python bench/layer.py --local-ranks 8 --shape tiny                            # all ranks in this process

The protocol is in bench/README.md.
"""

import argparse
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rq_ep.commands.common import parse_names, parse_strategies
from rq_ep.config import Environment
from rq_ep.core.arrays import FloatArray, IntArray
from rq_ep.core.errors import UserError, check_integer
from rq_ep.core.files import check_writable, replacing
from rq_ep.core.placement import PlacementProblem, standard_ep_bytes
from rq_ep.core.plan import imbalance
from rq_ep.core.stats import ExpertStats
from rq_ep.core.strategy import Strategy
from rq_ep.core.topology import Topology
from rq_ep.formats import ExpertLayout, get_format, native_format_name
from rq_ep.moe import EPExperts, ExpertFamily, Telemetry
from rq_ep.parallel import EPGroup, RankFailure, TorchGroup, run_local
from rq_ep.parallel.default import own_device
from rq_ep.parallel.reference import dense_moe

NUM_CALIBRATION_STEPS = 16
NUM_BATCHES = 4  # different batches that take turns
NUM_REFERENCE_ROWS = 32  # rows of each rank that are compared with the dense layer
WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


SHAPES = {
    "tiny": Shape(256, 256, 8, 2),
    "olmoe": Shape(2048, 1024, 64, 8),
    "qwen3_moe": Shape(2048, 768, 128, 8),
    "mixtral": Shape(4096, 14336, 8, 2),
    "gpt_oss": Shape(2880, 2880, 128, 4),
    "deepseek_v3": Shape(7168, 2048, 256, 8),
}


@dataclass(frozen=True)
class Scenario:
    """How the router spreads pairs: `hot_share` of them on experts 0 to `num_hot` - 1, which rank 0 holds first.

    With `is_distinct` a token names an expert once, as a real router does; otherwise it may repeat one, as in the
    published LLEP scenarios (arXiv 2601.17111).
    """

    hot_share: float
    num_hot: int
    is_distinct: bool

    @classmethod
    def parse(cls, text: str, shape: Shape) -> "Scenario":
        """Read `80:4`, `distinct:80:4` or `balanced`."""
        if text == "balanced":
            return cls(0.0, 0, is_distinct=True)
        kind, _, numbers = text.rpartition("distinct:")
        try:
            percent, num_hot = map(int, numbers.split(":"))
        except ValueError:
            raise UserError(f"--scenario {text}: write PERCENT:EXPERTS, distinct:PERCENT:EXPERTS or balanced") from None
        is_distinct = text.startswith("distinct:")
        if kind or not 0 <= percent <= 100 or not 0 < num_hot < shape.num_experts:
            raise UserError(f"--scenario {text}: percent in 0..100, experts in 1..{shape.num_experts - 1}")
        hot_slots = percent / 100 * shape.top_k
        if is_distinct and (hot_slots > num_hot or shape.top_k - hot_slots > shape.num_experts - num_hot):
            raise UserError(
                f"--scenario {text}: with {shape.top_k} distinct experts a token, {num_hot} of {shape.num_experts} "
                f"experts hold between {max(0, shape.top_k - shape.num_experts + num_hot) / shape.top_k:.0%} and "
                f"{min(1, num_hot / shape.top_k):.0%} of the pairs"
            )
        return cls(percent / 100, num_hot, is_distinct)

    def ids(self, random: np.random.Generator, num_tokens: int, shape: Shape) -> IntArray:
        """[T, K] experts of each token."""
        num_experts, top_k, num_hot = shape.num_experts, shape.top_k, self.num_hot
        if not num_hot:
            return random.random((num_tokens, num_experts)).argsort(axis=1)[:, :top_k]
        if self.is_distinct:
            hot_slots = self.hot_share * top_k
            num_hot_T = np.floor(hot_slots + random.random(num_tokens)).astype(np.int64)
            keys_TE = random.random((num_tokens, num_experts))
            # A token takes its hot slots from a shuffle of the hot experts, the rest from one of the others.
            place_TH = keys_TE[:, :num_hot].argsort(axis=1).argsort(axis=1)
            place_TC = keys_TE[:, num_hot:].argsort(axis=1).argsort(axis=1)
            chosen_TE = np.hstack([place_TH < num_hot_T[:, None], place_TC < (top_k - num_hot_T)[:, None]])
            return np.nonzero(chosen_TE)[1].reshape(num_tokens, top_k)
        is_hot_N = np.zeros(num_tokens * top_k, bool)
        is_hot_N[: round(self.hot_share * is_hot_N.size)] = True
        random.shuffle(is_hot_N)
        hot_N = random.integers(0, num_hot, is_hot_N.size)
        cold_N = random.integers(num_hot, num_experts, is_hot_N.size)
        return np.where(is_hot_N, hot_N, cold_N).reshape(num_tokens, top_k)


class Batch(NamedTuple):
    """The rows of one rank in one step."""

    hidden_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


@dataclass(frozen=True)
class Bench:
    """What is measured: everything follows from these fields and the seed."""

    shape: Shape
    scenario: Scenario
    strategies: dict[str, Strategy]
    formats: tuple[str, ...]
    dtype: torch.dtype
    tokens_per_rank: int
    num_rounds: int
    seed: int

    @property
    def family(self) -> ExpertFamily:
        D, F_ = self.shape.hidden_size, self.shape.intermediate_size
        return ExpertFamily(ExpertLayout({"gate_up_proj": (2 * F_, D), "down_proj": (D, F_)}), _silu_gate)

    def ids(self, kind: str, step: int, rank: int) -> IntArray:
        """[T, K] of one rank and step; `kind` keeps calibration and measurement apart."""
        random = np.random.default_rng([self.seed, {"calibrate": 0, "measure": 1}[kind], step, rank])
        return self.scenario.ids(random, self.tokens_per_rank, self.shape)

    def batch(self, step: int, rank: int, device: torch.device) -> Batch:
        ids_TK = self.ids("measure", step, rank)
        random = torch.Generator().manual_seed(hash((self.seed, step, rank)))
        hidden_TD = torch.randn(len(ids_TK), self.shape.hidden_size, generator=random)
        weights_TK = torch.rand(ids_TK.shape, generator=random).softmax(-1)
        return Batch(hidden_TD.to(device, self.dtype), torch.from_numpy(ids_TK).to(device), weights_TK.to(device))

    def expert(self, number: int, device: torch.device) -> dict[str, Tensor]:
        """Weights of an expert, the same for every strategy, rank and device."""
        random = torch.Generator().manual_seed(self.seed * 100_003 + number)
        return {
            name: (torch.randn(shape, generator=random) * shape[1] ** -0.5).to(device, self.dtype)
            for name, shape in self.family.layout.shapes.items()
        }

    def stats(self, num_ranks: int) -> ExpertStats:
        """Calibration: loads of steps that are not measured, from the same generator."""
        counts_SE = [
            np.bincount(
                np.concatenate([self.ids("calibrate", step, rank) for rank in range(num_ranks)]).ravel(),
                minlength=self.shape.num_experts,
            )
            for step in range(NUM_CALIBRATION_STEPS)
        ]
        sizes = {name: get_format(name).nbytes(self.family.layout) for name in self.formats}
        return ExpertStats(np.stack(counts_SE)[:, None], self.formats, self.formats[0], sizes, top_k=self.shape.top_k)


class Timing(NamedTuple):
    """One rank, one strategy, one round."""

    wall_s: float
    cpu_s: float


def measure(bench: Bench, group: EPGroup) -> list[dict[str, Any]]:
    """Run every strategy in turn, A B C then C B A, on the same batches; one row for each, the same on every rank."""
    stats = bench.stats(group.size)
    topology = Topology(group.size)
    budget = (standard_ep_bytes(stats, group.size),) * group.size
    uses_cpu = group.device.type == "cpu"
    layers: dict[str, EPExperts] = {}
    for name, strategy in bench.strategies.items():
        # LLEP's and standard EP's contiguous blocks are the budget; the others must fit into the same bytes.
        placement = strategy.place(PlacementProblem(stats, topology, budget, bench.formats))
        telemetry = Telemetry(clock=time.thread_time if uses_cpu else None)
        layer = placement.layers[0]
        layers[name] = EPExperts(bench.family, layer, strategy.planner(layer, topology), group, telemetry=telemetry)
        for expert in layers[name].bank.experts:
            layers[name].bank.put(expert, bench.expert(expert, group.device))
    batches = [bench.batch(step, group.rank, group.device) for step in range(NUM_BATCHES)]

    timings: dict[str, list[Timing]] = {name: [] for name in layers}
    for number in range(-WARM_UP_ROUNDS, bench.num_rounds):
        if number == 0:
            for name in layers:
                timings[name].clear()
                layers[name].telemetry.clear()
        for name in sorted(layers, key=list(layers).index, reverse=bool(number % 2)):
            timings[name].append(_time_call(layers[name], batches[number % NUM_BATCHES], group))
    errors = {name: _output_error(bench, layer, batches[0]) for name, layer in layers.items()}
    mine = {
        name: {
            "timings": np.array(timings[name]),
            "compute_s": layer.telemetry.seconds("compute")[:, 0, group.rank],
            "plan_s": layer.telemetry.seconds("plan")[:, 0, group.rank],
            "resident_bytes": layer.bank.nbytes,
            "borrowed_bytes": layer.bank.spare.nbytes,
            "error": errors[name],
        }
        for name, layer in layers.items()
    }
    gathered = group.all_gather_object(mine)
    rows = [
        _row(name, bench.strategies[name], layers[name].telemetry, [ranks[name] for ranks in gathered])
        for name in layers
    ]
    for row in rows:
        row["wall_s"] = None if group.backend == "local" else row["wall_s"]
        for figure in ("compute_s", "cpu_s", "wall_s"):
            row[f"{figure}_ratio"] = None if row[figure] is None else _ratio(row, rows, figure)
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def _time_call(layer: EPExperts, batch: Batch, group: EPGroup) -> Timing:
    group.barrier()
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)
    wall_s, cpu_s = time.perf_counter(), time.thread_time()
    layer(*batch)
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)
    return Timing(time.perf_counter() - wall_s, time.thread_time() - cpu_s)


def _output_error(bench: Bench, layer: EPExperts, batch: Batch) -> tuple[float, float]:
    """Squared norms of the difference from the dense layer in full precision, and of the dense layer's output."""
    format_ = get_format(native_format_name(torch.float32))

    def expert(number: int, x_ND: Tensor) -> Tensor:
        weights = {name: weight.float() for name, weight in bench.expert(number, x_ND.device).items()}
        return bench.family.forward(x_ND, format_, weights)

    rows = slice(NUM_REFERENCE_ROWS)
    out_TD = layer(*batch)[rows].float()
    exact_TD = dense_moe(batch.hidden_TD[rows].float(), batch.ids_TK[rows], batch.weights_TK[rows], expert)
    return float((out_TD - exact_TD).square().sum()), float(exact_TD.square().sum())


def _row(name: str, strategy: Strategy, telemetry: Telemetry, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one strategy. Names that begin with _ are arrays over rounds, [S], for ratios."""
    loads_SR = telemetry.loads()[:, 0]
    timings_RS2 = np.stack([rank["timings"] for rank in ranks])
    num_rounds = timings_RS2.shape[1]
    compute_RS = np.stack([rank["compute_s"] for rank in ranks])[:, :num_rounds]
    slowest = {
        "compute_s": compute_RS.max(axis=0),
        "cpu_s": timings_RS2[..., 1].max(axis=0),
        "wall_s": timings_RS2[..., 0].max(axis=0),
        "plan_s": np.stack([rank["plan_s"] for rank in ranks])[:, :num_rounds].max(axis=0),
    }
    difference, size = np.sum([rank["error"] for rank in ranks], axis=0)
    imbalance_S = np.array([imbalance(loads_R) for loads_R in loads_SR[:num_rounds]])
    return {
        "strategy": name,
        "settings": asdict(strategy),  # type: ignore[call-overload]
        **{f"_{figure}": values_S for figure, values_S in slowest.items()},
        **{figure: _quantiles(values_S) for figure, values_S in slowest.items()},
        "compute_s_by_rank": np.median(compute_RS, axis=1).tolist(),
        "imbalance_mean": float(imbalance_S.mean()),
        "imbalance_worst": float(imbalance_S.max()),
        "pairs_by_rank": loads_SR[:num_rounds].mean(axis=0).tolist(),
        "ideal_ratio": float((1 / imbalance_S).mean()),
        "resident_bytes_by_rank": [rank["resident_bytes"] for rank in ranks],
        "borrowed_bytes_by_rank": [rank["borrowed_bytes"] for rank in ranks],
        "transfer_bytes_per_step": float(telemetry.transfer_bytes()[:num_rounds, 0].sum(axis=-1).mean()),
        "output_error": float(np.sqrt(difference / size)) if size else 0.0,
    }


def _quantiles(values_S: FloatArray) -> dict[str, float]:
    return {f"p{percent}": float(np.percentile(values_S, percent)) for percent in (25, 50, 75, 99)}


def _ratio(row: dict[str, Any], rows: list[dict[str, Any]], figure: str) -> float:
    """Median over rounds of this strategy's figure to the first one's in the same round."""
    return float(np.median(row[f"_{figure}"] / np.maximum(rows[0][f"_{figure}"], 1e-9)))


def _silu_gate(up_NF: Tensor) -> Tensor:
    gate, up = up_NF.chunk(2, dim=-1)
    return F.silu(gate) * up


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="tiny", help="sizes of the layer, from a known model")
    add("--hidden-size", type=int, help="instead of the shape's")
    add("--intermediate-size", type=int, help="instead of the shape's")
    add("--tokens-per-rank", type=int, default=512)
    add("--local-ranks", type=int, help="ranks inside this process, which compute one at a time; no wall clock")
    add("--strategies", default="standard,eplb,llep,rq", help="the first is what ratios refer to")
    add("--set", action="append", default=[], metavar="NAME.SETTING=VALUE", help="a strategy's setting, repeatable")
    add("--scenario", default="80:4", help="PERCENT:EXPERTS (repeats allowed), distinct:PERCENT:EXPERTS or balanced")
    add("--formats", help="formats rq may use, native first; default: the dtype's own")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--steps", "--pairs", dest="num_rounds", type=int, default=20, help="rounds; each runs every strategy once")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1, help="threads of each rank on a CPU")
    add("--pin", action="store_true", help="bind each rank to a core of its own")
    add("--json", type=Path, metavar="OUT", help="write the result here, from rank 0")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args(argv)


def bench_of(args: argparse.Namespace) -> Bench:
    """Check the options and put them together."""
    for name in ("hidden_size", "intermediate_size", "tokens_per_rank", "num_rounds", "local_ranks", "threads"):
        if (value := getattr(args, name)) is not None:
            check_integer(f"--{name.replace('_', '-')}", value, 1)
    check_integer("--seed", args.seed)
    if args.local_ranks and args.pin:
        raise UserError("--pin: ranks in one process share its cores; drop it, or start processes with torchrun")
    if args.json:
        check_writable(args.json)
    sizes = {name: getattr(args, name) for name in ("hidden_size", "intermediate_size") if getattr(args, name)}
    shape = replace(SHAPES[args.shape], **sizes)
    dtype = getattr(torch, args.dtype)
    native = native_format_name(dtype)
    formats = tuple(parse_names(args.formats or native))
    if get_format(formats[0]).name != native:
        raise UserError(f"--formats {args.formats}: the first must be {native}, the native one of --dtype {args.dtype}")
    return Bench(
        shape=shape,
        scenario=Scenario.parse(args.scenario, shape),
        strategies=parse_strategies(parse_names(args.strategies), args.set),
        formats=formats,
        dtype=dtype,
        tokens_per_rank=args.tokens_per_rank,
        num_rounds=args.num_rounds,
        seed=args.seed,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark on this rank of a launcher's group, or on ranks in this process; returns the result.

    Raises:
        UserError: an option makes no sense.
        RankFailure: another rank has ended.
    """
    args = parse(argv)
    bench = bench_of(args)
    torch.set_num_threads(args.threads)
    started_s = time.monotonic()
    if args.local_ranks:
        device = own_device(args.device).type
        rows = run_local(args.local_ranks, lambda group: measure(bench, group), device)[0]
        rank, num_ranks, backend = 0, args.local_ranks, "local"
    else:
        if args.pin:
            _pin(args.threads)
        group = TorchGroup.from_environment(args.device)
        try:
            rows = measure(bench, group)
        finally:
            group.close()
        rank, num_ranks, backend, device = group.rank, group.size, group.backend, group.device.type
    result = {
        "bench": "layer",
        "command": shlex.join([sys.executable.rpartition("/")[2], "bench/layer.py", *(argv or sys.argv[1:])]),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "num_ranks": num_ranks,
        "backend": backend,
        "device": device,
        "shape": asdict(bench.shape),
        "scenario": asdict(bench.scenario),
        "formats": bench.formats,
        "seed": bench.seed,
        "seconds": time.monotonic() - started_s,
        "commit": _commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "transformers": version("transformers")},
        "hardware": _hardware(device),
        "rows": rows,
    }  # fmt: skip
    if rank == 0:
        show(result)
        if args.json:
            with replacing(args.json) as temporary:
                temporary.write_text(json.dumps(result, indent=1) + "\n")
    return result


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    clock = "CPU" if result["device"] == "cpu" else "GPU"
    options = result["options"]
    table = Table(
        title=f"{result['num_ranks']} ranks ({result['backend']} on {result['device']}), {options['shape']}, "
        f"{options['scenario']}, {options['tokens_per_rank']} tokens a rank; times of the slowest rank, p50 / p99"
    )
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("\nstrategy", lambda row: row["strategy"]),
        ("max/mean\nload", lambda row: f"{row['imbalance_mean']:.3f}"),
        (f"expert compute\n{clock} ms", lambda row: _ms(row["compute_s"])),
        ("\nratio", lambda row: f"{row['compute_s_ratio']:.3f}"),
        ("whole layer\nCPU ms", lambda row: _ms(row["cpu_s"])),
        ("wall clock\nms", lambda row: _ms(row["wall_s"]) if row["wall_s"] else "-"),
        ("\nratio", lambda row: f"{row['wall_s_ratio']:.3f}" if row["wall_s"] else "-"),
        ("plan\nus", lambda row: f"{row['plan_s']['p50'] * 1e6:.0f}"),
        ("MiB\na rank", lambda row: f"{max(row['resident_bytes_by_rank']) / 2**20:.1f}"),
        ("borrowed\nMiB/step", lambda row: f"{row['transfer_bytes_per_step'] / 2**20:.1f}"),
        ("output\nerror", lambda row: f"{row['output_error']:.1e}"),
    ]
    for title, _ in columns:
        table.add_column(title, justify="left" if title == "\nstrategy" else "right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(*(cell(row) for _, cell in columns))
    console = Console(width=max(150, Console().width))
    console.print(table)
    first = result["rows"][0]
    console.print(f"ratios are to {first['strategy']}; perfect balance would be {first['ideal_ratio']:.3f}")


def _ms(quantiles_s: dict[str, float]) -> str:
    return f"{quantiles_s['p50'] * 1e3:.2f} / {quantiles_s['p99'] * 1e3:.2f}"


def _pin(num_cores: int) -> None:
    """Bind this process to its share of the cores it may use, before it starts threads."""
    cores = sorted(os.sched_getaffinity(0))
    first = Environment.from_os().local_rank * num_cores
    if first + num_cores > len(cores):
        raise UserError(f"--pin: {len(cores)} cores are too few for local rank {first // num_cores} x {num_cores}")
    os.sched_setaffinity(0, cores[first : first + num_cores])


def _commit() -> str | None:
    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "../rq_ep", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _hardware(device: str) -> dict[str, Any]:
    model = platform.processor()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        model = next(
            (line.partition(": ")[2] for line in cpuinfo.read_text().splitlines() if "model name" in line), model
        )
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"cpu": model, "num_cores": os.cpu_count(), "load_average": os.getloadavg()[0], "gpu": gpu}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except (UserError, RankFailure) as error:
        print(f"bench/layer.py: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
