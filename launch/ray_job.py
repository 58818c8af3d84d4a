"""Run serving or a benchmark on a Ray cluster: one actor for each rank, in one placement group.

    python launch/ray_job.py --num-ranks 8 --gpus-per-rank 1 serve --model DIR --placement FILE --host 0.0.0.0
    python launch/ray_job.py --num-ranks 2 bench layer --shape tiny

What follows the program is handed to it unchanged. Every actor gets the environment torchrun would have set and calls
the same `main(argv)`. The first rank that fails ends the group with its number and its error, and `--max-restarts`
starts another one; but a server that serves goes on without a rank whose actor or node has died, until a new actor has
joined it. With `--min-ranks` a server begins with the actors for which there is room, outside of a placement group, and
the others join it when there is. SIGTERM (`ray job stop`) is passed on to one rank, so that a server drains before it
ends. Without a cluster address, Ray is started right here.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.queue import Queue
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

    def run(self, program: str, argv: Sequence[str], environment: dict[str, str], serving: Queue, joined: Any) -> Any:
        """Run the program. A server says on `serving` how its group can be joined, and joins one that is given."""
        os.environ.update(environment)
        main = find_main(program)
        if program == "serve":
            from rq_ep.serve.supervisor.rank_start import HubAddress

            main = functools.partial(
                main, on_serving=lambda hub: serving.put(astuple(hub)), joined=joined and HubAddress(*joined)
            )
        try:
            return main(list(argv))
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


def environment_of(rank: int, seats: Mapping[int, Seat], num_ranks: int) -> dict[str, str]:
    """What torchrun would set for a rank; rank 0's own address is the meeting point."""
    seat = seats[rank]
    neighbours = [other for _, other in sorted(seats.items()) if other.node_id == seat.node_id]
    environment = {
        "RANK": rank,
        "WORLD_SIZE": num_ranks,
        "LOCAL_RANK": neighbours.index(seat),
        "LOCAL_WORLD_SIZE": len(neighbours),
        "MASTER_ADDR": seats[0].address,
        "MASTER_PORT": seats[0].free_port,
    }
    if seat.gpus:  # Ray shows an actor its own device only; LOCAL_RANK counts all of the job's on this node
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for other in neighbours for gpu in other.gpus)
    return {name: str(value) for name, value in environment.items()}


@ray.remote(num_cpus=0)
def send_signal(pid: int, number: int) -> None:
    os.kill(pid, number)


class Stopper:
    """Handles SIGTERM: passes it on to a rank, and remembers it, as a job that is to end must not be restarted.

    Before ranks run there is only a wait for room, which may be long: it ends as by Ctrl-C.
    """

    def __init__(self) -> None:
        self.was_asked = False
        self.seat: Seat | None = None  # of a rank that runs, once there is one

    def __call__(self, number: int, _frame: object) -> None:
        self.was_asked = True
        if self.seat is None:
            raise KeyboardInterrupt
        affinity = NodeAffinitySchedulingStrategy(self.seat.node_id, soft=False)
        send_signal.options(scheduling_strategy=affinity).remote(self.seat.pid, number)


