"""How long something takes on this machine, whatever else it does meanwhile."""

import time
from collections.abc import Callable

import torch

MIN_REPEATS, MAX_REPEATS = 3, 100


def wall_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, until the device has finished it."""
    _finish(device)
    start_s = time.perf_counter()
    run()
    _finish(device)
    return time.perf_counter() - start_s


def own_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call that is its own: on a CPU that of this thread, which other processes do not stretch."""
    if device.type != "cpu":
        return wall_seconds(run, device)
    start_s = time.thread_time()
    run()
    return time.thread_time() - start_s


def shortest(run: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """The shortest own time of repeated calls: a neighbour's use of caches and memory only ever adds.

    Args:
        run: is called once to warm up, then between MIN_REPEATS and MAX_REPEATS times.
        device: that computes.
        budget_s: no further repeat after so long.
    """
    run()
    times = [own_seconds(run, device) for _ in range(MIN_REPEATS)]
    while sum(times) < budget_s and len(times) < MAX_REPEATS:
        times.append(own_seconds(run, device))
    return min(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
