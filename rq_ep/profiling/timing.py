"""How long something takes on this machine, whatever else it does meanwhile."""

import time
from collections.abc import Callable
from statistics import median

import torch

MIN_REPEATS = 3
CACHE_BYTES = 1 << 26  # more than a core's share of any cache, and than a GPU's


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


def typical(run: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """The median own time of repeated calls that find nothing of the last one in the cache.

    In a model other layers run in between; the cache is swept before each call, as Triton's `do_bench` does it.

    Args:
        run: is called once to warm up, then at least MIN_REPEATS times.
        device: that computes.
        budget_s: no further repeat after so long.
    """
    swept = torch.zeros(CACHE_BYTES, dtype=torch.uint8, device=device)
    run()
    times: list[float] = []
    start_s = time.perf_counter()
    while len(times) < MIN_REPEATS or time.perf_counter() - start_s < budget_s:
        swept.add_(1)
        times.append(own_seconds(run, device))
    return median(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