class Run:
    """One run of the program on all ranks, in the bundles of a placement group; without one, wherever there is room."""

    def __init__(self, options: argparse.Namespace, stopper: Stopper, group: PlacementGroup | None) -> None:
        self._options = options
        self._stopper = stopper
        self._group = group
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._serving = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})  # how ranks can join
        self._joined: Any = None  # what came there last: the program goes on without ranks that die
        self._bundles: list[int] = []  # of each rank
        self._seats: dict[int, Seat] = {}  # of the ranks that have had an actor
        self._arguments: list[str] = list(options.arguments)
        self._runs: dict[ray.ObjectRef, int] = {}  # of the ranks that have an actor
        self._coming: dict[ray.ObjectRef, tuple[int, Any]] = {}  # seats of new actors, of which rank
        self._num_replaced: Counter[int] = Counter()
        self._actors: list[Any] = []

    def results(self) -> tuple[list[Any] | None, str]:
        """Every rank's result, or None and what went wrong."""
        num_ranks, min_ranks = self._options.num_ranks, self._options.min_ranks
        actors = [self._actor(bundle) for bundle in range(num_ranks)]
        seating = [actor.seat.remote() for actor in actors]
        come, _ = ray.wait(seating, num_returns=min_ranks, timeout=START_TIMEOUT_S)
        if len(come) >= min_ranks:
            come, _ = ray.wait(seating, num_returns=num_ranks, timeout=self._options.wait_for_ranks)
        if len(come) < min_ranks:
            what = f"the cluster has room for {len(come)} of {num_ranks} ranks within {START_TIMEOUT_S} s"
            return None, f"{what}, and --min-ranks asks for {min_ranks}"
        seats = {bundle: ray.get(seating[bundle]) for bundle in range(num_ranks) if seating[bundle] in come}
        seated = sorted(seats, key=lambda bundle: seats[bundle])
        self._bundles = [*seated, *(bundle for bundle in range(num_ranks) if bundle not in seats)]
        self._seats = {rank: seats[bundle] for rank, bundle in enumerate(seated)}
        if len(seated) < num_ranks:
            print(f"ray_job: begins with {len(seated)} of {num_ranks} ranks; the others join it", file=sys.stderr)
            self._arguments += ["--min-ranks", str(len(seated)), "--wait-for-ranks", "0"]
        for rank, bundle in enumerate(self._bundles):
            if bundle in seats:
                self._start(rank, actors[bundle])
            else:
                self._coming[seating[bundle]] = (rank, actors[bundle])
        results: dict[int, Any] = {}
        deaths: list[str] = []
        while self._runs:
            self._stopper.seat = self._seats[min(self._runs.values())]
            (finished,), _ = ray.wait([*self._runs, *self._coming])
            rank, actor = self._coming.pop(finished, None) or (self._runs.pop(finished), None)
            where = f"rank {rank}" + (f" on {self._seats[rank].address}" if rank in self._seats else "")
            problem = None
            try:
                result = ray.get(finished)
                if actor is not None:
                    self._seats[rank] = result
                    self._start(rank, actor)
                else:
                    results[rank] = result
                    problem = f"{where} ended with exit code {result}" if result and isinstance(result, int) else None
            except ray.exceptions.RayError as error:
                problem = f"{where} failed: {_first_cause(error)}"
                if actor is not None or self._goes_on():
                    deaths.append(problem)
                    print(f"ray_job: {problem}; the other ranks go on", file=sys.stderr)
                    self._replace(rank)
                    continue
            if problem is not None:
                if self._runs:
                    ray.wait(list(self._runs), num_returns=len(self._runs), timeout=END_TIMEOUT_S)
                return None, "; ".join([*deaths, problem])
        return [results.get(rank) for rank in range(self._options.num_ranks)], ""

    def _actor(self, bundle: int) -> Any:
        actor = Rank.options(
            num_cpus=self._options.cpus_per_rank,
            num_gpus=self._options.gpus_per_rank,
            scheduling_strategy="DEFAULT"
            if self._group is None
            else PlacementGroupSchedulingStrategy(self._group, bundle),
        ).remote()
        self._actors.append(actor)
        return actor

    def close(self) -> None:
        """End the actors that are left."""
        for actor in self._actors:
            ray.kill(actor)

    def _start(self, rank: int, actor: Any) -> None:
        if self._stopper.was_asked:
            return
        self._learn_how_to_join()
        environment = environment_of(rank, self._seats, self._options.num_ranks)
        run = actor.run.remote(self._options.program, self._arguments, environment, self._serving, self._joined)
        self._runs[run] = rank

    def _goes_on(self) -> bool:
        """Whether there are ranks left that serve without one that has died."""
        self._learn_how_to_join()
        return self._joined is not None and len(self._runs) > 0

    def _learn_how_to_join(self) -> None:
        while not self._serving.empty():
            self._joined = self._serving.get()

    def _replace(self, rank: int) -> None:
        """Start an actor for a rank that has none, once its bundle has a node."""
        if not self._stopper.was_asked and self._num_replaced[rank] < self._options.max_actor_restarts:
            self._num_replaced[rank] += 1
            actor = self._actor(self._bundles[rank])
            self._coming[actor.seat.remote()] = (rank, actor)


