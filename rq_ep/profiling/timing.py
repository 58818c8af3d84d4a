"""Timing of calls on this machine, robust against other processes."""

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
    """Time of one call: on a CPU the CPU time of this thread, which other processes do not stretch."""
    if device.type != "cpu":
        return wall_seconds(run, device)
    start_s = time.thread_time()
    run()
    return time.thread_time() - start_s


def typical(run: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """The median time of repeated calls with a cold cache.

    In a model other layers run in between; the cache is cleared before each call, as Triton's `do_bench` does.

    Args:
        run: called once to warm up, then at least MIN_REPEATS times.
        device: on which it computes.
        budget_s: no further repeat after so long.
    """
    cache_filler = torch.zeros(CACHE_BYTES, dtype=torch.uint8, device=device)
    run()
    times: list[float] = []
    start_s = time.perf_counter()
    while len(times) < MIN_REPEATS or time.perf_counter() - start_s < budget_s:
        cache_filler.add_(1)
        times.append(own_seconds(run, device))
    return median(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
