"""Compiled loops give the same bits as the Python they are written in, and are never stale."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import rq_ep

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
    choice = make_strategy("rq").planner(layer, Topology(6, ranks_per_node=2), COST).choose(counts_RE)
    print("waits for weights:", choice.waits_for_weights)
    for strategy in (make_strategy("rq"), make_strategy("eplb"), lent):
        plan = strategy.planner(layer, Topology(6, ranks_per_node=2), COST)(counts_RE)
        print(plan.transfers, plan.pairs_RP.tolist())
"""


@pytest.mark.slow
def test_compiled_and_plain_python_give_the_same_bits() -> None:
    outputs = {
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
    assert len(outputs) == 1
    plans = outputs.pop()
    assert len(plans.splitlines()) == 60
    assert "waits for weights: True" in plans  # steps of few pairs were among them
    assert "format='int8'" in plans  # and loans


CALLEE = """
from rq_ep.solver.compiled import compiled
STEP = {step}
@compiled
def next_of(number):
    return number {operator} STEP
"""
CALLER = """
from callee import next_of
from rq_ep.solver.compiled import compiled, compiled_part
@compiled
def twice(number):
    return _once(next_of(number))
@compiled_part
def _once(number):
    return next_of(number)
"""
CALL = "from caller import twice; print(twice(5), twice.stats.cache_hits.total())"


def call(folder: Path, **environment: str) -> tuple[list[int], str]:
    """The value of `twice(5)` in a new process, how often machine code was read from the cache, and what was logged."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", ""), str(Path(rq_ep.__file__).parents[1])])
    result = subprocess.run(
        [sys.executable, "-c", CALL],
        env={**os.environ, "PYTHONPATH": path, "NUMBA_DISABLE_JIT": "0", **environment},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return [int(word) for word in result.stdout.split()], result.stderr


@pytest.mark.slow
def test_machine_code_is_kept_until_a_callee_or_a_constant_of_another_file_changes(tmp_path: Path) -> None:
    (tmp_path / "caller.py").write_text(CALLER)
    for step, operator, value in ((1, "+", 7), (10, "+", 25), (10, "*", 500)):
        (tmp_path / "callee.py").write_text(CALLEE.format(step=step, operator=operator))
        first, logged = call(tmp_path)
        assert first == [value, 0]
        assert logged.count("once for an installation") == 1
        assert call(tmp_path) == ([value, 1], "")


@pytest.mark.slow
def test_of_processes_that_begin_at_once_one_compiles(tmp_path: Path) -> None:
    (tmp_path / "caller.py").write_text(CALLER)
    (tmp_path / "callee.py").write_text(CALLEE.format(step=1, operator="+"))
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(call, [tmp_path] * 3))
    assert sorted(result for result, _ in results) == [[7, 0], [7, 1], [7, 1]]
    assert sum("once for an installation" in logged for _, logged in results) == 1


@pytest.mark.slow
def test_without_a_folder_for_machine_code_every_process_compiles(tmp_path: Path) -> None:
    (tmp_path / "caller.py").write_text(CALLER)
    (tmp_path / "callee.py").write_text(CALLEE.format(step=1, operator="+"))
    (tmp_path / "__pycache__").write_text("a file where the folder would be")
    nowhere = {"NUMBA_CACHE_LOCATOR_CLASSES": "InTreeCacheLocator", "PYTHONDONTWRITEBYTECODE": "1"}
    for _ in range(2):
        result, logged = call(tmp_path, **nowhere)
        assert result == [7, 0]
        assert logged.count("in every process") == logged.count("NUMBA_CACHE_DIR") == 1