def has_room(group: PlacementGroup, ranks: str) -> bool:
    """Wait for room for the ranks of a group, a second at a time: one wait for all of the time would hear no signal."""
    for waited_s in range(START_TIMEOUT_S):
        if group.wait(1):
            return True
        if waited_s == 0:
            print(f"ray_job: waiting for room for {ranks}", file=sys.stderr, flush=True)
    return False


def run_once(options: argparse.Namespace, stopper: Stopper) -> tuple[list[Any] | None, str]:
    """Run the program on all ranks. Returns every rank's result, or None and what went wrong."""
    bundle = {"CPU": options.cpus_per_rank, "GPU": options.gpus_per_rank}
    bundle = {kind: amount for kind, amount in bundle.items() if amount}
    group = None  # which would be there as a whole or not at all
    if options.min_ranks == options.num_ranks:
        group = placement_group([bundle] * options.num_ranks, strategy="PACK")
    try:
        if group is not None and not has_room(group, f"{options.num_ranks} x {bundle}"):
            return None, f"the cluster has no room for {options.num_ranks} x {bundle} within {START_TIMEOUT_S} s"
        run = Run(options, stopper, group)
        try:
            return run.results()
        finally:
            run.close()
    except ray.exceptions.RayError as error:  # a node has gone while the ranks took their seats
        return None, _first_cause(error)
    finally:
        stopper.seat = None
        if group is not None:
            remove_placement_group(group)


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
    parser.add_argument("--gpus-per-rank", type=int, default=0, choices=(0, 1), help="0 runs on the CPU over gloo [0]")
    parser.add_argument("--cpus-per-rank", type=int, default=1, help="cores that Ray reserves for a rank [1]")
    parser.add_argument("--max-restarts", type=int, default=0, help="start a failed group again this often [0]")
    parser.add_argument(
        "--max-actor-restarts",
        type=int,
        default=3,
        help="start an actor again this often while others serve [3]",
    )
    parser.add_argument(
        "--min-ranks",
        type=int,
        help="begin to serve with so many; others join when there is room for them [all]",
    )
    parser.add_argument(
        "--wait-for-ranks", type=float, help="seconds to wait for the others once there are --min-ranks [30]"
    )
    parser.add_argument("--json", type=Path, help="write rank 0's result here (benchmarks)")
    parser.add_argument("program", help="`serve`, `bench`, another module or a Python file that has main(argv)")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to the program")
    options = parser.parse_args(argv)
    if options.min_ranks is None and options.wait_for_ranks is not None:
        parser.error("--wait-for-ranks: needs --min-ranks: all ranks are waited for")
    if options.wait_for_ranks is None:
        options.wait_for_ranks = 30.0
    if options.min_ranks is None:
        options.min_ranks = options.num_ranks
    if options.num_ranks < 1:
        parser.error(f"--num-ranks {options.num_ranks}: must be at least 1")
    if not 1 <= options.min_ranks <= options.num_ranks:
        parser.error(f"--min-ranks {options.min_ranks}: must lie in 1..{options.num_ranks} (--num-ranks)")
    if options.min_ranks < options.num_ranks and options.program != "serve":
        parser.error(f"--min-ranks {options.min_ranks}: only serve begins without some of its ranks")
    try:
        return run(options)
    except KeyboardInterrupt:
        print("ray_job: stopped", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """Run the program, again where it fails and may be restarted. Returns the exit status."""
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
