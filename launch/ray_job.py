"""Run serving or a benchmark on a Ray cluster: one actor for each rank, in one placement group.

    python launch/ray_job.py --num-ranks 8 --gpus-per-rank 1 serve --model DIR --placement FILE --host 0.0.0.0
    python launch/ray_job.py --num-ranks 2 bench layer --shape tiny

What follows the program is handed to it unchanged. Every actor gets the environment torchrun would have set and calls
the same `main(argv)`. The first rank that fails ends the group with its number and its error, and `--max-restarts`
starts another one. SIGTERM (`ray job stop`) is passed on to rank 0, so that a server drains before it ends. Without a
cluster address, Ray is started right here.
"""

import argparse
import importlib
import importlib.util
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

START_TIMEOUT_S = 300
END_TIMEOUT_S = 10  # for ranks that are left when one has failed: a server tells its clients why


@dataclass(frozen=True, order=True)
class Seat:
    """Where an actor landed. Ranks are numbered in this order: node by node, then device by device."""

    node_id: str
    gpus: tuple[int, ...]
    pid: int
    address: str
    free_port: int


@ray.remote(max_restarts=0)
class Rank:
    def seat(self) -> Seat:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        context = ray.get_runtime_context()
        gpus = tuple(int(gpu) for gpu in ray.get_gpu_ids())
        return Seat(context.get_node_id(), gpus, os.getpid(), ray.util.get_node_ip_address(), port)

    def run(self, program: str, argv: Sequence[str], environment: dict[str, str]) -> Any:
        os.environ.update(environment)
        try:
            return find_main(program)(list(argv))
        except SystemExit as stop:  # argparse ends this way; an actor must not
            return stop.code or 0


def find_main(program: str) -> Callable[[list[str]], Any]:
    """The `main(argv)` of `serve`, of a module or package, or of a Python file relative to the working directory."""
    if not program.endswith(".py"):
        sys.path.insert(0, os.getcwd())  # as `python -m` does
        module = importlib.import_module("rq_ep.serve" if program == "serve" else program)
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{module.__name__}.__main__")
    else:
        spec = importlib.util.spec_from_file_location(Path(program).stem, program)
        if spec is None or spec.loader is None:
            raise FileNotFoundError(program)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up by name
        spec.loader.exec_module(module)
    return module.main


def environments(seats: Sequence[Seat]) -> list[dict[str, str]]:
    """What torchrun would set for each rank; rank 0's own address is the meeting point."""
    result = []
    for rank, seat in enumerate(seats):
        neighbours = [other for other in seats if other.node_id == seat.node_id]
        environment = {
            "RANK": rank,
            "WORLD_SIZE": len(seats),
            "LOCAL_RANK": neighbours.index(seat),
            "LOCAL_WORLD_SIZE": len(neighbours),
            "MASTER_ADDR": seats[0].address,
            "MASTER_PORT": seats[0].free_port,
        }
        if seat.gpus:  # Ray shows an actor its own device only; LOCAL_RANK counts all of the job's on this node
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for other in neighbours for gpu in other.gpus)
        result.append({name: str(value) for name, value in environment.items()})
    return result


@ray.remote(num_cpus=0)
def send_signal(pid: int, number: int) -> None:
    os.kill(pid, number)


class Stopper:
    """Handles SIGTERM: passes it on to rank 0, and remembers it, as a job that is to end must not be restarted."""

    def __init__(self) -> None:
        self.was_asked = False
        self.rank_0: Seat | None = None  # once it has one

    def __call__(self, number: int, _frame: object) -> None:
        self.was_asked = True
        if self.rank_0 is not None:
            affinity = NodeAffinitySchedulingStrategy(self.rank_0.node_id, soft=False)
            send_signal.options(scheduling_strategy=affinity).remote(self.rank_0.pid, number)


def run_once(options: argparse.Namespace, stopper: Stopper) -> tuple[list[Any] | None, str]:
    """Run the program on all ranks. Returns every rank's result, or None and what went wrong."""
    bundle = {"CPU": options.cpus_per_rank, "GPU": options.gpus_per_rank}
    bundle = {kind: amount for kind, amount in bundle.items() if amount}
    group = placement_group([bundle] * options.num_ranks, strategy="PACK")
    try:
        if not group.wait(START_TIMEOUT_S):
            return None, f"the cluster has no room for {options.num_ranks} x {bundle} within {START_TIMEOUT_S} s"
        actors = [
            Rank.options(
                num_cpus=options.cpus_per_rank,
                num_gpus=options.gpus_per_rank,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
            ).remote()
            for index in range(options.num_ranks)
        ]
        seated = zip(ray.get([actor.seat.remote() for actor in actors]), actors, strict=True)
        ordered = sorted(seated, key=lambda pair: pair[0])
        seats = [seat for seat, _ in ordered]
        stopper.rank_0 = seats[0]
        if stopper.was_asked:
            return None, "stopped before it had begun"
        runs = {
            actor.run.remote(options.program, options.arguments, environment): rank
            for rank, ((_, actor), environment) in enumerate(zip(ordered, environments(seats), strict=True))
        }
        results: dict[int, Any] = {}
        waiting = list(runs)
        while waiting:
            finished, waiting = ray.wait(waiting)
            rank = runs[finished[0]]
            try:
                result = results[rank] = ray.get(finished[0])
                problem = f"ended with exit code {result}" if isinstance(result, int) and result != 0 else None
            except ray.exceptions.RayError as error:
                problem = f"failed: {_first_cause(error)}"
            if problem is not None:
                if waiting:
                    ray.wait(waiting, num_returns=len(waiting), timeout=END_TIMEOUT_S)
                return None, f"rank {rank} on {seats[rank].address} {problem}"
        return [results[rank] for rank in range(options.num_ranks)], ""
    except ray.exceptions.RayError as error:  # a node has gone while the ranks took their seats
        return None, _first_cause(error)
    finally:
        stopper.rank_0 = None
        remove_placement_group(group)  # ends the actors that are left


def _first_cause(error: Exception) -> str:
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def main(argv: Sequence[str] | None = None) -> int:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-ranks", type=int, required=True, help="actors to start, one for each rank")
    parser.add_argument("--gpus-per-rank", type=int, default=0, choices=(0, 1), help="0 runs on the CPU over gloo")
    parser.add_argument("--cpus-per-rank", type=int, default=1)
    parser.add_argument("--max-restarts", type=int, default=0, help="start a failed group again this often")
    parser.add_argument("--json", type=Path, help="write rank 0's result here (benchmarks)")
    parser.add_argument("program", help="`serve`, `bench`, another module or a Python file that has main(argv)")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to the program")
    options = parser.parse_args(argv)

    local = {"address": "local", "num_cpus": options.num_ranks * options.cpus_per_rank, "include_dashboard": False}
    ray.init(log_to_driver=True, **({} if "RAY_ADDRESS" in os.environ else local))
    stopper = Stopper()
    signal.signal(signal.SIGTERM, stopper)
    try:
        for left in reversed(range(options.max_restarts + 1)):
            results, problem = run_once(options, stopper)
            if results is not None:
                break
            print(f"ray_job: error: {problem} ({left} restarts left)", file=sys.stderr)
            if stopper.was_asked:
                break
    finally:
        ray.shutdown()
    if results is None:
        return 1
    if isinstance(results[0], dict):
        text = json.dumps(results[0], indent=1)
        if options.json:
            options.json.write_text(text + "\n")
        else:
            print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
