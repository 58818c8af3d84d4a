"""What is compiled gives the same bits as the Python it is written in."""

import os
import subprocess
import sys

PLANS = """
import numpy as np
from rq_ep.core.cost import LayerCost
from rq_ep.core.placement import LayerPlacement
from rq_ep.core.topology import Topology
from rq_ep.solver.split.min_max_split import ByExpert, split
from rq_ep.strategies import make_strategy
from tests.solver.instances import random_replicas, skewed

COST = LayerCost(
    {"bf16": 1.0, "int8": 1.0}, {"bf16": 30.0, "int8": 15.0}, {"bf16": 90.0, "int8": 45.0}, row_s=0.1, latency_s=1.0
)
for seed in range(12):
    replicas = random_replicas(24, 6, 15, seed)
    counts_RE = np.stack([skewed(24, 10 ** (seed % 6), 10 * seed + rank)[0] for rank in range(6)])
    best = split(ByExpert.of(replicas, 6), counts_RE.sum(axis=0))
    print(best.fullest, best.cut, best.quotas_C.tolist())
    layer = LayerPlacement.even(0, 24, replicas)
    lent = make_strategy("rq_llep", transient_format="int8")
    for strategy in (make_strategy("rq"), make_strategy("eplb"), lent):
        plan = strategy.planner(layer, Topology(6, ranks_per_node=2), COST)(counts_RE)
        print(plan.bound, plan.transfers, plan.pairs_RP.tolist())
"""


def test_compiled_and_plain_python_give_the_same_bits() -> None:
    said = {
        subprocess.run(
            [sys.executable, "-c", PLANS],
            env={**os.environ, "NUMBA_DISABLE_JIT": disabled},
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        for disabled in ("0", "1")
    }
    assert len(said) == 1
    plans = said.pop()
    assert len(plans.splitlines()) == 48
    assert "bytes (" in plans  # steps of few pairs were among them
    assert "format='int8'" in plans  # and loans
