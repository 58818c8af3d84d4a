"""What a decision takes is compiled before the first one is asked for."""

import gc
import subprocess
import sys

import numpy as np
import pytest

from rq_ep.core.strategy import RebalanceRule
from rq_ep.rebalancing.load_window import ObservedLoads
from rq_ep.rebalancing.rebalancer import RebalanceRequest, decide
from rq_ep.rebalancing.warm_up import warm_up
from rq_ep.solver.compiled import numba
from rq_ep.strategies import make_strategy
from tests.rebalancing.cases import problem_of, steps_SLE


def num_compiled() -> int:
    """Functions that this process has compiled or loaded, by the types of their arguments."""
    loops = [one for one in gc.get_objects() if isinstance(one, numba.core.dispatcher.Dispatcher)]
    return sum(len(loop.signatures) for loop in loops)


def decisions_compile_nothing_more() -> None:
    rq = make_strategy("rq")
    assert not warm_up(rq).stays
    after_warm_up = num_compiled()
    assert after_warm_up > 10
    placement = make_strategy("standard").place(problem_of(steps_SLE(0, 64, 1)))
    loads = ObservedLoads(steps_SLE(1, 64, 2), np.zeros(64, np.int64))
    decision = decide(RebalanceRequest(problem_of(loads.counts_SLE), rq, RebalanceRule(), placement, loads))
    assert not decision.stays
    assert num_compiled() == after_warm_up


@pytest.mark.skipif(numba is None, reason="nothing is compiled without numba")
def test_decisions_compile_nothing_more() -> None:
    command = f"from {__name__} import decisions_compile_nothing_more as run; run()"  # other tests compile here
    subprocess.run([sys.executable, "-c", command], check=True, timeout=300)
