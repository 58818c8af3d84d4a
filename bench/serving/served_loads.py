"""What the experts of a server did during a run, from its own `/v1/ep/load` and `/metrics`."""

import re
from typing import Any, NamedTuple, Self

import numpy as np

from bench.serving.local_client import local_client
from rq_ep.core.arrays import FloatArray, IntArray

COMPUTE_S = re.compile(r"^rq_ep_compute_seconds_total\{.*\} (\S+)$", re.MULTILINE)
SETTLED_S = 1.5  # ranks report once a second


class ServedLoads(NamedTuple):
    """Sums since the server started. Axes: L MoE layers, R ranks."""

    pairs_LR: IntArray
    calls_L: IntArray
    imbalance_sum_L: FloatArray  # of max/mean over ranks, call by call
    compute_s: float  # of rank 0, in its experts

    @classmethod
    def read(cls, url: str) -> Self:
        """Read a server that has answered requests, the last of them `SETTLED_S` ago."""
        with local_client(url, 60) as client:
            total = client.get("/v1/ep/load").raise_for_status().json()["total"]
            (compute_s,) = COMPUTE_S.findall(client.get("/metrics").raise_for_status().text)
        calls_L = np.array(total["num_calls_L"])
        return cls(np.array(total["pairs_LR"]), calls_L, calls_L * total["imbalance_L"], float(compute_s))

    def since(self, before: Self) -> dict[str, Any]:
        """Of the run since then: max/mean, and seconds in experts of a mean and of the slowest rank, all layers.

        Both are from rank 0's seconds a pair; that the slowest rank of a step is so is what its max/mean says.
        """
        pairs_LR, calls_L = self.pairs_LR - before.pairs_LR, self.calls_L - before.calls_L
        imbalance_L = (self.imbalance_sum_L - before.imbalance_sum_L) / calls_L
        seconds_a_pair = (self.compute_s - before.compute_s) / pairs_LR[:, 0].sum()
        mean_L = seconds_a_pair * pairs_LR.mean(axis=1)
        return {
            "imbalance": float(np.average(imbalance_L, weights=mean_L)),
            "mean_compute_s": float(mean_L.sum()),
            "slowest_compute_s": float((imbalance_L * mean_L).sum()),
        }
