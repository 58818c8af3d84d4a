"""Times of the link between ranks: for rows in an all-to-all, and for packed experts.

Axes: S repeats of a measurement.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from rq_ep.costs import MACHINES
from rq_ep.costs.fit import Line, fit_line
from rq_ep.costs.measured import LinkTimings
from rq_ep.parallel import EPGroup
from rq_ep.profiling.timing import wall_seconds

BYTES = tuple(1 << power for power in range(12, 25, 3))  # 4 KiB to 16 MiB
NUM_REPEATS = 10


def named_link(machine: str) -> LinkTimings:
    """The link of a machine of the table, where there is no second rank to measure one with."""
    rates = MACHINES[machine]
    byte_s = 1 / rates.link_bytes_per_s
    return LinkTimings(f"not measured, that of machine {machine!r}", rates.latency_s, byte_s, byte_s)


def measured_link(group: EPGroup) -> LinkTimings:
    """Time all-to-all exchanges of rows, and experts that every rank sends to the next one. Every rank calls it."""

    def exchange(num_bytes: int) -> Callable[[], object]:
        splits = [0 if rank == group.rank else num_bytes // (group.size - 1) for rank in range(group.size)]
        send = torch.zeros(sum(splits), dtype=torch.uint8, device=group.device)
        return lambda: group.all_to_all(send, splits, splits)

    def transfer(num_bytes: int) -> Callable[[], object]:
        send, received = torch.zeros(2, num_bytes, dtype=torch.uint8, device=group.device)
        following, previous = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        return lambda: group.start_transfers([(send, following)], [(received, previous)]).wait()

    rows, experts = _line_of(group, BYTES, exchange), _line_of(group, BYTES, transfer)
    source = f"measured between {group.size} ranks, {group.backend}"
    return LinkTimings(source, rows.start_s, rows.each_s, experts.each_s)


def _line_of(group: EPGroup, sizes: Sequence[int], operation: Callable[[int], Callable[[], object]]) -> Line:
    """Seconds by size, fitted by a line: the fastest repeat of each size, as long as on its slowest rank."""
    of_size = []
    for size in sizes:
        run = operation(size)
        times = []
        for _ in range(1 + NUM_REPEATS):
            group.barrier()
            times.append(wall_seconds(run, group.device))
        times_RS = np.array(group.all_gather_object(times))[:, 1:]  # the first warms up
        of_size.append(float(times_RS.max(axis=0).min()))
    return fit_line(sizes, of_size)
